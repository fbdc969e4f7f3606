"""`load_corpus`: from a name or a path to a tokenizer and two memory-mapped streams of token ids.

Knows nothing of batches (`batching.py`). Where text comes from is in `local.py` and `hub.py`, how it becomes
ids in `tokenizer.py`, how results are kept in `cache.py`.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from layerskip_moe.data import cache
from layerskip_moe.data.hub import SHORT_NAMES, hub_source
from layerskip_moe.data.local import SUFFIXES, path_source, stdlib_source
from layerskip_moe.data.source import Source
from layerskip_moe.data.stretches import draw_stretches
from layerskip_moe.data.tokenizer import end_of_text_id, id_count, tokenizer_identity
from layerskip_moe.files import cache_folder, expanded
from layerskip_moe.refusals import shown

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_HUB_NAME = re.compile(r"\w[\w.-]*/[\w.-]+")


@dataclass(frozen=True, eq=False)
class Corpus:
    """A tokenizer and the two splits it was applied to.

    train, validation: 1-D int32, memory-mapped from the cache: they take no memory until read, and writing to
    them changes neither the cache nor another process. (int32, which is more than small vocabularies need,
    because an embedding takes it as it is.) Each document is followed by `end_of_text`.
    """

    name: str
    tokenizer: Tokenizer = field(repr=False)
    train: Tensor = field(repr=False)
    validation: Tensor = field(repr=False)

    @cached_property
    def vocab_size(self) -> int:
        """How many ids there are, which may be fewer than were asked for."""
        return id_count(self.tokenizer)

    @cached_property
    def end_of_text(self) -> int:
        """The id that ends every document."""
        return end_of_text_id(self.tokenizer)

    def validation_prompts(self, n: int, length: int, seed: int = 0) -> list[list[int]]:
        """`n` different stretches of `length` tokens of held-out text, none across two documents.

        They come from n different documents where that many are long enough, and else from as many as there
        are. A pure function of the arguments and the corpus. Raises ValueError when the split is too small.
        """
        return [tokens for _, tokens in self.validation_stretches(n, length, seed)]

    def validation_stretches(self, n: int, length: int, seed: int = 0) -> list[tuple[int, list[int]]]:
        """`validation_prompts`, each after the number of the held-out document that it is of."""
        if n < 1 or length < 1:
            raise ValueError(f"n={n} and length={length} must both be at least 1.")
        separators = torch.nonzero(self.validation == self.end_of_text).flatten().numpy()
        starts = np.concatenate([[0], separators + 1])
        ends = np.concatenate([separators, [len(self.validation)]])
        drawn = draw_stretches(ends - starts, n, length, seed)
        if drawn is None:
            raise ValueError(
                f"The validation split of '{self.name}' holds {((ends - starts) // length).sum()} separate prompts of "
                f"{length} tokens, not {n}: ask for fewer or shorter ones."
            )
        begins = [(document, starts[document] + begin) for document, begin in drawn]
        return [(document, self.validation[begin : begin + length].tolist()) for document, begin in begins]


def load_corpus(
    dataset: str | Path = "python-stdlib",
    *,
    config: str | None = None,
    vocab_size: int = 4096,
    tokenizer: str | Path | Tokenizer = "bpe",
    sample_fraction: float = 1.0,
    seed: int = 0,
    cache_dir: str | Path | None = None,
    progress: bool = True,
) -> Corpus:
    """Text as token ids, ready for `batches`; fast from the second time on.

    dataset: "python-stdlib" (no network needed); a file or folder of .txt, .md, .py, .jsonl (field `text`) or
        .parquet (column `text`); "wikitext-2", "wikitext-103", "tinystories"; or a hub dataset "owner/name"
        with a `text` column. A file or folder that exists wins over a hub dataset, and one of the short names
        over a file; a `Path` always means a file or folder.
    config: of a hub dataset that has several.
    vocab_size: at most this many ids, at least 257 (unigram: 258). Without effect when the tokenizer is there already.
    tokenizer: "bpe" or "unigram", both byte-level and trained on the training split; the path of a
        tokenizer.json; or one that was loaded, as by `load_tokenizer`.
    sample_fraction: in (0, 1], the share of the training text to use; validation stays whole, unless it is
        carved out of a stream. seed: which share.
    cache_dir: where tokens and tokenizer are kept, by content. By default $LAYERSKIP_MOE_CACHE, else the
        user's cache folder. A damaged entry is built again, with a warning.
    progress: show bars while building.

    Raises ValueError, in one sentence, for what cannot be read and for settings out of range.
    """
    if not 0 < sample_fraction <= 1:
        raise ValueError(f"sample_fraction={sample_fraction} must be above 0 and at most 1, which is all the text.")
    identity = tokenizer_identity(tokenizer, vocab_size)
    root = cache_folder(cache_dir)
    source = _find_source(dataset, config, sample_fraction, seed, root)
    entry = cache.entry_path(root, source.content, identity)
    cache.ensure_entry(entry, source, tokenizer, vocab_size, progress)
    return _open(source.name, entry)


def _find_source(dataset: str | Path, config: str | None, fraction: float, seed: int, root: Path) -> Source:
    path = expanded(dataset)
    looks_local = isinstance(dataset, Path) or os.path.exists(path) or path.suffix.lower() in SUFFIXES
    if not looks_local and _HUB_NAME.fullmatch(str(dataset)):
        return hub_source(str(dataset), str(dataset), config, fraction, seed, root / "hub")
    if config is not None:
        told = shown(str(dataset))
        raise ValueError(f"config={shown(config)} is for hub datasets 'owner/name': leave it out for {told}.")
    if dataset == "python-stdlib":
        return stdlib_source(fraction, seed)
    if isinstance(dataset, str) and dataset in SHORT_NAMES:
        repo, own_config = SHORT_NAMES[dataset]
        return hub_source(dataset, repo, own_config, fraction, seed, root / "hub")
    if dataset and (looks_local or len(path.parts) > 1):
        return path_source(path, fraction, seed)
    names = ", ".join(["'python-stdlib'", *(f"'{name}'" for name in SHORT_NAMES)])
    raise ValueError(
        f"There is no dataset, file or folder {shown(str(dataset))}: use {names}, the path of a file or folder, or "
        "'owner/name' from the Hugging Face hub."
    )


def _open(name: str, entry: Path) -> Corpus:
    from tokenizers import Tokenizer

    return Corpus(
        name=name,
        tokenizer=Tokenizer.from_file(str(entry / cache.TOKENIZER)),
        train=_map_tokens(entry / cache.TOKENS["train"]),
        validation=_map_tokens(entry / cache.TOKENS["validation"]),
    )


def _map_tokens(path: Path) -> Tensor:
    size = path.stat().st_size // torch.int32.itemsize
    # A private mapping: pages are read when touched, and written copies stay in this process.
    return torch.from_file(str(path), shared=False, size=size, dtype=torch.int32)
