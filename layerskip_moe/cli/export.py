"""Write a checkpoint for other people's tools: transformers, vLLM and SGLang, or llama.cpp.

    layerskip-moe export --checkpoint runs/main/model --to hf --out exported/
    layerskip-moe export --checkpoint runs/main/model --to hf --out exported/ --dtype bfloat16 --report report.json
    layerskip-moe export --checkpoint mistralai/Mixtral-8x7B-v0.1 --to gguf --out mixtral.gguf --dtype q8_0

A network that the format cannot express exactly is refused, with the settings that stand in the way.
"""

# Next: `pretrained/checkpoint.py` and `pretrained/gguf.py`, which write.

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from layerskip_moe.cli.flags import parse
from layerskip_moe.nn import MoEDecoder
from layerskip_moe.pretrained import load_tokenizer
from layerskip_moe.pretrained.checkpoint import read_recipe
from layerskip_moe.pretrained.families import FAMILIES, family_of, obstacles
from layerskip_moe.pretrained.gguf import GGUFType, export_gguf
from layerskip_moe.pretrained.model_card import measured_lines, write_model_card
from layerskip_moe.pretrained.quantize import quantization_of
from layerskip_moe.pretrained.tokenizer import has_tokenizer


@dataclass(frozen=True)
class Options:
    """What is written, and where.

    Attributes:
        checkpoint: folder of a saved model, or owner/name on the Hugging Face hub
        to: hf, a folder that transformers opens; or gguf, a file for llama.cpp
        out: the folder, or the file, to write
        dtype: of the weights; None: as they are stored. q8_0, of gguf alone, is 8 bits in blocks of 32
        report: hf: path of a report.json, whose numbers go into the model card
        max_shard_gb: hf: weights are split into files of at most so many gigabytes
    """

    checkpoint: str
    to: Literal["hf", "gguf"]
    out: str
    dtype: Literal["float32", "bfloat16", "float16", "q8_0"] | None = None
    report: str | None = None
    max_shard_gb: float = 5.0


def run(arguments: list[str]) -> None:
    """`layerskip-moe export`."""
    (options,) = parse("layerskip-moe export", __doc__, {"export": Options}, arguments)
    if options.to == "gguf":
        _write_gguf(options)
    else:
        _write_folder(options)
    print(f"written to {options.out}")


def _write_folder(options: Options) -> None:
    if options.dtype == "q8_0":
        raise ValueError("--dtype q8_0 is for --to gguf; give float32, bfloat16 or float16.")
    report = None if options.report is None else _read_report(Path(options.report))
    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    model = MoEDecoder.from_pretrained(options.checkpoint, dtype=dtype)
    if quantization_of(model) is not None:
        raise ValueError(f"the weights in {options.checkpoint} are quantised; export what they were made from.")
    if family_of(model.config) is None:
        in_the_way = {family: obstacles(model.config, family) for family in FAMILIES}
        closest = min(FAMILIES, key=lambda family: len(in_the_way[family]))
        raise ValueError(
            f"no architecture of transformers computes this network; the closest, {closest}, lacks "
            f"{'; '.join(in_the_way[closest])}."
        )
    model.save_pretrained(
        options.out,
        tokenizer=options.checkpoint if has_tokenizer(options.checkpoint) else None,
        recipe=read_recipe(options.checkpoint),
        max_shard_bytes=int(options.max_shard_gb * 1e9),
    )
    if report is not None:
        write_model_card(Path(options.out), report)


def _write_gguf(options: Options) -> None:
    if options.report is not None:
        raise ValueError("--report is for --to hf, where the model card is written.")
    model = MoEDecoder.from_pretrained(options.checkpoint)
    tokenizer = load_tokenizer(options.checkpoint)
    stored: dict[torch.dtype, GGUFType] = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
    export_gguf(model, tokenizer, options.out, dtype=options.dtype or stored.get(model.dtype, "float32"))


def _read_report(path: Path) -> dict[str, Any]:
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        measured_lines(report)  # what the card will tell: refused before anything is written
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        told = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} is no report that can be read ({told}); give main.py's report.json.") from None
    return report
