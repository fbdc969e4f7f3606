"""Writing a file so that a reader finds the old one or the new one, never half of either.

Knows nothing of what is written. Used by every room that writes.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to. It takes `path`'s place when the block ends, and is removed if it fails.

    What was written is on the disk before it takes the place, so that a crash of the machine leaves no husk.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield beside
        with open(beside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
