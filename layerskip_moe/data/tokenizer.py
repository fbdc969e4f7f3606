"""Tokenizers that lose nothing: byte-level BPE or unigram, trained here or read from a tokenizer.json.

Byte-level (Radford et al. 2019, GPT-2): text is first written as one printable character per UTF-8 byte, all
256 of which are in the vocabulary, so any text can be encoded and `decode(encode(text)) == text`.
Knows nothing of where documents come from. `corpus.py` calls it.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerskip_moe.data.source import Document, Split
from layerskip_moe.files import expanded
from layerskip_moe.refusals import shown
from layerskip_moe.special_tokens import END_OF_TEXT_NAMES, end_of_text_ids

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# The kinds that can be trained, and the least ids they need: every byte, the separator, and for unigram one
# piece more, without which its trainer passes the size it was given.
SMALLEST_VOCABULARY = {"bpe": 257, "unigram": 258}
END_OF_TEXT = "<|endoftext|>"
# More text hardly changes a small vocabulary, and costs minutes and memory.
_TRAINING_CHARACTERS = 64_000_000
_PIECE_CHARACTERS = 1 << 16
_BATCH_CHARACTERS = 1 << 21
# Between two words, or two lines: places where the byte-level splitting rule always cuts, so that a text
# encoded in pieces gives the tokens of the whole.
_BETWEEN_WORDS = re.compile(r"(?<=\S)(?= \S)|(?<=\S\n)(?=\S)")
_LONGEST_WORD = 4096
_ENDLESS = re.compile(rf"(?<!\S)\S{{{_LONGEST_WORD},}}|(?<!\s)\s{{{_LONGEST_WORD},}}")
_PARALLELISM = "TOKENIZERS_PARALLELISM"
_PARALLELISM_OF_USER = os.environ.get(_PARALLELISM)
_IMPORTED_BY = os.getpid()


def tokenizer_identity(tokenizer: str | Path | Tokenizer, vocab_size: int) -> str:
    """What tells this choice of tokenizer from every other; ValueError where it is no possible choice."""
    import tokenizers

    if isinstance(tokenizer, tokenizers.Tokenizer):
        digest = hashlib.sha256(tokenizer.to_str().encode()).hexdigest()
        return f"given {digest} by tokenizers {tokenizers.__version__}"
    if tokenizer in SMALLEST_VOCABULARY:
        smallest = SMALLEST_VOCABULARY[str(tokenizer)]
        if vocab_size < smallest:
            raise ValueError(
                f"vocab_size={vocab_size} is too small for tokenizer='{tokenizer}': it takes 256 bytes to "
                f"write any text, so use at least {smallest}."
            )
        return f"{tokenizer} {vocab_size} by tokenizers {tokenizers.__version__}"
    path = expanded(tokenizer)
    if not os.path.isfile(path):  # (which raises nothing, as `Path.is_file` does for a name that is too long)
        told = shown(str(tokenizer))
        raise ValueError(f"There is no tokenizer {told}: use 'bpe', 'unigram' or the path of a tokenizer.json.")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return f"file {digest} by tokenizers {tokenizers.__version__}"


def make_tokenizer(
    tokenizer: str | Path | Tokenizer, vocab_size: int, read: Callable[[], Iterable[Document]], progress: bool
) -> Tokenizer:
    """Train the kind named, on one pass over the documents, read the file named, or take the one that is given."""
    from tokenizers import Tokenizer

    if isinstance(tokenizer, Tokenizer):
        return _whole_texts(Tokenizer.from_str(tokenizer.to_str()))
    if tokenizer in SMALLEST_VOCABULARY:
        return train_tokenizer(str(tokenizer), vocab_size, read(), progress)
    return read_tokenizer(expanded(tokenizer))


def train_tokenizer(kind: str, vocab_size: int, documents: Iterable[Document], progress: bool) -> Tokenizer:
    """Train a "bpe" (Sennrich et al. 2016) or "unigram" (Kudo 2018) tokenizer on the training split alone.

    Uses the first 64 million characters. Ids are 0..n-1 with n <= vocab_size, less where the text is too
    small to fill the vocabulary; id 0 is <|endoftext|>.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from tqdm.auto import tqdm

    settings: dict[str, Any] = {
        "vocab_size": vocab_size,
        "special_tokens": [END_OF_TEXT],
        "initial_alphabet": pre_tokenizers.ByteLevel.alphabet(),
        "show_progress": False,  # its bars leave empty lines where there is no terminal
    }
    tokenizer = Tokenizer(models.BPE() if kind == "bpe" else models.Unigram())
    trainer = trainers.BpeTrainer(**settings) if kind == "bpe" else trainers.UnigramTrainer(**settings)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    bar = tqdm(desc=f"{kind} tokenizer", unit="char", unit_scale=True, disable=not progress)
    with _parallel(), bar:
        tokenizer.train_from_iterator(_training_pieces(documents, bar.update), trainer)
    assert id_count(tokenizer) <= vocab_size
    return tokenizer


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a `tokenizer.json`, truncation and padding off; ValueError where it is unusable."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more specific
        raise ValueError(
            f"The tokenizer {path} could not be read ({error}): pass 'bpe', 'unigram' or the path of a "
            "tokenizer.json written by the `tokenizers` library."
        ) from None
    return _whole_texts(tokenizer)


