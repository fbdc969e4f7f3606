"""The file that holds calibrated thresholds for early exit, the settings they were calibrated under, and what they are
certified for.

    {"early_exit": {"threshold": 0.8, or one for each of layers 1..L-1, "confidence": "softmax_diff", "min_layer": 1,
                    "decay": false, "cache": "propagate", "tau": 4.0, "classifier": null},
     "certified": {"weights": digest, "max_new_tokens": 64, "temperature": 0.0, "repetition_penalty": 1.0},
     "calibration": {what was promised, of how many sequences, ...: for people}}

With confidence "classifier", its probes are in a file beside this one: {"file": name, "sha256": digest}.
Knows nothing of how a threshold is found. Next: `early_exit.py`, which reads it; `analysis/calibrate.py`, which finds.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerskip_moe.files import plain, replacing, sha256
from layerskip_moe.generation.exit_classifier import ExitClassifier, load_classifier
from layerskip_moe.generation.session import Session
from layerskip_moe.nn.fingerprint import model_fingerprint
from layerskip_moe.refusals import shown

_MOST_BYTES = 2**24  # of a file that is read

# What a file states in its two parts that are read, and of what kind each value is.
FIELDS: dict[str, type | tuple[type, ...]] = {
    "threshold": (int, float, list),
    "confidence": str,
    "min_layer": int,
    "decay": bool,
    "cache": str,
    "tau": (int, float),
    "classifier": (dict, type(None)),
}
CERTIFIED: dict[str, type | tuple[type, ...]] = {
    "weights": str,
    "max_new_tokens": int,
    "temperature": (int, float),
    "repetition_penalty": (int, float),
}


@dataclass(frozen=True)
class Certified:
    """What a calibration was made for. Of anything else it promises nothing.

    Attributes:
        weights: `model_fingerprint` of the model
        max_new_tokens: new tokens of a text, at most; with decay, exactly, because thresholds follow their number
        temperature: of sampling; 0 is greedy
        repetition_penalty: of sampling; 1 is none
    """

    weights: str
    max_new_tokens: int
    temperature: float = 0.0
    repetition_penalty: float = 1.0

    def check(self, session: Session, *, decay: bool) -> None:
        """Raise ValueError for a session that it does not hold for. decay: `EarlyExit.decay`."""
        most, asked = self.max_new_tokens, session.max_new_tokens
        if asked > most or (decay and asked != most):
            held = f"exactly {most} new tokens, with which its thresholds decay" if decay else f"{most} new tokens"
            raise ValueError(f"early exit was calibrated for {held}, not {asked}; ask for {most}, or calibrate again.")
        for name in ("temperature", "repetition_penalty"):
            if getattr(session.sampling, name) != getattr(self, name):
                raise ValueError(
                    f"early exit was calibrated at {name}={getattr(self, name)}, and promises nothing at "
                    f"{getattr(session.sampling, name)}; leave {name} as it was."
                )
        if model_fingerprint(session.model) != self.weights:
            raise ValueError(
                "early exit was calibrated for another model's weights, or for these in another type; calibrate again, "
                "for this model."
            )


def read_calibration(path: str | Path) -> tuple[dict[str, Any], Certified]:
    """The arguments of `EarlyExit` in a calibration's JSON, and what they are certified for; what else it holds is for
    people. Raises ValueError for a file that is missing or of another form, and for probes that are not those it was
    calibrated with."""
    path = Path(path)
    if not os.path.isfile(path):  # (which raises nothing, as `Path.is_file` does for a name that is too long)
        raise ValueError(
            f"There is no calibration file {shown(str(path))}; give a number between 0 and 1, or the JSON's path."
        )
    if path.stat().st_size > _MOST_BYTES:
        raise ValueError(f"'{path}' has {path.stat().st_size} bytes, far more than a calibration; give its JSON.")
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # malformed JSON, bytes that are no text, or brackets without end
        raise ValueError(f"'{path}' is not JSON ({error}); write it again.") from None
    settings = _part(told, "early_exit", FIELDS, path)
    certified = Certified(**_part(told, "certified", CERTIFIED, path))
    probes = settings.pop("classifier")
    if (settings["confidence"] == "classifier") != (probes is not None):
        raise ValueError(f"'{path}' must name a classifier's file if, and only if, its confidence is 'classifier'.")
    if probes is not None:
        settings["confidence"] = _read_probes(probes, path)
    return settings, certified


def write_calibration(
    path: str | Path, settings: Mapping[str, Any], certified: Certified, told: Mapping[str, Any]
) -> None:
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
        raise ValueError(
            f"confidence={shown(confidence)} is a function, which no file can hold; use the strategy itself."
        )
    early_exit = {**settings, "confidence": confidence, "classifier": probes}
    assert early_exit.keys() == FIELDS.keys(), "read_calibration refuses others"
    with replacing(path) as beside:
        contents = plain({"early_exit": early_exit, "certified": certified, "calibration": told})
        beside.write_text(json.dumps(contents, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _part(told: Any, part: str, fields: Mapping[str, type | tuple[type, ...]], path: Path) -> dict[str, Any]:
    """A part of the JSON, each of its values of the right kind."""
    values = told.get(part) if isinstance(told, dict) else None
    if not isinstance(values, dict) or values.keys() != fields.keys():
        raise ValueError(f"'{path}' is no calibration: its \"{part}\" must state {', '.join(fields)}.")
    for name, kind in fields.items():
        value = values[name]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(f"'{path}' has {name}={shown(value)}, which is not of the right kind.")
    return values


def _read_probes(named: dict[str, Any], path: Path) -> ExitClassifier:
    """The classifier that the JSON at `path` names."""
    if named.keys() != {"file", "sha256"} or not isinstance(named["file"], str):
        raise ValueError(f"'{path}' names a classifier by {shown(named)}; it must state its file and sha256.")
    if named["file"] != Path(named["file"]).name or "\\" in named["file"] or "\0" in named["file"]:
        raise ValueError(
            f"'{path}' names the classifier {shown(named['file'])}, which is not a file of its own folder."
        )
    file = path.parent / named["file"]
    if not file.is_file():
        raise ValueError(f"'{path}' needs the classifier '{file}', which is not there; copy both files, or calibrate.")
    if sha256(file) != named["sha256"]:
        raise ValueError(f"'{file}' is not the classifier that '{path}' was calibrated with; calibrate again.")
    return load_classifier(file)
