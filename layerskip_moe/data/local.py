"""Text on this machine: the interpreter's standard library, a file, or a folder.

Local text is held in memory whole, so that a sample is exact and the cache can be keyed by the content
itself. Knows nothing of tokens. For text that does not fit in memory see `hub.py`, which streams.
"""

import hashlib
import json
import os
import random
import sysconfig
from collections.abc import Callable, Set
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from layerskip_moe.data.source import Document, Source
from layerskip_moe.refusals import shortened

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

VALIDATION_SHARE = 0.05
TEXT_SUFFIXES = (".txt", ".md", ".py")
SUFFIXES = (*TEXT_SUFFIXES, ".jsonl", ".parquet")

# Of parquet, a few bytes of which may stand for terabytes: what texts may take unpacked, in bytes, or times the file's
# size; what a row takes beside its text; and how many rows are unpacked before that is looked at again.
_UNPACKED, _TIMES_UNPACKED, _BESIDE_A_TEXT, _ROWS_AT_A_TIME = 2**28, 100, 64, 1024

_STDLIB_SKIPPED_FOLDERS = {
    *("test", "tests", "idle_test", "site-packages", "dist-packages"),
    *("encodings", "pydoc_data"),  # generated: one table per codec, the help texts as one literal
}
_STDLIB_GENERATED_FILES = {"html/entities.py", "re/_casefix.py", "stringprep.py"}