def _whole_texts(tokenizer: Tokenizer) -> Tokenizer:
    """A published tokenizer may truncate to its model's length, which would drop text without a word. ValueError
    where it has nothing to separate documents by."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    end_of_text_id(tokenizer)
    return tokenizer


def end_of_text_id(tokenizer: Tokenizer) -> int:
    """The id that separates documents: <|endoftext|>, or what the tokenizer has in its place."""
    ids = end_of_text_ids(tokenizer)
    if ids:
        return ids[0]
    raise ValueError(
        f"The tokenizer has no token that separates documents: add one of {', '.join(END_OF_TEXT_NAMES)} to its "
        "special tokens."
    )


def id_count(tokenizer: Tokenizer) -> int:
    """One more than the largest id: the rows an embedding needs, even where ids leave gaps."""
    return int(max(tokenizer.get_vocab(with_added_tokens=True).values())) + 1


def encode_documents(tokenizer: Tokenizer, documents: Iterable[Document]) -> Iterator[tuple[Split, list[int], int]]:
    """The ids of each stretch of text, its split and its length in characters, in order.

    A document's last stretch ends with the separator. A separator written out in the text, as in the text
    files of TinyStories, is encoded as one too.
    """
    separator = end_of_text_id(tokenizer)
    for batch in _batched(documents):
        with _parallel():
            pieces = [piece for _, piece, _ in batch]
            encodings = tokenizer.encode_batch_fast(pieces, add_special_tokens=False)
        for (split, piece, last), encoding in zip(batch, encodings, strict=True):
            yield split, [*encoding.ids, separator] if last else encoding.ids, len(piece)


def _batched(documents: Iterable[Document]) -> Iterator[list[tuple[Split, str, bool]]]:
    """Lists of (split, piece, is it the document's last) of about 2 million characters."""
    batch: list[tuple[Split, str, bool]] = []
    size = 0
    for split, text in documents:
        pieces = list(split_text(text))
        for i, piece in enumerate(pieces):
            batch.append((split, piece, i == len(pieces) - 1))
            size += len(piece)
            if size >= _BATCH_CHARACTERS:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def split_text(text: str, size: int = _PIECE_CHARACTERS) -> Iterator[str]:
    """Cut a long text between words into pieces of at least `size` characters (the last may be shorter).

    Pieces are encoded in parallel, and a large file takes memory piece by piece. A word, or white space, without end is
    cut too: training a BPE takes time by the square of the longest word.
    """
    done = 0
    for endless in _ENDLESS.finditer(text):
        if done < endless.start():
            yield from _split_between_words(text[done : endless.start()], size)
        for start in range(endless.start(), endless.end(), _LONGEST_WORD):
            yield text[start : min(start + _LONGEST_WORD, endless.end())]
        done = endless.end()
    if done < len(text) or not text:
        yield from _split_between_words(text[done:], size)


def _split_between_words(text: str, size: int) -> Iterator[str]:
    start = 0
    while (cut := _BETWEEN_WORDS.search(text, start + size)) is not None:
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:]


def _training_pieces(documents: Iterable[Document], report: Callable[[int], object]) -> Iterator[str]:
    budget = _TRAINING_CHARACTERS
    for split, text in documents:
        if split != "train":
            continue
        for piece in split_text(text):
            yield piece
            report(len(piece))
            budget -= len(piece)
            if budget <= 0:
                return


@contextmanager
def _parallel() -> Iterator[None]:
    """Use every core now, and keep the library from warning, or hanging, when the process forks later.

    A forked process inherits the library's thread pool without its threads, so it must work alone.
    """
    if _PARALLELISM_OF_USER is not None:
        yield
        return
    os.environ[_PARALLELISM] = "true" if os.getpid() == _IMPORTED_BY else "false"
    try:
        yield
    finally:
        os.environ[_PARALLELISM] = "false"
