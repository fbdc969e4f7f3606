"""Checkpoints on disk: all that a stopped run needs to go on, whole or not at all, and found out when damaged.

    <out_dir>/checkpoints/step-00000200/    after 200 steps; the newest two are kept
        tensors-00000.safetensors           see `tensor_files.py`
        state.json                          everything else, and the size and sha256 of the other file
    <out_dir>/checkpoints/finished          once the run has ended and its model is in safe hands

A folder is written beside, read back, and renamed; only then are older ones removed. Nothing in a file is executed.
Random state is in none: batches and dropout are functions of the step. (The model other people load is
`save_pretrained`'s; this is the run's own.)

Knows nothing of what the tensors are. Next: `run_state.py`, which does; `run_folder.py`, for the folder around it.
"""

import hashlib
import json
import re
import shutil
import stat
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from layerskip_moe.files import explaining_failure, replacing, replacing_folder, set_aside, sha256
from layerskip_moe.training.tensor_files import Shapes, list_tensors, write_tensors

CHECKPOINTS, STATE, TENSORS, FINISHED = "checkpoints", "state.json", "tensors-00000.safetensors", "finished"
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
    (root / FINISHED).unlink(missing_ok=True)  # the run has gone on: its last checkpoint was damaged
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


def finish_run(out_dir: str | Path) -> None:
    """Say that the run in out_dir has ended, and that nothing is lost if the next run replaces its checkpoints.

    `train` says so itself when it returns, unless it is called with finish=False; then whoever called it does, once the
    model is saved. Does nothing where there are no checkpoints. Raises OSError, with a sentence, where it cannot be
    written.
    """
    root = Path(out_dir) / CHECKPOINTS
    if has_checkpoint(out_dir):
        with explaining_failure("the mark of a finished run", root), replacing(root / FINISHED) as beside:
            beside.touch()


def is_finished(out_dir: Path) -> bool:
    """Whether `finish_run` has said so of its checkpoints."""
    return (out_dir / CHECKPOINTS / FINISHED).exists()


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
    """Remove all of them, the newest last, and then the mark of a finished run: one that a killed process was removing
    is still a finished one."""
    root = out_dir / CHECKPOINTS
    for _, path in reversed(_folders(root)):
        _remove(path)
    (root / FINISHED).unlink(missing_ok=True)
    remove_leftovers(out_dir)
    if root.is_dir() and not any(root.iterdir()):
        root.rmdir()


def remove_leftovers(out_dir: Path) -> None:
    """Remove what a process that was killed was writing or removing, and put back what it had moved away for that, with
    a warning. No other may be at work in out_dir."""
    root = out_dir / CHECKPOINTS
    for path, before in set_aside(root).items():
        before.rename(path)
        warnings.warn(f"{path} was being written anew when its run was killed; it is back as it was.", stacklevel=2)
    for path in root.glob(".step-*"):
        shutil.rmtree(path)
    for path in root.glob(f".{FINISHED}.*"):
        path.unlink()


def _folders(root: Path) -> list[tuple[int, Path]]:
    """(steps done, folder) of every checkpoint, the newest first; one that a killed process had moved away, too."""
    if not root.is_dir():
        return []
    there = {path: path for path in root.iterdir()} | set_aside(root)
    found = [(match, path) for name, path in there.items() if (match := _NAME.fullmatch(name.name))]
    plain = [(int(match[1]), path) for match, path in found if path.is_dir() and not path.is_symlink()]
    return sorted(plain, reverse=True)


def _read(path: Path, step: int) -> Checkpoint:
    """A checkpoint whose every byte was compared with its digest; _DamageError says what is not as it was written."""
    values = _read_state(path, step)
    files = values["files"]
    try:
        there = {file.name for file in path.iterdir()} - {STATE}
        if there != files.keys():
            raise _DamageError(f"{', '.join(sorted(there ^ files.keys()))} missing, or too many")
        for name, told in files.items():
            if _size(path / name) != told["bytes"]:
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
        if _size(path / STATE) > _LARGEST_STATE:
            raise ValueError
        values = json.loads((path / STATE).read_text(encoding="utf-8"))
        intact = values.pop("sha256") == _digest(values)
    except (OSError, ValueError, RecursionError, AttributeError, KeyError, TypeError):
        raise _DamageError(f"{STATE} cannot be read") from None
    files = values.get("files")
    if not intact or not isinstance(files, dict) or any(not _is_told(told) for told in files.values()):
        raise _DamageError(f"{STATE} is not what it was")
    if values.get("format") != _FORMAT:
        raise _DamageError(f"of format {values.get('format')}, where this version reads {_FORMAT}")
    if values.get("step") != step or type(values["step"]) is not int:  # 3.0 and true are equal to an int too
        raise _DamageError(f"of step {values.get('step')}")
    return values


def _is_told(of_file: Any) -> bool:
    """Whether this is what `save_checkpoint` tells of a file."""
    return isinstance(of_file, dict) and of_file.keys() == {"bytes", "sha256"}


def _size(path: Path) -> int:
    """Of a plain file in bytes; OSError for anything else, as reading from a pipe would wait forever."""
    about = path.lstat()
    if not stat.S_ISREG(about.st_mode):
        raise OSError(f"{path.name} is no plain file")
    return about.st_size


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
        return all(_size(path / name) == told["bytes"] for name, told in files.items())
    except (_DamageError, OSError):
        return False


def _remove(path: Path) -> None:
    """Rename, then remove: half a folder under a checkpoint's name would pass for a damaged one."""
    hidden = path.with_name(f".{path.name}.gone")
    shutil.rmtree(hidden, ignore_errors=True)
    path.rename(hidden)
    shutil.rmtree(hidden)
