"""The facts of a run's checkpoint, which is all of it that is no tensor: whether they are a run's, and of the same one.

Knows nothing of files. Next: `run_state.py`, for the tensors; `run.py`, whose they are.
"""

import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from layerskip_moe.files import plain
from layerskip_moe.refusals import shown

# These may change on resume: nothing computed depends on them.
_FREE = ("log_every", "checkpoint_every", "max_skipped_steps", "activation_checkpointing", "expert_parallel")
_LARGEST_COUNT = 2**31 - 1  # the loss scaler keeps its own in 32 bits
_LEAST_SCALE = 2.0**-126  # and its scale in a float32


def check_same_run(saved: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Raise ValueError, naming what differs, unless a checkpoint's facts are of the same run as this one's: the same
    model_config, train_config (but for how often it logs and saves, and when it gives up), max_steps and text."""
    if not all(name in saved and is_one(saved[name]) for name, is_one in _FACTS.items()) or any(
        saved[part].keys() != here[part].keys() for part in ("model_config", "train_config")
    ):
        raise ValueError("the checkpoint to resume is not one of this version's training runs; start without resume.")
    for part in ("model_config", "train_config"):
        changed = [
            f"{name} was {shown(value)} and is now {shown(here[part][name])}"
            for name, value in saved[part].items()
            if name not in _FREE and plain(here[part][name]) != value
        ]
        if changed:
            raise ValueError(f"the run to resume had other settings: {'; '.join(changed)}; put them back.")
    if (saved["max_steps"], saved["text"]) != (here["max_steps"], here["text"]):
        raise ValueError("the run to resume was on another text; give it the same corpus and tokenizer again.")


def fingerprint(train: Tensor, validation: Tensor) -> list[int]:
    """Tells one text, given as its two splits' token ids, from another: lengths, and a checksum of both ends
    of the training split."""
    ends = torch.cat([train[:4096], train[-4096:]]).to(torch.int64)
    return [len(train), len(validation), zlib.crc32(ends.numpy().tobytes())]


def _is_object(value: Any, names: set[str] | None = None) -> bool:
    return isinstance(value, dict) and (names is None or value.keys() == names)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _LARGEST_COUNT  # and not True


def _is_number(value: Any, least: float = 0.0) -> bool:
    return type(value) is float and least <= value < math.inf


def _are_skips(value: Any) -> bool:
    return (
        _is_object(value, {"count", "in_a_row", "first"})
        and _is_count(value["count"])
        and _is_count(value["in_a_row"])
        and isinstance(value["first"], str)
    )


def _is_best(value: Any) -> bool:
    if value is None:
        return True
    return _is_object(value, {"loss", "step"}) and _is_number(value["loss"]) and _is_count(value["step"])


def _is_scaler(value: Any) -> bool:
    """Of a GradScaler, which has nothing to keep where it is not enabled."""
    counts, numbers = {"growth_interval", "_growth_tracker"}, {"scale", "growth_factor", "backoff_factor"}
    return value == {} or (
        _is_object(value, counts | numbers)
        and all(_is_count(value[name]) for name in counts)
        and all(_is_number(value[name], least=_LEAST_SCALE) for name in numbers)
    )


# What each fact has to be, so that all can be compared and restored.
_FACTS: dict[str, Callable[[Any], bool]] = {
    "model_config": _is_object,
    "train_config": _is_object,
    "max_steps": _is_count,
    "text": lambda value: isinstance(value, list),
    "scaler": _is_scaler,
    "best": _is_best,
    "skips": _are_skips,
    "seconds": _is_number,
}
