"""Writing a file or a folder so that a reader finds the old one or the new one, never half of either, and saying why it
could not be written; the cache folder; digests; values as JSON has them.

Knows nothing of what is written. Used by every room that writes.
"""

import errno
import hashlib
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any


def cache_folder(chosen: str | Path | None = None) -> Path:
    """Where what can be made again is kept: the argument, else $LAYERSKIP_MOE_CACHE, else the user's cache folder."""
    import platformdirs

    chosen = chosen or os.environ.get("LAYERSKIP_MOE_CACHE")
    return expanded(chosen) if chosen else platformdirs.user_cache_path("layerskip_moe")


def expanded(path: str | Path) -> Path:
    """The path, with the home folder for a ~ that it begins with; that of an unknown user stays, and is not found.
    (`Path.expanduser` raises RuntimeError for it.)"""
    return Path(os.path.expanduser(path))


@contextmanager
def making_folder(folder: Path) -> Iterator[None]:
    """Make a folder and those above it, if need be; what was made is removed if the block fails and leaves it empty."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        with suppress(OSError):  # something is in it, which is not ours to remove
            for path in made:
                path.rmdir()
        raise


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to. It takes `path`'s place when the block ends, and is removed if it fails, as
    are the folders that were made for it.

    What was written is on the disk before it takes the place, so that a crash of the machine leaves no husk.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with making_folder(path.parent):
        try:
            yield beside
            with open(beside, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """The same for a folder: a new, empty one beside `path` to write files to, and nothing in it that starts with a
    dot. What `path` was before is removed once the new folder has its place, and put back if it never gets there.

    A process that is killed meanwhile leaves folders behind whose names are a dot, path's name, and more. Between the
    two renames it leaves none of path's name: `set_aside` finds what was there.
    """
    beside, before = (path.with_name(f".{path.name}.{os.getpid()}.{kind}") for kind in ("tmp", "old"))
    with making_folder(path.parent):
        try:
            shutil.rmtree(beside, ignore_errors=True)  # of a process that was killed and had our number
            beside.mkdir()
            yield beside
            for file in beside.iterdir():
                _to_disk(file)
            _to_disk(beside)
            if path.exists():
                shutil.rmtree(before, ignore_errors=True)  # likewise
                os.replace(path, before)  # the one name cannot be given to two folders, not even for a moment
            os.replace(beside, path)
            _to_disk(path.parent)
        finally:
            if before.exists() and not path.exists():  # stopped between the two renames
                os.replace(before, path)
            for folder in (beside, before):
                shutil.rmtree(folder, ignore_errors=True)


def set_aside(folder: Path) -> dict[Path, Path]:
    """Folders within this one that `replacing_folder` had moved away when its process was killed: the path of each,
    which is nobody's now, and where it is. They are whole: what is being removed has another at its path."""
    found = {}
    for before in folder.glob(".*.old"):
        path = folder / before.name[1:].rsplit(".", 2)[0]
        if before.is_dir() and not path.exists():
            found[path] = before
    return found


def _to_disk(path: Path) -> None:
    """Wait until a file, or the list of what is in a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if path.is_file():
            raise  # else the file system has no such thing for folders
    finally:
        os.close(descriptor)


@contextmanager
def explaining_failure(what: str, folder: Path) -> Iterator[None]:
    """Raise the OSError of a full disk, or of a folder that we may not write to, with a sentence that says what it kept
    from being written, where to, and what to do; another error stays as it is."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            sentence = f"there is no room for {what} in {folder}{_free(folder)}; make room, or take another folder"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            sentence = f"{what} cannot be written, for {folder} is read-only for this user; take another folder"
        else:
            raise
        raise type(error)(error.errno, sentence) from error


def _free(folder: Path) -> str:
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    with suppress(OSError):
        return f", where {shutil.disk_usage(there).free / 1e6:.1f} MB are free"
    return ""


def sha256(path: Path) -> str:
    """The digest of a file's bytes, as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def plain(value: Any) -> Any:
    """The value ready for `json.dumps`, at any depth: dataclasses as dicts, tuples as lists, paths as texts, and
    None for numbers that JSON does not have (inf, nan), which Python would write as Infinity and NaN."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
