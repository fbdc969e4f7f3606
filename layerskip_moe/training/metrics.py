"""metrics.jsonl and recipe.json: what training says of itself while it runs, and what it was asked to do.

metrics.jsonl has one JSON object per line: {"split": "train", "step", "loss", "exit_losses": {exit layer: cross
entropy}, "seconds": {part of a step: mean seconds per step since the last such line}, ...},
{"split": "validation", "step", "perplexity": [per exit layer 1..L]}, and for every step that was skipped
{"split": "skipped", "step", "loss", "gradient_norm", "skipped_steps": so far}. Steps count from 0.
Knows nothing of how the numbers came about. Next: `loop.py`, which writes; `analysis`, which reads.
"""

import dataclasses
import errno
import json
import math
import os
from pathlib import Path
from typing import Any

from layerskip_moe.files import explaining_failure, plain, replacing
from layerskip_moe.training.balance import balance_metrics
from layerskip_moe.training.config import TrainConfig
from layerskip_moe.training.losses import Losses


def write_recipe(
    out_dir: Path, steps: int, n_layers: int, config: TrainConfig, *, writes: bool = True
) -> dict[str, Any]:
    """Write recipe.json, unless another process does, and give it: {"steps", "n_layers": L, "train_config": {field:
    value}}. From these the schedules over the run can be drawn; `steps` is what max_steps and epochs came to."""
    recipe = {"steps": steps, "n_layers": n_layers, "train_config": dataclasses.asdict(config)}
    if writes:
        with explaining_failure("recipe.json", out_dir), replacing(out_dir / "recipe.json") as beside:
            beside.write_text(json.dumps(recipe, indent=2, allow_nan=False) + "\n")
    return recipe


def train_record(
    losses: Losses, learning_rate: float, gradient_norm: float, speed: float, seconds: dict[str, float]
) -> dict[str, Any]:
    """One line of metrics.jsonl about a step; `speed` in training tokens per second, `seconds` per step from
    `StepTimer.mean_seconds`. The gradient norm is None where gradients overflowed float16 and the step was
    skipped."""
    exits = {str(layer): float(loss) for layer, loss in losses.exits.items()}
    loads = {layer: counts for layer, counts in losses.load.items() if counts.sum()}  # a dropped layer has none
    load = {str(layer): counts.tolist() for layer, counts in loads.items()}
    violations = [balance_metrics(counts)["max_violation"] for counts in loads.values()]
    record: dict[str, Any] = {
        "loss": float(losses.total.detach()),
        "perplexity": math.exp(min(list(exits.values())[-1], 700.0)),
        "exit_losses": exits,
        "balance_loss": float(losses.balance),
        "router_z_loss": float(losses.router_z),
        "learning_rate": learning_rate,
        "gradient_norm": gradient_norm if math.isfinite(gradient_norm) else None,  # JSON has no infinity
        "tokens_per_second": speed,
        "seconds": seconds,
        "load": load,
    }
    if losses.distillation:
        record["distillation"] = {str(layer): float(loss) for layer, loss in losses.distillation.items()}
    if losses.router_coherence is not None:
        record["router_coherence_loss"] = float(losses.router_coherence)
    if violations:
        record["max_violation"] = sum(violations) / len(violations)
    return record


def skipped_record(losses: Losses, gradient_norm: float, skipped_steps: int) -> dict[str, Any]:
    """One line about a step that was skipped, the skipped_steps-th of the run; what is not finite is None."""
    record = {"loss": float(losses.total), "gradient_norm": gradient_norm, "skipped_steps": skipped_steps}
    return plain(record)


class MetricsWriter:
    """metrics.jsonl, and TensorBoard where it is installed; the records alone where another process writes them."""

    def __init__(self, out_dir: Path, *, before_step: int, writes: bool = True) -> None:
        path = out_dir / "metrics.jsonl"
        self.out_dir = out_dir
        self.records: list[dict[str, Any]] = []
        if before_step and path.exists():  # a resumed run takes up before what it had written after its checkpoint
            self.records = [record for record in _whole_lines(path) if record["step"] < before_step]
        self._file = self._board = None
        if not writes:
            return
        with explaining_failure("metrics.jsonl", out_dir), replacing(path) as beside:
            beside.write_text("".join(json.dumps(record) + "\n" for record in self.records))
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (closed in __exit__)
        self._board = _tensorboard(out_dir, before_step)

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()

    def write(self, split: str, step: int, record: dict[str, Any]) -> None:
        """Add one record; numbers, and numbers by exit or by part of a step, go to TensorBoard too."""
        self.records.append({"split": split, "step": step, **record})
        if self._file is not None:
            with explaining_failure("metrics.jsonl", self.out_dir):
                self._write_whole(json.dumps(self.records[-1]).encode() + b"\n")
        if self._board is None:
            return
        for name, value in record.items():
            if isinstance(value, float):
                self._board.add_scalar(f"{split}/{name}", value, step)
            elif name == "exit_losses":
                for layer, loss in value.items():
                    self._board.add_scalar(f"{split}/exit_loss/{layer}", loss, step)
            elif name == "seconds":
                for part, seconds in value.items():
                    self._board.add_scalar(f"{split}/seconds/{part}", seconds, step)
            elif name == "perplexity":
                for index, perplexity in enumerate(value):
                    self._board.add_scalar(f"{split}/perplexity/{index + 1}", perplexity, step)

    def _write_whole(self, line: bytes) -> None:
        """Append the line, or nothing of it."""
        assert self._file is not None
        end = self._file.tell()
        if self._file.write(line) != len(line):  # which is how a disk says at first that it is full
            self._file.truncate(end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a file whose last lines may be torn: up to the first that is no record."""
    records = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            record = json.loads(line)
        except ValueError:
            break
        if not line.endswith(b"\n") or not isinstance(record, dict) or not isinstance(record.get("step"), int):
            break
        records.append(record)
    return records


def _tensorboard(out_dir: Path, before_step: int) -> Any:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # where TensorFlow is installed, TensorBoard loads it
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    # purge_step: TensorBoard, too, is to forget what was written from that step on.
    return SummaryWriter(str(out_dir / "tensorboard"), purge_step=before_step)
