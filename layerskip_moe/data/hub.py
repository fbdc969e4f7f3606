"""Text from the Hugging Face hub, streamed: nothing is kept but the tokens in our own cache.

A dataset's content is identified by its commit on the hub. The commit last seen is remembered beside the
cache, so that a corpus that was loaded once still loads on a machine without a network.
Knows nothing of tokens. `corpus.py` calls it.
"""

import os
import random
import re
import warnings
from collections.abc import Iterable, Iterator
from math import ceil
from pathlib import Path
from typing import Any
from urllib.parse import quote

from layerskip_moe.data.source import Document, Source

SHORT_NAMES = {
    "wikitext-2": ("Salesforce/wikitext", "wikitext-2-raw-v1"),
    "wikitext-103": ("Salesforce/wikitext", "wikitext-103-raw-v1"),
    "tinystories": ("roneneldan/TinyStories", None),
}
_VALIDATION_NAMES = ("validation", "valid", "val", "dev")
_HOLD_BACK_EVERY = 20  # where a dataset has no validation split, every 20th document: 5%
_TIMEOUT_SECONDS = 8.0
_ARTICLE_HEADING = re.compile(r" = [^=].* = \n?")  # WikiText's first-level heading; its sections say " = = "


def hub_source(name: str, repo: str, config: str | None, sample_fraction: float, seed: int, remembered: Path) -> Source:
    """A hub dataset with a `text` column and a `train` split.

    name: what the user called it. repo: `owner/name`. remembered: a folder for the commits last seen.
    `sample_fraction` reads only the first rows of the training split when the hub states their number;
    otherwise every row is read and kept with that probability. Validation is the dataset's own split, whole,
    or every 20th of the training documents read.
    Raises ValueError when the hub cannot be reached, or has no such dataset, config, split or column; the
    last three only when the documents are read.
    """
    note = remembered / f"{quote(f'{repo} {config}', safe='')}.txt"
    commit, failure = _commit(repo)
    if failure is not None:
        if not note.is_file():
            raise ValueError(failure)
        commit = note.read_text().strip()
        warnings.warn(f"{failure} Using commit {commit[:8]}, which was loaded before.", stacklevel=4)

    def read() -> Iterator[Document]:
        if failure is not None:
            raise ValueError(failure)
        yield from _documents(repo, config, commit, sample_fraction, seed)
        # Only now: a commit that could not be read to its end is of no use without a network.
        _write_text(note, commit)

    sample = "" if sample_fraction == 1 else f" {sample_fraction} {seed}"
    return Source(name, f"hub {repo} {config} {commit}{sample}", read)


def _commit(repo: str) -> tuple[str, str | None]:
    """The dataset's commit on the hub; when the hub did not answer, the sentence that says so instead.

    Asked directly because `datasets` retries for half a minute, and prints that, before it gives up.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        return str(HfApi().dataset_info(repo, timeout=_TIMEOUT_SECONDS).sha), None
    except RepositoryNotFoundError:
        raise ValueError(
            f"The Hugging Face hub has no public dataset '{repo}', and no file or folder here has that name: "
            "check the spelling, or log in with `hf auth login` if the dataset is private."
        ) from None
    # The hub's HTTP library, and with it the exceptions, changes from release to release.
    except Exception as error:
        return "", (
            f"'{repo}' is no file or folder here, and the Hugging Face hub could not be reached for it "
            f"({_reason(error)}): check the connection or use 'python-stdlib' or local text, which need none."
        )


def _documents(repo: str, config: str | None, commit: str, fraction: float, seed: int) -> Iterator[Document]:
    import datasets

    try:
        splits = datasets.load_dataset(repo, config, revision=commit, streaming=True)
    except Exception as error:
        raise _unreadable(repo, config, error) from None
    if "train" not in splits:
        raise ValueError(f"The dataset '{repo}' has no 'train' split but {sorted(splits)}: choose another one.")
    train = _texts(_first_rows(splits["train"], fraction, seed), repo, config)
    held_back = next((splits[name] for name in _VALIDATION_NAMES if name in splits), None)
    if held_back is None:
        for i, text in enumerate(train):
            yield Document("train" if i % _HOLD_BACK_EVERY else "validation", text)
        return
    yield from (Document("train", text) for text in train)
    yield from (Document("validation", text) for text in _texts(held_back, repo, config))


def _first_rows(split: Any, fraction: float, seed: int) -> Iterable[dict[str, Any]]:
    """split: a datasets.IterableDataset, whose number of rows is stated by most datasets but not all."""
    if fraction == 1:
        return split
    stated = (split.info.splits or {}).get("train")
    if stated is not None and stated.num_examples:
        return split.take(ceil(fraction * stated.num_examples))
    draws = random.Random(seed)
    return (row for row in split if draws.random() < fraction)


def _texts(rows: Iterable[dict[str, Any]], repo: str, config: str | None) -> Iterator[str]:
    texts = _text_column(rows, repo, config)
    if repo == "Salesforce/wikitext":
        texts = _articles(texts)
    return (text for text in texts if text.strip())


def _text_column(rows: Iterable[dict[str, Any]], repo: str, config: str | None) -> Iterator[str]:
    iterator = iter(rows)
    while True:
        try:
            row = next(iterator, None)
        except Exception as error:
            raise _unreadable(repo, config, error) from None
        if row is None:
            return
        if not isinstance(row.get("text", ""), str | None) or "text" not in row:
            raise ValueError(
                f"The dataset '{repo}' needs a column 'text' of strings, but its columns are {sorted(row)}: "
                "choose another dataset or config, or save the text as .jsonl and pass that file."
            )
        if row["text"] is not None:
            yield row["text"]


def _articles(lines: Iterable[str]) -> Iterator[str]:
    """WikiText's rows are lines; its documents are articles, each opened by a heading."""
    article: list[str] = []
    for line in lines:
        if _ARTICLE_HEADING.fullmatch(line) and article:
            yield "".join(article)
            article = []
        article.append(line)
    yield "".join(article)


def _unreadable(repo: str, config: str | None, error: Exception) -> ValueError:
    which = f"'{repo}'" if config is None else f"'{repo}' with config '{config}'"
    return ValueError(
        f"The dataset {which} could not be read from the Hugging Face hub "
        f"({_reason(error)}): pass another config, or use 'python-stdlib' or a local file or folder."
    )


def _reason(error: Exception) -> str:
    # Two lines: `datasets` names the available configs on the second.
    lines = [line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {'; '.join(lines[:2])}"


def _write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(f".{os.getpid()}")
    beside.write_text(text)
    os.replace(beside, path)
