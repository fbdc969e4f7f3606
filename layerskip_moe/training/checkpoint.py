"""Training checkpoints: all that a stopped run needs to go on as if it had not been stopped.

One file, `<out_dir>/checkpoint.pt`, written beside and renamed. Random state is not in it: batches and
dropout are functions of the step. (The model other people load is `save_pretrained`'s; this is the run's own.)
Knows nothing of the loop. Next: `loop.py`.
"""

from pathlib import Path
from typing import Any

import torch

from layerskip_moe.files import replacing

NAME = "checkpoint.pt"


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
    with open(path, "rb") as file:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # which one depends on where the file breaks off
            raise ValueError(damaged) from error
    if not isinstance(state, dict):
        raise ValueError(damaged)
    return state
