"""Perplexity and agreement with the last layer at every exit of a saved model, on the held-out part of a text.

    layerskip-moe evaluate --checkpoint runs/main/model
    layerskip-moe evaluate --checkpoint runs/main/model --dataset my_notes/ --max-windows None --json

The text is read with the tokenizer that was saved with the model.
"""

# Next: `analysis/exits.py`, which measures.

import dataclasses
from dataclasses import dataclass
from typing import Literal

from layerskip_moe.analysis import ExitEvaluation, evaluate_exits
from layerskip_moe.cli.flags import parse
from layerskip_moe.cli.options import Text, json_line, load_saved, pick_device


@dataclass(frozen=True)
class Options:
    """What is measured, and how.

    Attributes:
        checkpoint: folder of a saved model and its tokenizer, such as train's <out-dir>/model
        split: the part of the text to measure on
        seq_len: T, tokens per window; windows do not overlap
        batch_size: windows per forward pass
        max_windows: windows at most, from the start of the text; None: all
        device: cpu, cuda, cuda:1, ...; None: a GPU where there is one
        json: print nothing but one JSON object
    """

    checkpoint: str
    split: Literal["validation", "train"] = "validation"
    seq_len: int = 128
    batch_size: int = 8
    max_windows: int | None = 200
    device: str | None = None
    json: bool = False


def run(arguments: list[str]) -> None:
    """`layerskip-moe evaluate`."""
    options, text = parse("layerskip-moe evaluate", __doc__, {"model": Options, "text": Text}, arguments)
    model, corpus = load_saved(options.checkpoint, text, pick_device(options.device))
    tokens = corpus.train if options.split == "train" else corpus.validation
    exits = evaluate_exits(
        model,
        tokens,
        seq_len=options.seq_len,
        batch_size=options.batch_size,
        max_windows=options.max_windows,
    )
    if options.json:
        source = {"checkpoint": options.checkpoint, "corpus": corpus.name, "split": options.split}
        print(json_line(source | dataclasses.asdict(exits)))
    else:
        print(_table(exits))
        print(f"over {exits.tokens} tokens of the {options.split} split of {corpus.name}")


def _table(exits: ExitEvaluation) -> str:
    rows = [f"{'exit layer':>10}  {'perplexity':>10}  {'agreement':>9}"]
    for layer, (perplexity, agreement) in enumerate(zip(exits.perplexity, exits.agreement, strict=True), start=1):
        rows.append(f"{layer:>10}  {perplexity:>10.2f}  {agreement:>9.1%}")
    return "\n".join(rows)
