"""Write a checkpoint for other people's tools: transformers, vLLM and SGLang, or llama.cpp.

    layerskip-moe export --checkpoint runs/main/model --to hf --out runs/exported
    layerskip-moe export --checkpoint runs/main/model --to hf --out runs/exported --dtype bfloat16 --report report.json
    layerskip-moe export --checkpoint mistralai/Mixtral-8x7B-v0.1 --to gguf --out mixtral.gguf --dtype q8_0

A network that the format cannot express exactly is refused, with the settings that stand in the way.
"""

# Next: `pretrained/checkpoint.py` and `pretrained/gguf.py`, which write.

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from layerskip_moe.cli.flags import parse
from layerskip_moe.nn import ModelConfig, MoEDecoder
from layerskip_moe.pretrained import load_tokenizer, read_recipe
from layerskip_moe.pretrained.config_file import read_network, read_quantization
from layerskip_moe.pretrained.families import FAMILIES, family_of, obstacles
from layerskip_moe.pretrained.gguf import GGUFType, check_gguf, export_gguf
from layerskip_moe.pretrained.hub import local_folder
from layerskip_moe.pretrained.model_card import has_other_card, measured_lines, write_model_card
from layerskip_moe.pretrained.tokenizer import has_tokenizer


@dataclass(frozen=True)
class Options:
    """What is written, and where.

    Attributes:
        checkpoint: folder of a saved model, or owner/name on the Hugging Face hub
        to: hf, a folder that transformers opens; or gguf, a file for llama.cpp
        out: the folder, or the file, to write
        dtype: of the weights; None: as they are stored. q8_0, of gguf alone, is 8 bits in blocks of 32
        report: hf: path of the report.json of main.py or of the report command, for the model card
        max_shard_gb: hf: weights are split into files of at most so many gigabytes; None: 5
    """

    checkpoint: str
    to: Literal["hf", "gguf"]
    out: str
    dtype: Literal["float32", "bfloat16", "float16", "q8_0"] | None = None
    report: str | None = None
    max_shard_gb: float | None = None


def run(arguments: list[str]) -> None:
    """`layerskip-moe export`. What can be refused is refused before the weights are read, which may take minutes."""
    (options,) = parse("layerskip-moe export", __doc__, {"export": Options}, arguments)
    folder = local_folder(options.checkpoint, patterns=("*.json",))
    _, config = read_network(folder)
    if read_quantization(folder) is not None:
        raise ValueError(f"the weights in {options.checkpoint} are quantised; export what they were made from.")
    if options.to == "gguf":
        _write_gguf(options, config)
    else:
        _write_folder(options, config)
    print(f"written to {options.out}")


def _write_folder(options: Options, config: ModelConfig) -> None:
    if options.dtype == "q8_0":
        raise ValueError("--dtype q8_0 is for --to gguf; give float32, bfloat16 or float16.")
    max_shard_gb = 5.0 if options.max_shard_gb is None else options.max_shard_gb
    if not 1e-9 <= max_shard_gb < math.inf:
        raise ValueError(f"--max-shard-gb {max_shard_gb} does not fit: it is a number above 0.")
    report = None if options.report is None else _read_report(Path(options.report))
    if report is not None and has_other_card(Path(options.out)):
        raise ValueError(f"the README.md in {options.out} is not ours to change; leave out --report, or move it away.")
    if family_of(config) is None:
        in_the_way = {family: obstacles(config, family) for family in FAMILIES}
        closest = min(FAMILIES, key=lambda family: len(in_the_way[family]))
        raise ValueError(
            f"no architecture of transformers computes this network; the closest, {closest}, lacks "
            f"{'; '.join(in_the_way[closest])}."
        )
    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    model = MoEDecoder.from_pretrained(options.checkpoint, dtype=dtype)
    has_one = has_tokenizer(options.checkpoint)
    if not has_one:
        print(f"{options.checkpoint} holds no tokenizer, so none is written", file=sys.stderr)
    model.save_pretrained(
        options.out,
        tokenizer=options.checkpoint if has_one else None,
        recipe=read_recipe(options.checkpoint),
        max_shard_bytes=int(max_shard_gb * 1e9),
    )
    if report is not None:
        write_model_card(Path(options.out), report)


def _write_gguf(options: Options, config: ModelConfig) -> None:
    for flag, value in (("--report", options.report), ("--max-shard-gb", options.max_shard_gb)):
        if value is not None:
            raise ValueError(f"{flag} is for --to hf; leave it out.")
    check_gguf(config, options.out)
    tokenizer = load_tokenizer(options.checkpoint)
    model = MoEDecoder.from_pretrained(options.checkpoint)
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
