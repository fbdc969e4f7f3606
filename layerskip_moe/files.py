"""Writing a file so that a reader finds the old one or the new one, never half of either; the cache folder; digests;
values as JSON has them.

Knows nothing of what is written. Used by every room that writes.
"""

import hashlib
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any


def cache_folder(chosen: str | Path | None = None) -> Path:
    """Where what can be made again is kept: the argument, else $LAYERSKIP_MOE_CACHE, else the user's cache folder."""
    import platformdirs

    chosen = chosen or os.environ.get("LAYERSKIP_MOE_CACHE")
    return Path(chosen).expanduser() if chosen else platformdirs.user_cache_path("layerskip_moe")


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
