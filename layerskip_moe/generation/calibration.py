"""The file that holds a calibrated threshold for early exit, and the settings it was calibrated under.

Knows nothing of how a threshold is found. Next: `early_exit.py`, which reads it.
"""

import json
from pathlib import Path
from typing import Any

# What a file states, and of what kind each value is.
FIELDS: dict[str, type | tuple[type, ...]] = {
    "threshold": (int, float),
    "confidence": str,
    "min_layer": int,
    "decay": bool,
    "cache": str,
}


def read_calibration(path: str | Path) -> dict[str, Any]:
    """The arguments of `EarlyExit` in a calibration's JSON, {"early_exit": {"threshold": 0.8, "confidence": ...}};
    what else it holds is for people. Raises ValueError for a file that is missing or of another form."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"There is no calibration file '{path}'; give a number between 0 and 1, or the JSON's path.")
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"'{path}' is not JSON ({error}); write it again.") from None
    settings = told.get("early_exit") if isinstance(told, dict) else None
    if not isinstance(settings, dict) or settings.keys() != FIELDS.keys():
        raise ValueError(f"'{path}' is no calibration: its \"early_exit\" must state {', '.join(FIELDS)}.")
    for name, kind in FIELDS.items():
        value = settings[name]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(f"'{path}' has {name}={value!r}, which is not of the right kind.")
    return settings
