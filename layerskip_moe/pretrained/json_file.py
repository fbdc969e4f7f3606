"""Reading and writing the JSON files of a checkpoint.

Knows nothing of what they mean. Next: whoever does, such as `record.py`.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_MOST_BYTES = 2**28  # a hundred times the index of the largest models


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError, naming the file, where it is not one, or too large to be."""
    if path.stat().st_size > _MOST_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, far more than such a file; copy it again.")
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # malformed JSON, bytes that are no text, or brackets without end
        raise ValueError(f"{path} is not JSON ({error}); copy it again from where the model was saved.") from None
    if not isinstance(contents, dict):
        raise ValueError(f"{path} holds no JSON object; copy it again from where the model was saved.")
    return contents


def write_json(path: Path, contents: Mapping[str, Any]) -> None:
    """Write an object to a JSON file, a field a line."""
    path.write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")
