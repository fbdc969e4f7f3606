"""Checkpoints on disk: all that a stopped run needs to go on, whole or not at all, and found out when damaged.

    <out_dir>/checkpoints/step-00000200/    after 200 steps; the newest two are kept
        tensors-00000.safetensors           see `tensor_files.py`
        state.json                          everything else, and the size and sha256 of the other file

A folder is written beside, read back, and renamed; only then are older ones removed. Nothing in a file is executed.
Random state is in none: batches and dropout are functions of the step. (The model other people load is
`save_pretrained`'s; this is the run's own.)

Knows nothing of what the tensors are. Next: `run_state.py`, which does; `run_folder.py`, for the folder around it.
"""

import hashlib
import json
import re
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from layerskip_moe.files import explaining_failure, replacing_folder, sha256
from layerskip_moe.training.tensor_files import Shapes, list_tensors, write_tensors

CHECKPOINTS, STATE, TENSORS = "checkpoints", "state.json", "tensors-00000.safetensors"
_FORMAT = 1
_KEPT = 2
_LARGEST_STATE = 2**26  # bytes; a state.json has some thousands
_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint: its folder, what its state.json says ("step" among it), and what tensors it holds."""

    path: Path
    facts: dict[str, Any]
    tensors: Shapes


class _DamageError(Exception):
    """What is wrong with a folder, in a few words."""


def save_checkpoint(out_dir: Path, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    """Write a checkpoint, read it back, and remove all but the newest two; its folder.

    facts: what JSON can hold; "step" is how many are done, and names the folder. tensors: by name, on any device.
    Raises OSError, all older checkpoints as they were, where it cannot be written or is read back otherwise.
    """
    root, step = out_dir / CHECKPOINTS, facts["step"]
    path = root / f"step-{step:08}"
    with explaining_failure(f"the checkpoint of step {step}", root), replacing_folder(path) as beside:
        digest = write_tensors(beside / TENSORS, tensors)
        size = (beside / TENSORS).stat().st_size
        values = {"format": _FORMAT, **facts, "files": {TENSORS: {"bytes": size, "sha256": digest}}}
        values["sha256"] = _digest(values)
        (beside / STATE).write_text(json.dumps(values, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        try:
            if _read(beside, step).tensors != {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}:
                raise _DamageError("other tensors")
        except _DamageError as damage:
            raise OSError(f"{path} was not read back as it was written ({damage}); is the disk failing?") from None
    _prune(root, newest=path)
    return path


def newest_checkpoint(out_dir: Path) -> Checkpoint:
    """The newest checkpoint that is whole; damaged ones are passed over with a warning that names them.

    Raises ValueError where there is none, or none is whole.
    """
    folders = _folders(out_dir / CHECKPOINTS)
    if not folders:
        raise ValueError(f"there is no checkpoint in {out_dir} to resume from; start without resume.")
    damaged = []
    for step, path in folders:
        try:
            return _read(path, step)
        except _DamageError as damage:
            damaged.append(f"{path.name}: {damage}")
            warnings.warn(f"the checkpoint {path} is damaged ({damage}) and passed over.", stacklevel=2)
    raise ValueError(
        f"no checkpoint in {out_dir / CHECKPOINTS} is whole ({'; '.join(damaged)}); remove that folder, and start "
        "without resume."
    )


def has_checkpoint(out_dir: str | Path) -> bool:
    """Whether there is any to resume from, damaged ones included."""
    return bool(_folders(Path(out_dir) / CHECKPOINTS))


def steps_done(out_dir: Path) -> tuple[int, int | None] | None:
    """How far the run in out_dir is by its newest checkpoint: (steps done, steps in all, None where it does not say);
    None without a checkpoint. Tensors are not looked at."""
    for step, path in _folders(out_dir / CHECKPOINTS):
        try:
            max_steps = _read_state(path, step).get("max_steps")
        except _DamageError:
            max_steps = None
        return step, max_steps if isinstance(max_steps, int) else None
    return None


def remove_checkpoints(out_dir: Path) -> None:
    """Remove all of them, the newest last: a process killed meanwhile leaves a finished run finished."""
    for _, path in reversed(_folders(out_dir / CHECKPOINTS)):
        _remove(path)
    root = out_dir / CHECKPOINTS
    remove_leftovers(out_dir)
    if root.is_dir() and not any(root.iterdir()):
        root.rmdir()


def remove_leftovers(out_dir: Path) -> None:
    """Remove what a process that was killed was writing or removing. No other may be at work in out_dir."""
    for path in (out_dir / CHECKPOINTS).glob(".step-*"):
        shutil.rmtree(path)


def _folders(root: Path) -> list[tuple[int, Path]]:
    """(steps done, folder) of every checkpoint, the newest first."""
    if not root.is_dir():
        return []
    found = [(match, path) for path in root.iterdir() if (match := _NAME.fullmatch(path.name)) and path.is_dir()]
    return sorted(((int(match[1]), path) for match, path in found), reverse=True)


def _read(path: Path, step: int) -> Checkpoint:
    """A checkpoint whose every byte was compared with its digest; _DamageError says what is not as it was written."""
    values = _read_state(path, step)
    files = values["files"]
    there = {file.name for file in path.iterdir()} - {STATE}
    if there != files.keys():
        raise _DamageError(f"{', '.join(sorted(there ^ files.keys()))} missing, or too many")
    try:
        for name, told in files.items():
            if (path / name).stat().st_size != told["bytes"]:
                raise _DamageError(f"{name} is not as long as it was")
            if sha256(path / name) != told["sha256"]:
                raise _DamageError(f"{name} is not what it was")
        return Checkpoint(path, values, list_tensors(path))
    except OSError as error:
        raise _DamageError(f"{error.strerror or error}") from None
    except ValueError as error:
        raise _DamageError(f"its tensors cannot be listed: {error}") from None


def _read_state(path: Path, step: int) -> dict[str, Any]:
    """state.json alone, by its own digest."""
    try:
        if (path / STATE).stat().st_size > _LARGEST_STATE:
            raise ValueError
        values = json.loads((path / STATE).read_text(encoding="utf-8"))
        told = values.pop("sha256")
    except (OSError, ValueError, RecursionError, AttributeError, KeyError, TypeError):
        raise _DamageError(f"{STATE} cannot be read") from None
    if told != _digest(values) or not isinstance(values.get("files"), dict):
        raise _DamageError(f"{STATE} is not what it was")
    if values.get("format") != _FORMAT:
        raise _DamageError(f"of format {values.get('format')}, where this version reads {_FORMAT}")
    if values.get("step") != step:
        raise _DamageError(f"of step {values.get('step')}")
    return values


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _prune(root: Path, newest: Path) -> None:
    """Remove all but the newest two. One that was cut short is not one of them, nor is one of more steps than the
    newest: those are damaged, or the run would have begun with them."""
    kept = 0
    for step, path in _folders(root):
        if path == newest or (kept in range(1, _KEPT) and _is_long_enough(path, step)):
            kept += 1
        else:
            _remove(path)


def _is_long_enough(path: Path, step: int) -> bool:
    try:
        files = _read_state(path, step)["files"]
        return all((path / name).stat().st_size == told["bytes"] for name, told in files.items())
    except (_DamageError, OSError):
        return False


def _remove(path: Path) -> None:
    """Rename, then remove: half a folder under a checkpoint's name would pass for a damaged one."""
    hidden = path.with_name(f".{path.name}.gone")
    shutil.rmtree(hidden, ignore_errors=True)
    path.rename(hidden)
    shutil.rmtree(hidden)
