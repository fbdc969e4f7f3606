"""Perplexity and agreement with the last layer at every exit of a saved model, on the held-out part of a text.

    layerskip-moe evaluate --checkpoint runs/main/model
    layerskip-moe evaluate --checkpoint runs/main/model --dataset my_notes/ --max-windows None --json
    layerskip-moe evaluate --checkpoint runs/main/model --quantize int8

The text is read with the tokenizer that is beside the model.
"""

# Next: `analysis/exits.py`, which measures.

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from layerskip_moe.analysis import ExitEvaluation, evaluate_exits
from layerskip_moe.cli.flags import parse
from layerskip_moe.cli.options import Precision, Text, json_line, load_saved
from layerskip_moe.nn import MoEDecoder
from layerskip_moe.pretrained.quantize import Quantization, quantize


@dataclass(frozen=True)
class Options:
    """What is measured, and how.

    Attributes:
        checkpoint: folder of a model and its tokenizer, such as train's <out-dir>/model, or owner/name on the Hugging
            Face hub
        split: the part of the text to measure on
        seq_len: T, tokens per window; windows do not overlap
        batch_size: windows per forward pass
        max_windows: windows at most, from the start of the text; None: all
        device: cpu, cuda, cuda:1, ...; None: a GPU where there is one
        dtype: what to compute in; None: as the weights are stored
        quantize: int8 or int4: measure a copy with its weights so quantised too, and by how much that raises the
            perplexity at every exit
        json: print nothing but one JSON object
    """

    checkpoint: str
    split: Literal["validation", "train"] = "validation"
    seq_len: int = 128
    batch_size: int = 8
    max_windows: int | None = 200
    device: str | None = None
    dtype: Precision | None = None
    quantize: Quantization | None = None
    json: bool = False


def run(arguments: list[str]) -> None:
    """`layerskip-moe evaluate`."""
    options, text = parse("layerskip-moe evaluate", __doc__, {"model": Options, "text": Text}, arguments)
    model, corpus = load_saved(options.checkpoint, text, options.device, dtype=options.dtype)
    tokens = corpus.train if options.split == "train" else corpus.validation
    copy = None if options.quantize is None else quantize(model, options.quantize)  # refused before it all takes long
    exits = _measure(model, tokens, options)
    quantized = None if copy is None else _measure(copy, tokens, options).perplexity
    if options.json:
        result: dict[str, Any] = {"checkpoint": options.checkpoint, "corpus": corpus.name, "split": options.split}
        result |= dataclasses.asdict(exits)
        if quantized is not None:
            changes = _changes(exits.perplexity, quantized)
            told = {"quantization": options.quantize, "perplexity": quantized, "perplexity_change": changes}
            result["quantized"] = told
        print(json_line(result))
    else:
        print(_table(exits, options.quantize, quantized))
        print(f"over {exits.tokens} tokens of the {options.split} split of {corpus.name}")


def _measure(model: MoEDecoder, tokens: Tensor, options: Options) -> ExitEvaluation:
    return evaluate_exits(
        model,
        tokens,
        seq_len=options.seq_len,
        batch_size=options.batch_size,
        max_windows=options.max_windows,
    )


def _changes(perplexity: list[float], quantized: list[float]) -> list[float]:
    """By what share of itself each perplexity rose."""
    return [after / before - 1 for before, after in zip(perplexity, quantized, strict=True)]


def _table(exits: ExitEvaluation, quantization: str | None, quantized: list[float] | None) -> str:
    rows = [f"{'exit layer':>10}  {'perplexity':>10}  {'agreement':>9}"]
    for layer, (perplexity, agreement) in enumerate(zip(exits.perplexity, exits.agreement, strict=True), start=1):
        rows.append(f"{layer:>10}  {perplexity:>10.2f}  {agreement:>9.1%}")
    if quantized is not None:
        rows[0] += f"  {f'in {quantization}':>10}  {'change':>8}"
        for layer, change in enumerate(_changes(exits.perplexity, quantized), start=1):
            rows[layer] += f"  {quantized[layer - 1]:>10.2f}  {change:>+8.2%}"
    return "\n".join(rows)
