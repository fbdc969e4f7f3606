"""Tokens and tokenizers on disk, by content: built once, complete or absent, rebuilt when damaged.

An entry is a folder `<root>/corpora/<key>/` of tokenizer.json, train.bin and validation.bin (little-endian
int32) and checksums.json. The key is a hash of what the documents are and of every setting that shapes the
tokens, so entries are never stale and can be deleted at any time. Knows nothing of the tensors made from them
(`corpus.py`).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from layerskip_moe.data.source import Source, Split
from layerskip_moe.data.tokenizer import encode_documents, make_tokenizer
from layerskip_moe.files import sha256

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER = "tokenizer.json"
TOKENS: dict[Split, str] = {"train": "train.bin", "validation": "validation.bin"}
_CHECKSUMS = "checksums.json"
_FORMAT = 2  # raise it when the same documents and settings come to give other files


def entry_path(root: Path, content: str, tokenizer_identity: str) -> Path:
    """Where the tokens of these documents with this tokenizer are kept."""
    key = f"format {_FORMAT}\n{tokenizer_identity}\n{content}"
    return root / "corpora" / hashlib.sha256(key.encode()).hexdigest()[:32]


def ensure_entry(
    entry: Path, source: Source, tokenizer: str | Path | Tokenizer, vocab_size: int, progress: bool
) -> None:
    """Build the entry unless it is there and whole. Of several processes, one builds, the rest wait."""
    if _damage(entry) is None:
        return
    import filelock

    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(entry.with_suffix(".lock"))
        lock.acquire()
    except (OSError, NotImplementedError) as error:  # the second where a file system has no locks
        raise ValueError(
            f"The cache folder {entry.parent} cannot be written ({error}): set "
            "LAYERSKIP_MOE_CACHE or pass cache_dir to choose another."
        ) from None
    try:
        damage = _damage(entry)
        if damage is not None:
            if entry.exists():
                message = f"The cached corpus {entry} is damaged ({damage}) and is built again."
                warnings.warn(message, stacklevel=3)
                shutil.rmtree(entry)
            _build(entry, source, tokenizer, vocab_size, progress)
    finally:
        lock.release()


def _damage(entry: Path) -> str | None:
    """Why the entry cannot be used, None when it is whole."""
    try:
        checksums = json.loads((entry / _CHECKSUMS).read_text())
        for name in (TOKENIZER, *TOKENS.values()):
            if sha256(entry / name) != checksums[name]:
                return f"{name} has changed"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _build(entry: Path, source: Source, tokenizer: str | Path | Tokenizer, vocab_size: int, progress: bool) -> None:
    # One fixed name, which the lock protects: what a killed process left behind is removed by the next.
    beside = entry.with_suffix(".partial")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    try:
        made = make_tokenizer(tokenizer, vocab_size, source.read, progress)
        (beside / TOKENIZER).write_text(made.to_str(pretty=True), encoding="utf-8")  # its own `save` has no OSError
        _write_tokens(beside, source, made, progress)
        checksums = {name: sha256(beside / name) for name in (TOKENIZER, *TOKENS.values())}
        (beside / _CHECKSUMS).write_text(json.dumps(checksums))
        os.replace(beside, entry)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _write_tokens(folder: Path, source: Source, tokenizer: Tokenizer, progress: bool) -> None:
    from tqdm.auto import tqdm

    with (
        open(folder / TOKENS["train"], "wb") as train,
        open(folder / TOKENS["validation"], "wb") as validation,
        tqdm(
            total=source.characters,
            desc=f"tokens of {source.name}",
            unit="char",
            unit_scale=True,
            disable=not progress,
        ) as bar,
    ):
        files: dict[Split, BinaryIO] = {"train": train, "validation": validation}
        for split, ids, characters in encode_documents(tokenizer, source.read()):
            files[split].write(np.asarray(ids, dtype="<i4").tobytes())
            bar.update(characters)
    for split, name in TOKENS.items():
        if (folder / name).stat().st_size == 0:
            raise ValueError(
                f"'{source.name}' holds too little text to fill the {split} split: add text, or raise "
                "sample_fraction if it is below 1."
            )
