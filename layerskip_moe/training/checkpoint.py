"""Training checkpoints: all that a stopped run needs to go on as if it had not been stopped.

One file, `<out_dir>/checkpoint.pt`, written beside and renamed. Random state is not in it: batches and
dropout are functions of the step. (The model other people load is `save_pretrained`'s; this is the run's own.)
Next: `loop.py`, which says what the state is made of.
"""

import contextlib
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from layerskip_moe.files import replacing
from layerskip_moe.quiet_import import quiet_import

NAME = "checkpoint.pt"
_FREE = ("log_every", "checkpoint_every")  # these may change on resume: nothing computed depends on them


def save_checkpoint(out_dir: Path, state: dict[str, Any]) -> None:
    """Write state (tensors, numbers, strings, in dicts and lists) so that a reader finds the old file or the
    new one, never half of either."""
    with replacing(out_dir / NAME) as beside:
        torch.save(state, beside)


def load_checkpoint(out_dir: Path) -> dict[str, Any]:
    """The last state written to out_dir, on the CPU. Tensors and plain values only: nothing in the file is
    executed. Raises ValueError where there is none or it cannot be read."""
    path = out_dir / NAME
    if not path.exists():
        raise ValueError(f"there is no {NAME} in {out_dir} to resume from; start without resume.")
    damaged = f"{path} is damaged and cannot be resumed from; remove it and start again."
    with contextlib.suppress(ImportError), quiet_import():
        import torchao.optim  # noqa: F401 (it tells torch.load that the 8-bit AdamW's tensors are harmless)
    with open(path, "rb") as file:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # which one depends on where the file breaks off
            raise ValueError(damaged) from error
    if not isinstance(state, dict):
        raise ValueError(damaged)
    return state


def check_same_run(saved: dict[str, Any], here: dict[str, Any]) -> None:
    """Raise ValueError, naming what differs, unless a saved state is of the same run as this one's: the same
    model_config, train_config (but for how often it logs and saves), max_steps and text."""
    if saved.keys() != here.keys():
        raise ValueError("the checkpoint to resume is not one of this version's training runs; start without resume.")
    for part in ("model_config", "train_config"):
        changed = [
            f"{name} was {value!r} and is now {here[part].get(name)!r}"
            for name, value in saved[part].items()
            if name not in _FREE and here[part].get(name) != value
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
