"""A run's result.json and decoding.json: what they hold, and reading them, where anyone may have edited or cut them.

    result.json     what `runs.train_run` measured, under "setting" all that it depends on
    decoding.json   what `runs.time_run` timed, and on which machine

Knows nothing of how anything was measured. Next: `runs.py`, which writes them; `summary.py`, which compares.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from layerskip_moe.ablation.measure import MeasureConfig
from layerskip_moe.ablation.timing import DecodingConfig
from layerskip_moe.files import plain
from layerskip_moe.nn import ModelConfig
from layerskip_moe.refusals import shortened, shown
from layerskip_moe.training import TrainConfig

RESULT, DECODING = "result.json", "decoding.json"
_MOST_BYTES = 2**24  # of either; they have some thousands
_KINDS: dict[str, type] = {
    "network": ModelConfig,
    "recipe": TrainConfig,
    "measures": MeasureConfig,
    "decoding": DecodingConfig,
}

# What they hold, as far as it is used: {name: of which form}, [of which form each], or types.
_NUMBER, _IF_KNOWN = (int, float), (int, float, type(None))
_RUN = {
    "variant": str,
    "changes": {"network": dict, "recipe": dict},
    "seed": int,
    "parameters": int,
    "active_parameters": int,
    "failed": (str, type(None)),
}
_MEASURED = {
    "steps": int,
    "tokens": int,
    "training_seconds": _NUMBER,
    "measuring_seconds": _NUMBER,
    "exits": {"perplexity": [_IF_KNOWN], "agreement": [_IF_KNOWN]},
    "union": {"spans": [int], "over_top_k": [_IF_KNOWN], "independent": [_IF_KNOWN]},
}
_SPEEDS = ("speed_up", "acceptance_rate", "tokens_per_second", "plain_tokens_per_second", "distinct_4grams")
_MACHINE = {  # what speeds are compared on
    **{name: str for name in ("cpu", "device")},
    **{name: int for name in ("cores", "torch_threads")},
    "accelerator": (str, type(None)),
    "versions": {"torch": str},
}
_TIMED = {"machine": _MACHINE, "decoding": [{"temperature": _NUMBER, **{name: _IF_KNOWN for name in _SPEEDS}}]}


def read_result(path: Path, setting: Mapping[str, Any]) -> dict[str, Any] | None:
    """A result.json; None where there is none. ValueError where it is damaged or of other settings."""
    found = _read(path, setting)
    if found is not None:
        _check_form(path, found, _RUN if found.get("failed") else {**_RUN, **_MEASURED})
        if not found["failed"]:
            exits, union = found["exits"], found["union"]
            lists = {len(union[name]) for name in ("over_top_k", "independent")}
            if not 0 < len(exits["perplexity"]) == len(exits["agreement"]) or not lists <= {0, len(union["spans"])}:
                raise _damaged(path, "its lists are not of one length")
    return found


def read_timing(path: Path, setting: Mapping[str, Any]) -> dict[str, Any] | None:
    """The same of a decoding.json."""
    found = _read(path, setting)
    if found is not None:
        _check_form(path, found, _TIMED)
    return found


def check_machine(path: Path, here: Mapping[str, Any]) -> None:
    """Raise ValueError where a decoding.json is of another machine than this one, by `describe_machine`, or damaged."""
    found = _parsed(path)
    _check_form(path, found, {"machine": _MACHINE})
    one, other = ({**of, "torch": of["versions"]["torch"]} for of in (found["machine"], here))
    names = [name for name in (*_MACHINE, "torch") if name != "versions" and one[name] != other[name]]
    if names:
        raise ValueError(
            f"{path} was timed elsewhere{_difference({n: one[n] for n in names}, {n: other[n] for n in names})}; time "
            f"all runs of a folder on one machine, or remove its {DECODING} files, and all are timed again."
        )


def read_run(path: Path) -> tuple[dict[str, Any], int]:
    """What a result.json says that was changed, and its seed; ValueError where it is damaged."""
    found = _parsed(path)
    _check_form(path, found, _RUN)
    return found["changes"], found["seed"]


def decoding_setting(decoding: DecodingConfig) -> dict[str, Any]:
    """What a timing depends on, beside the model and the machine."""
    return as_json({"decoding": asdict(decoding)})


def as_json(value: Any) -> Any:
    """The value as it is read back from a file."""
    return json.loads(json.dumps(plain(value), allow_nan=False))


def _read(path: Path, setting: Mapping[str, Any]) -> dict[str, Any] | None:
    """A file of these settings. A field that came to a config after it was written counts as its default, which is
    put in."""
    if not path.exists():
        return None
    found = _parsed(path)
    parts = {part: dict if isinstance(values, dict) else object for part, values in setting.items()}
    _check_form(path, found, {"setting": parts})
    try:
        saved = {part: _complete(part, found["setting"][part]) for part in setting}
    except (ValueError, TypeError) as error:
        raise _damaged(path, str(error)) from None
    for part, values in setting.items():
        if saved[part] != values:
            raise ValueError(
                f"{path} is of another {part}{_difference(saved[part], values)}; "
                "give the same settings again, or another out_dir."
            )
    return found | {"setting": saved}


def _parsed(path: Path) -> Any:
    if path.stat().st_size > _MOST_BYTES:
        raise _damaged(path, f"it has {path.stat().st_size} bytes, far more than one has")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # malformed, bytes that are no text, or brackets without end
        raise _damaged(path, str(error)) from None


def _check_form(path: Path, value: Any, form: Any, at: str = "") -> None:
    """Raise ValueError, naming the place, for a value that is not of this form."""
    if isinstance(form, dict):
        _check_form(path, value, dict, at)
        for name, of in form.items():
            if name not in value:
                raise _damaged(path, f"it lacks {at}{name}")
            _check_form(path, value[name], of, f"{at}{name}.")
    elif isinstance(form, list):
        _check_form(path, value, list, at)
        for number, one in enumerate(value):
            _check_form(path, one, form[0], f"{at}{number}.")
    else:
        number = isinstance(value, bool | int | float)
        if not isinstance(value, form) or (number and form is not object and not _is_number(value)):
            raise _damaged(path, f"its {at.rstrip('.') or 'whole'} is {shown(value)}")


def _is_number(value: float) -> bool:
    """Whether it can be computed with: no truth value, not NaN, and not past a float."""
    return not isinstance(value, bool) and -1e308 < value < 1e308


def _damaged(path: Path, why: str) -> ValueError:
    return ValueError(f"{path} is damaged ({shortened(why).rstrip('.')}); remove it, and the run is made again.")


def _complete(part: str, values: Any) -> Any:
    """The saved values with the defaults of the fields that they lack."""
    return as_json(asdict(_KINDS[part](**values))) if part in _KINDS else values


def _difference(saved: Any, now: Any) -> str:
    if not isinstance(now, dict):
        return ""
    changed = [name for name in now if saved.get(name) != now[name]]
    told = [f"{name} was {shown(saved.get(name))} and is now {shown(now[name])}" for name in changed]
    return f" ({', '.join(told)})"
