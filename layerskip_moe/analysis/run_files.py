"""The files of a run's folder: reading what training logged, writing without leaving halves.

Knows nothing of what the records mean. Next: `training/`, which writes metrics.jsonl; `report.py`.
"""

import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, in order: one dict per line, told apart by its "split".

    A last line without its end is being written, or was cut off with the run: it is left out, with a warning.
    Raises ValueError for a file that is not there and for a line that is not a JSON object.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"There is no metrics file '{path}'; give the metrics.jsonl in the out_dir of a training run.")
    records = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                record = None
            if isinstance(record, dict):
                records.append(record)
            elif line.endswith("\n"):
                raise ValueError(f"Line {number} of '{path}' is not a JSON object; mend or remove it.")
            else:
                warnings.warn(f"The last line of '{path}' is incomplete and is left out.", stacklevel=2)
    return records


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to. It takes `path`'s place when the block ends, and is removed if it fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield beside
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
