"""Time `SelfSpeculative()` beside plain decoding, and beside the best fixed pair of exit layer and draft length.

    layerskip-moe bench speculation --checkpoint runs/main/model
    layerskip-moe bench speculation --checkpoint runs/main/model --prompts a_novel.txt wiki.txt --out speculation.json

On held-out text of the kind the model was trained on, and on prompts cut from any text files: what its drafts are good
for there. Then where every draft is made wrong on purpose, and a batch of prompts of different lengths.
"""

# Next: `bench/speculation.py`, which measures.

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from layerskip_moe.bench.machine import describe_machine
from layerskip_moe.bench.speculation import SpeculationSettings, speculation_benchmark
from layerskip_moe.bench.speculation_tables import speculation_text
from layerskip_moe.cli.flags import fields_of, parse
from layerskip_moe.cli.options import Precision, Text, cut_prompts, load_network, load_text
from layerskip_moe.files import plain, replacing
from layerskip_moe.generation import check_prompts
from layerskip_moe.pretrained import load_tokenizer


@dataclass(frozen=True)
class Options:
    """Which model, on what.

    Attributes:
        checkpoint: folder of a model and its tokenizer, such as train's <out-dir>/model, or owner/name on the Hugging
            Face hub
        prompts: texts that prompts are cut from, besides the held-out part of the dataset: files, or folders of .txt,
            .md, .py, .jsonl and .parquet
        out: a JSON file for the result
        device: cpu, cuda, cuda:1, ...; None: a GPU where there is one
        dtype: what to compute in; None: as the weights are stored
        threads: of torch; None: as many as it takes
    """

    checkpoint: str
    prompts: tuple[str, ...] = ()
    out: str | None = None
    device: str | None = None
    dtype: Precision | None = None
    threads: int | None = None


def run(arguments: list[str]) -> None:
    """`layerskip-moe bench speculation`."""
    groups = {"speculation": Options, "text": Text, "settings": fields_of(SpeculationSettings)}
    options, text, flags = parse("layerskip-moe bench speculation", __doc__, groups, arguments)
    settings = SpeculationSettings(**vars(flags))
    lengths = ("prompt_length", "max_new_tokens", "wrong_tokens")
    for name in ("num_prompts", *lengths, "wrong_repeats", "batch_size", "batches"):
        if getattr(settings, name) < 1:
            raise ValueError(f"{name}={getattr(settings, name)} must be 1 or more.")
    if options.threads is not None:
        if options.threads < 1:
            raise ValueError(f"threads={options.threads} must be 1 or more.")
        torch.set_num_threads(options.threads)
    tokenizer = load_tokenizer(options.checkpoint)  # before the weights, which take longer
    count, length = settings.num_prompts, settings.prompt_length
    texts = {text.dataset: load_text(text, tokenizer).validation_prompts(count, length, seed=settings.seed)}
    for name in options.prompts:
        texts[name] = [tokens for _, tokens in cut_prompts(name, tokenizer, count, length, seed=settings.seed)]
    model = load_network(options.checkpoint, options.device, options.dtype)
    if model.config.n_layers < 2:
        raise ValueError("a model of one layer has none that could draft for the others.")
    for prompts in texts.values():
        check_prompts(prompts, model.config, max(settings.max_new_tokens, settings.wrong_tokens))
    result: dict[str, Any] = {
        "command": shlex.join(["layerskip-moe", "bench", "speculation", *arguments]),
        "machine": describe_machine(model.device),
        "settings": plain(settings),
        **speculation_benchmark(model, texts, settings),
    }
    print(speculation_text(result))
    if options.out is not None:
        with replacing(Path(options.out)) as beside:
            beside.write_text(json.dumps(plain(result), indent=1, allow_nan=False) + "\n", encoding="utf-8")
