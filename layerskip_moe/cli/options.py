"""What several commands share: a text, prompts cut from files, a saved model; a line of JSON.

Knows nothing of flags. Next: the commands, `train.py` first.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from layerskip_moe.constants import pick_device
from layerskip_moe.data import Corpus, load_corpus
from layerskip_moe.data.local import read_documents
from layerskip_moe.data.stretches import draw_stretches
from layerskip_moe.files import plain
from layerskip_moe.nn import MoEDecoder
from layerskip_moe.pretrained import load_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Precision = Literal["float32", "bfloat16", "float16"]


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


def load_text(text: Text, tokenizer: "str | Path | Tokenizer", *, vocab_size: int = 4096, seed: int = 0) -> Corpus:
    """The corpus that these options name. tokenizer, vocab_size, seed: see `load_corpus`."""
    return load_corpus(
        text.dataset,
        config=text.dataset_config,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        sample_fraction=text.sample_fraction,
        seed=seed,
    )


def cut_prompts(
    prompts: str,
    tokenizer: "Tokenizer",
    count: int,
    length: int,
    *,
    seed: int = 0,
    fewer: str = "ask for fewer or shorter ones",
) -> list[tuple[int, list[int]]]:
    """`count` stretches of `length` tokens of a file or folder, as `Corpus.validation_stretches` draws them: each after
    the number of its document.

    fewer: what else than a longer text would do. Raises ValueError for what is no text, and for one that is too short.
    """
    try:
        texts = read_documents(Path(prompts))
    except ValueError as error:
        raise ValueError(f"--prompts {prompts} is no text to cut prompts from ({str(error).rstrip('.')}).") from None
    ids = [encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]
    begins = draw_stretches([len(tokens) for tokens in ids], count, length, seed)
    if begins is None:
        held = sum(len(tokens) // length for tokens in ids)
        raise ValueError(
            f"{prompts} holds {held} stretches of {length} tokens, not {count}; give a longer text, or {fewer}."
        )
    return [(document, ids[document][begin : begin + length]) for document, begin in begins]


def load_network(checkpoint: str, device: str | None, dtype: Precision | None) -> MoEDecoder:
    """The model of a checkpoint, in a folder or on the hub. device: see `pick_device`; dtype: None: as it is stored."""
    kind = None if dtype is None else getattr(torch, dtype)
    return MoEDecoder.from_pretrained(checkpoint, device=pick_device(device), dtype=kind)


def load_saved(
    checkpoint: str, text: Text, device: str | None, *, dtype: Precision | None = None, seed: int = 0
) -> tuple[MoEDecoder, Corpus]:
    """A model, as `load_network` has it, and the text these options name in its own tokens."""
    tokenizer = load_tokenizer(checkpoint)  # before the weights, which take longer
    return load_network(checkpoint, device, dtype), load_text(text, tokenizer, seed=seed)


def json_line(values: dict[str, Any]) -> str:
    """One line of JSON. Numbers that JSON does not have (inf, nan) are null."""
    return json.dumps(plain(values), allow_nan=False)
