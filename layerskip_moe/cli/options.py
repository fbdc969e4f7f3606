"""What several commands share: a text, a saved model; a line of JSON.

Knows nothing of flags. Next: the commands, `train.py` first.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerskip_moe.constants import pick_device
from layerskip_moe.data import Corpus, load_corpus
from layerskip_moe.files import plain
from layerskip_moe.nn import MoEDecoder
from layerskip_moe.pretrained import load_tokenizer
from layerskip_moe.pretrained.tokenizer import TOKENIZER


@dataclass(frozen=True)
class Text:
    """Where text comes from.

    Attributes:
        dataset: python-stdlib, wikitext-2, wikitext-103, tinystories, owner/name on the Hugging Face hub, or a file or
            folder of .txt, .md, .py, .jsonl or .parquet
        dataset_config: of a hub dataset that has several
        sample_fraction: share of the training text to use, above 0 and at most 1
    """

    dataset: str = "python-stdlib"
    dataset_config: str | None = None
    sample_fraction: float = 1.0


def load_text(text: Text, tokenizer: str | Path, *, vocab_size: int = 4096, seed: int = 0) -> Corpus:
    """The corpus that these options name. tokenizer, vocab_size, seed: see `load_corpus`."""
    return load_corpus(
        text.dataset,
        config=text.dataset_config,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        sample_fraction=text.sample_fraction,
        seed=seed,
    )


def load_saved(checkpoint: str, text: Text, device: str | None, *, seed: int = 0) -> tuple[MoEDecoder, Corpus]:
    """A saved model, and the text these options name in its own tokens. device: see `pick_device`."""
    device = pick_device(device)
    load_tokenizer(checkpoint)  # raises where there is none, or not the one that was saved
    model = MoEDecoder.from_pretrained(checkpoint, device=device)
    return model, load_text(text, Path(checkpoint) / TOKENIZER, seed=seed)


def json_line(values: dict[str, Any]) -> str:
    """One line of JSON. Numbers that JSON does not have (inf, nan) are null."""
    return json.dumps(plain(values), allow_nan=False)