def stdlib_source(sample_fraction: float, seed: int) -> Source:
    """The *.py files of the running interpreter's standard library, about 9 MB.

    Left out: tests, installed packages, and generated tables. Split by a hash of the file's name relative
    to the library. Raises ValueError where the interpreter ships no source files.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    found = _visible_files(root, (".py",), _STDLIB_SKIPPED_FOLDERS)
    paths = [path for path in found if not _is_generated(path.relative_to(root))]
    if not paths:
        raise ValueError(
            f"'python-stdlib' found no .py files in {root}: this interpreter has no library source, so pass "
            "a text file or a folder instead."
        )
    return _source("python-stdlib", _read_folder(root, paths), sample_fraction, seed)


def path_source(path: Path, sample_fraction: float, seed: int) -> Source:
    """One file, or every supported file below a folder (hidden ones excepted); suffixes: `SUFFIXES`.

    .txt, .md, .py: one document per file. .jsonl: one per line, its `text`. .parquet: one per row of the
    column `text`. A folder is split by a hash of each file's relative name; a single file keeps the last 5%
    of its documents for validation, or of its characters where it is one document.
    Raises ValueError for a missing path, an unsupported suffix, undecodable bytes, a line without `text`, a parquet
    file whose texts would take far more than it, and for too little text.
    """
    if os.path.isdir(path):  # (which raises nothing, as `Path.is_dir` does for a name that is too long)
        paths = _visible_files(path, SUFFIXES)
        if not paths:
            raise ValueError(f"The folder {path} holds no {_listed(SUFFIXES)} file: name another folder.")
        documents = _read_folder(path, paths)
    elif os.path.isfile(path):
        if path.suffix.lower() not in SUFFIXES:
            raise ValueError(
                f"{path} ends in '{path.suffix}', which cannot be read: convert it to {_listed(SUFFIXES)}."
            )
        documents = _hold_back_tail(_read_file(path))
    else:
        raise ValueError(f"There is no file or folder {shortened(str(path.absolute()))}: check the path.")
    if not documents:
        raise ValueError(f"{path} is empty: it must hold some text to train on.")
    return _source(path.resolve().name, documents, sample_fraction, seed)


def read_documents(path: Path) -> list[str]:
    """The documents of a file, or of every supported file below a folder, as `path_source` tells them apart; a file of
    any other suffix is one text. Raises ValueError for what cannot be read, and where there is none."""
    files = _visible_files(path, SUFFIXES) if path.is_dir() else [path]
    documents = [text for file in files for text in _read_file(file)]
    if not documents:
        raise ValueError(f"{path} holds no text: name a file, or a folder of {_listed(SUFFIXES)} files.")
    return documents


def _source(name: str, documents: list[Document], sample_fraction: float, seed: int) -> Source:
    documents = _sample(documents, sample_fraction, seed)
    digest = hashlib.sha256()
    for split, text in documents:
        data = text.encode()
        digest.update(f"{split} {len(data)}\n".encode())
        digest.update(data)
    return Source(name, digest.hexdigest(), lambda: iter(documents), sum(len(text) for _, text in documents))


def _sample(documents: list[Document], fraction: float, seed: int) -> list[Document]:
    """Random training documents that together hold `fraction` of the characters, the last one cut to fit.

    Validation stays whole, so that samples of different sizes are judged on the same text.
    """
    if fraction == 1:
        return documents
    train = [i for i, document in enumerate(documents) if document.split == "train"]
    random.Random(seed).shuffle(train)
    budget = ceil(fraction * sum(len(documents[i].text) for i in train))
    kept: dict[int, Document] = {}
    for i in train:
        text = documents[i].text[:budget]
        budget -= len(text)
        if text:
            kept[i] = Document("train", text)
    return [
        kept.get(i, document) for i, document in enumerate(documents) if i in kept or document.split == "validation"
    ]


def _visible_files(root: Path, suffixes: tuple[str, ...], skipped_folders: Set[str] = frozenset()) -> list[Path]:
    """Files with these suffixes below `root`, in the order of their relative names; hidden ones left out."""
    paths = []
    # onerror: os.walk passes over an unreadable folder without a word unless told otherwise.
    for folder, subfolders, files in os.walk(root, onerror=_refuse):
        # Pruned in place, which os.walk heeds: site-packages alone may hold fifty thousand files.
        subfolders[:] = [name for name in subfolders if name[0] != "." and name not in skipped_folders]
        paths += [Path(folder, name) for name in files if name[0] != "." and _suffix(name) in suffixes]
    return sorted(paths, key=lambda path: path.relative_to(root).as_posix())


def _refuse(error: OSError) -> NoReturn:
    raise ValueError(
        f"{error.filename} cannot be read ({error.strerror}): change its permissions or leave it out."
    ) from None


def _is_generated(name: Path) -> bool:
    return name.as_posix() in _STDLIB_GENERATED_FILES or name.name.startswith("_sysconfigdata")


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _read_folder(root: Path, paths: list[Path]) -> list[Document]:
    """Every file's documents, a whole file in one split by a hash of its name, neither split left empty."""
    texts = {path: _read_file(path) for path in paths}
    filled = [path for path in paths if texts[path]]
    if len(filled) < 2:
        return _hold_back_tail([text for path in filled for text in texts[path]])
    by_hash = sorted(filled, key=lambda path: _name_hash(path.relative_to(root)))
    held_back = {path for path in filled if _name_hash(path.relative_to(root)) < VALIDATION_SHARE}
    held_back = (held_back | {by_hash[0]}) - {by_hash[-1]}
    return [Document("validation" if path in held_back else "train", text) for path in filled for text in texts[path]]


