"""The file that holds calibrated thresholds for early exit, and the settings they were calibrated under.

    {"early_exit": {"threshold": 0.8, or one for each of layers 1..L-1, "confidence": "softmax_diff", "min_layer": 1,
                    "decay": false, "cache": "propagate", "tau": 4.0, "classifier": null},
     "calibration": {what was promised, of how many sequences, ...: for people}}

With confidence "classifier", its probes are in a file beside this one: {"file": name, "sha256": digest}.
Knows nothing of how a threshold is found. Next: `early_exit.py`, which reads it; `analysis/calibrate.py`, which finds.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from layerskip_moe.files import plain, replacing, sha256
from layerskip_moe.generation.exit_classifier import ExitClassifier, load_classifier

# What a file states, and of what kind each value is.
FIELDS: dict[str, type | tuple[type, ...]] = {
    "threshold": (int, float, list),
    "confidence": str,
    "min_layer": int,
    "decay": bool,
    "cache": str,
    "tau": (int, float),
    "classifier": (dict, type(None)),
}


def read_calibration(path: str | Path) -> dict[str, Any]:
    """The arguments of `EarlyExit` in a calibration's JSON; what else it holds is for people. Raises ValueError for a
    file that is missing or of another form, and for probes that are not those it was calibrated with."""
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
    probes = settings.pop("classifier")
    if (settings["confidence"] == "classifier") != (probes is not None):
        raise ValueError(f"'{path}' must name a classifier's file if, and only if, its confidence is 'classifier'.")
    if probes is not None:
        settings["confidence"] = _read_probes(probes, path)
    return settings


def write_calibration(path: str | Path, settings: Mapping[str, Any], told: Mapping[str, Any]) -> None:
    """Write what `read_calibration` reads. settings: by `EarlyExit`'s names; told: plain values, for people.

    An `ExitClassifier` goes to a file of the same name beside it, with .safetensors for .json. Raises ValueError for
    a confidence that is a function.
    """
    path, probes, confidence = Path(path), None, settings["confidence"]
    if isinstance(confidence, ExitClassifier):
        file = path.with_suffix(".safetensors")
        confidence.save(file)
        confidence, probes = "classifier", {"file": file.name, "sha256": sha256(file)}
    elif not isinstance(confidence, str):
        raise ValueError(f"confidence={confidence!r} is a function, which no file can hold; use the strategy itself.")
    early_exit = {**settings, "confidence": confidence, "classifier": probes}
    assert early_exit.keys() == FIELDS.keys(), "read_calibration refuses others"
    with replacing(path) as beside:
        contents = json.dumps(plain({"early_exit": early_exit, "calibration": told}), indent=2, allow_nan=False)
        beside.write_text(contents + "\n", encoding="utf-8")


def _read_probes(named: dict[str, Any], path: Path) -> ExitClassifier:
    """The classifier that the JSON at `path` names."""
    if named.keys() != {"file", "sha256"} or not isinstance(named["file"], str):
        raise ValueError(f"'{path}' names a classifier by {named!r}; it must state its file and sha256.")
    file = path.parent / named["file"]
    if not file.is_file():
        raise ValueError(f"'{path}' needs the classifier '{file}', which is not there; copy both files, or calibrate.")
    if sha256(file) != named["sha256"]:
        raise ValueError(f"'{file}' is not the classifier that '{path}' was calibrated with; calibrate again.")
    return load_classifier(file)
