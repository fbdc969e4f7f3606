"""What every source of text looks like: named documents, each in the training or the validation split.

Knows nothing of where documents come from (`local.py`, `hub.py`) or of tokens (`tokenizer.py`).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

Split = Literal["train", "validation"]


class Document(NamedTuple):
    """One text that ends with a separator once it is tokenized."""

    split: Split
    text: str


@dataclass(frozen=True)
class Source:
    """Documents that can be read more than once, and what identifies their content.

    name: for people.
    content: equal for equal documents, different otherwise; the cache is keyed by it.
    read: starts a fresh pass over the documents, always in the same order.
    characters: their total length, None where only reading would tell.
    """

    name: str
    content: str
    read: Callable[[], Iterator[Document]]
    characters: int | None = None