def _name_hash(name: Path) -> float:
    """A number in [0, 1) that is the same on every machine, unlike `hash`."""
    digest = hashlib.sha256(name.as_posix().encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _hold_back_tail(texts: list[str]) -> list[Document]:
    """The last 5% for validation: of the documents, or of the characters where there is one document."""
    if len(texts) == 1:
        cut = int(len(texts[0]) * (1 - VALIDATION_SHARE))
        texts, first_held_back = [texts[0][:cut], texts[0][cut:]], 1
    else:
        first_held_back = min(len(texts) - 1, int(len(texts) * (1 - VALIDATION_SHARE)))
    return [
        Document("train" if i < first_held_back else "validation", text) for i, text in enumerate(texts) if text.strip()
    ]


def _read_file(path: Path) -> list[str]:
    """The documents of one file, those of white space alone left out."""
    readers: dict[str, Callable[[Path], list[str]]] = {".jsonl": _read_jsonl, ".parquet": _read_parquet}
    read = readers.get(path.suffix.lower(), _read_text)
    return [text for text in read(path) if text.strip()]


def _read_text(path: Path) -> list[str]:
    # Bytes, not text mode: line ends stay as they are, and the offset of a bad byte is the file's own.
    try:
        data = path.read_bytes()
    except OSError as error:
        _refuse(error)
    try:
        return [data.decode().removeprefix("\ufeff")]
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 (byte {data[error.start]:#04x} at offset {error.start}): convert the file "
            "to UTF-8, for instance with iconv, or leave it out."
        ) from None


def _read_jsonl(path: Path) -> list[str]:
    texts = []
    # split("\n"), not splitlines: JSON strings may hold U+2028 and other ends of line unescaped.
    for number, line in enumerate(_read_text(path)[0].split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:  # the latter for brackets without end
            at = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
            raise ValueError(
                f'{path}, line {number} is not JSON ({at}): each line must be an object such as {{"text": "..."}}.'
            ) from None
        text = record.get("text") if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise ValueError(
                f'{path}, line {number} has no string field "text": each line must be an object such as '
                '{"text": "..."}.'
            )
        if not _encodable(text):
            raise ValueError(
                f'{path}, line {number} escapes half of a surrogate pair in "text", which is no character: '
                "repair or remove that line."
            )
        texts.append(text)
    return texts


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_parquet(path: Path) -> list[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(path)
        kind = schema.types[schema.names.index("text")] if "text" in schema.names else None
        if kind is None or not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            found = ", ".join(f"{name} ({of})" for name, of in zip(schema.names, schema.types, strict=True))
            raise ValueError(
                f'{path} needs a column "text" of strings, but its columns are {shortened(found)}: rename one.'
            )
        # As a dictionary: what is in many rows is unpacked only once, until it is known how much all of it is.
        return _unpacked(pq.ParquetFile(path, read_dictionary=["text"]), path)
    except (pa.ArrowException, OSError) as error:
        reason = shortened(str(error).split("\n")[0].rstrip("."))
        raise ValueError(f"{path} cannot be read as parquet ({reason}): write the file again.") from None
    except UnicodeDecodeError as error:
        raise ValueError(
            f'{path} has a "text" that is not UTF-8 (byte {error.start} of it): write the file again.'
        ) from None


def _unpacked(file: "ParquetFile", path: Path) -> list[str]:
    """The texts of a parquet file; ValueError where they are far more than a text packs to, as its metadata say before
    anything is read, or as it turns out."""
    import pyarrow.compute as pc

    most = max(_UNPACKED, _TIMES_UNPACKED * path.stat().st_size)
    refusal = ValueError(
        f"{path} is of {path.stat().st_size} bytes, but its texts would take more than {most}, which no text packs to: "
        "write the file again, or as .jsonl."
    )
    groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
    chunks = [group.column(number) for group in groups for number in range(group.num_columns)]
    claimed = sum(max(chunk.total_uncompressed_size, 0) for chunk in chunks if chunk.path_in_schema == "text")
    if claimed + _BESIDE_A_TEXT * file.metadata.num_rows > most:
        raise refusal
    texts, total = [], 0
    for batch in file.iter_batches(_ROWS_AT_A_TIME, columns=["text"]):
        column = batch.column(0)
        lengths = pc.binary_length(column.dictionary).take(column.indices)
        total += _BESIDE_A_TEXT * len(column) + (pc.sum(lengths).as_py() or 0)
        if total > most:
            raise refusal
        texts += column.dictionary_decode().drop_null().to_pylist()
    return texts


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names[:-1]) + " or " + names[-1]
