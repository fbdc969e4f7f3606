"""Reading what training logged.

Knows nothing of what the records mean. Next: `training/`, which writes metrics.jsonl; `report.py`.
"""

import json
import warnings
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
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line.decode())
            except (ValueError, RecursionError):  # the latter for brackets without end
                record = None
            if isinstance(record, dict):
                records.append(record)
            elif line.endswith(b"\n"):
                raise ValueError(f"Line {number} of '{path}' is not a JSON object; mend or remove it.")
            else:
                warnings.warn(f"The last line of '{path}' is incomplete and is left out.", stacklevel=2)
    return records
