"""The training loop: batches in, a trained model and its metrics out.

What is random or scheduled is a function of the step alone, so stopping and resuming changes nothing.
Knows nothing of how losses are made up. Next: `losses.py`, `checkpoint.py`.
"""

import contextlib
import dataclasses
import math
import time
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm.auto import tqdm

from layerskip_moe.data import ahead, batches, steps_per_epoch
from layerskip_moe.nn import MoEDecoder
from layerskip_moe.nn.block import MoEMLP
from layerskip_moe.nn.modes import in_mode
from layerskip_moe.nn.noise import hash_uniform
from layerskip_moe.training.balance import bias_update
from layerskip_moe.training.block_calls import calling_blocks
from layerskip_moe.training.checkpoint import check_same_run, fingerprint, load_checkpoint, save_checkpoint
from layerskip_moe.training.config import TrainConfig
from layerskip_moe.training.losses import (
    Losses,
    mean_over_ranks,
    step_exit_weights,
    step_losses,
    training_losses,
    validation_losses,
)
from layerskip_moe.training.metrics import MetricsWriter, train_record, write_recipe
from layerskip_moe.training.optimizer import autocast_dtype, compiles, make_optimizer, set_learning_rate
from layerskip_moe.training.optimizer_state import optimizer_tensors, restore_optimizer
from layerskip_moe.training.parallel import Ranks, check_batch, join
from layerskip_moe.training.sharding import clip_gradients, give_back, make_network, take_up, whole
from layerskip_moe.training.step_timer import StepTimer

_FINAL_LOSSES = ("loss", "exit_losses", "balance_loss", "router_z_loss")
_DROPOUT_STREAM = 4  # of the step's random numbers; 1 to 3 are layer and expert dropout's


@dataclass
class TrainResult:
    """What a training run gave; the model itself was updated in place.

    metrics:  the records of metrics.jsonl, in order
    losses:   raw parts of the last step: {"loss", "exit_losses", "balance_loss", "router_z_loss"}; empty for a
              finished run that is resumed without its metrics.jsonl
    validation: last validation's perplexity per exit layer 1..L, of the weights the model now has; empty
              without a validation split
    steps, tokens, seconds: optimizer steps, training tokens seen, wall time; what went before a resume included
    best_step: the step whose weights the model now has
    recipe:   how it was trained, for `save_pretrained` to keep beside the weights: recipe.json's facts and more
    """

    metrics: list[dict[str, Any]]
    losses: dict[str, Any]
    validation: list[float]
    steps: int
    tokens: int
    seconds: float
    best_step: int
    recipe: dict[str, Any]


class _Text(Protocol):
    """What training asks of a corpus: token ids, 1-D; an empty validation split is not looked at."""

    @property
    def train(self) -> Tensor: ...

    @property
    def validation(self) -> Tensor: ...


def train(
    model: MoEDecoder,
    corpus: _Text,
    config: TrainConfig,
    out_dir: str | Path,
    *,
    resume: bool = False,
    progress: bool = True,
) -> TrainResult:
    """Train the model in place by the LayerSkip recipe.

    Writes to out_dir: at the start recipe.json, {"steps", "n_layers": L, "train_config": {field: value}}; then
    metrics.jsonl (a line per log_every steps and per validation), checkpoint.pt, and TensorBoard files when
    tensorboard is installed. resume: go on from out_dir's checkpoint; the run ends with the weights it would
    have had without the stop, bit for bit on a CPU.

    In processes that torchrun started (`parallel.py`) all of them call this, with the same arguments, and train one
    model together: each on a part of every batch, with a part of the weights. Losses, metrics and weights are those of
    one process but for rounding; rank 0 alone writes and talks; in the end every rank's model has all the weights. A
    model that lies on the CPU of a process with a GPU of its own stays there meanwhile.

    The model's mode is put back at the end. Raises ValueError for a text shorter than one sample, a model
    shorter than seq_len, and a checkpoint that is missing, damaged, or of a run with other settings;
    FloatingPointError when a loss or gradient stops being finite. Warns of a validation split too short to use.
    """
    if config.seq_len > model.config.max_seq_len:
        raise ValueError(
            f"seq_len={config.seq_len} is longer than the model's max_seq_len={model.config.max_seq_len}; "
            "shorten seq_len, or build the model with a larger max_seq_len."
        )
    out_dir = Path(out_dir)
    ranks = join(model.device)
    check_batch(config.batch_size, ranks)
    if ranks.is_first:
        out_dir.mkdir(parents=True, exist_ok=True)
    per_step = config.batch_size * config.accumulation
    max_steps = config.max_steps or math.ceil(config.epochs * steps_per_epoch(corpus.train, config.seq_len, per_step))
    run = _Run(model, config, max_steps, corpus, ranks)
    first = run.restore(load_checkpoint(out_dir)) if resume else 0
    validates = len(corpus.validation) > config.seq_len
    if len(corpus.validation) and not validates and ranks.is_first:
        warnings.warn(
            f"the validation split has {len(corpus.validation)} tokens but one sample needs seq_len + 1 = "
            f"{config.seq_len + 1}, so nothing is validated; use a longer text or a smaller seq_len.",
            stacklevel=2,
        )
    tenth = max(max_steps // 10, 1)
    validate_every = tenth if config.validate_every is None else config.validate_every
    checkpoint_every = tenth if config.checkpoint_every is None else config.checkpoint_every

    text = batches(
        corpus.train,
        seq_len=config.seq_len,
        batch_size=config.batch_size,
        seed=config.seed,
        start=first * config.accumulation,
        part=(ranks.rank, ranks.size),
    )
    recipe = write_recipe(out_dir, max_steps, model.config.n_layers, config, writes=ranks.is_first)
    with in_mode(run.model, training=True):
        with (
            contextlib.closing(ahead(text)) as text_ahead,
            MetricsWriter(out_dir, before_step=first, writes=ranks.is_first) as metrics,
            tqdm(
                total=max_steps, initial=first, desc="training", unit="step", disable=not (progress and ranks.is_first)
            ) as bar,
        ):
            logged_at, logged_step = time.perf_counter(), first
            for step in range(first, max_steps):
                losses, gradient_norm = run.step(step, text_ahead)
                bar.update()
                done, last = step + 1, step + 1 == max_steps
                if done % config.log_every == 0 or last:
                    now = time.perf_counter()
                    speed = (done - logged_step) * per_step * config.seq_len / (now - logged_at)
                    seconds = run.timer.mean_seconds(done - logged_step)
                    record = train_record(losses, run.learning_rate, gradient_norm, speed, seconds)
                    metrics.write("train", step, record)
                    bar.set_postfix(loss=f"{record['loss']:.3f}", perplexity=f"{record['perplexity']:.1f}")
                    logged_at, logged_step = now, done
                if validates and (last or (validate_every and done % validate_every == 0)):
                    paused = time.perf_counter()
                    with run.autocast():
                        metrics.write("validation", step, run.validate(corpus.validation, done))
                    logged_at += time.perf_counter() - paused
                if checkpoint_every != 0 and (last or (checkpoint_every and done % checkpoint_every == 0)):
                    state = run.state(done)  # which all ranks put together
                    if ranks.is_first:
                        save_checkpoint(out_dir, state)
        best_step = run.take_best()
    give_back(run.network, model, ranks)
    trained = [r for r in metrics.records if r["split"] == "train"]
    kept = [r for r in metrics.records if r["split"] == "validation" and r["step"] + 1 == best_step]
    tokens = max_steps * per_step * config.seq_len
    return TrainResult(
        metrics=metrics.records,
        losses={name: trained[-1][name] for name in _FINAL_LOSSES} if trained else {},
        validation=kept[-1]["perplexity"] if kept else [],
        steps=max_steps,
        tokens=tokens,
        seconds=run.seconds,
        best_step=best_step,
        recipe=recipe | {"tokens": tokens, "best_step": best_step},
    )


class _Run:
    """Model, optimizer and best weights so far: what changes from step to step, and what a checkpoint holds."""

    def __init__(
        self, model: MoEDecoder, config: TrainConfig, max_steps: int, corpus: _Text, ranks: Ranks | None = None
    ) -> None:
        step_exit_weights(config, model.config.n_layers, 0, max_steps)  # exits that it lacks are refused now
        self.config, self.max_steps = config, max_steps
        self.ranks = ranks = ranks or Ranks(0, 1, model.device)
        self.text = fingerprint(corpus.train, corpus.validation)
        ranks.check_agree((self.text, max_steps, config, model.config))
        self.network = make_network(model, ranks, expert_parallel=config.expert_parallel)
        self.model = model = self.network.model
        self.timer = StepTimer(model.device)
        self.started = time.perf_counter()  # moved back by `restore`, so that a resumed run counts what it had
        model.zero_grad(set_to_none=True)  # a run stopped in mid-step leaves gradients behind
        self.optimizer = make_optimizer(model, config)
        self.compiles = config.expert_parallel == 1 and compiles(config.compile, model.device)
        self.dtype = autocast_dtype(config.precision, model.device)
        # float16 gradients underflow without a scale (the T4's case); disabled, the scaler passes through.
        self.scaler = torch.amp.GradScaler(model.device.type, enabled=self.dtype == torch.float16)
        self.learning_rate = 0.0
        self.best: dict[str, Any] | None = None  # {"loss", "step", "weights"}

    @property
    def seconds(self) -> float:
        """Wall time of this run so far, the time before a resume included."""
        return time.perf_counter() - self.started

    def autocast(self) -> AbstractContextManager[Any]:
        """The number type of matrix products, on this run's device."""
        if self.dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.model.device.type, dtype=self.dtype)

    def step(self, step: int, text: Iterator[tuple[Tensor, Tensor, Tensor]]) -> tuple[Losses, float]:
        """One optimizer step over the next batches of text: its losses and the gradient norm.

        Raises FloatingPointError, the weights still as they were, when a loss or gradient is not finite.
        (Gradients past float16's range are not that: the scaler skips the step and lowers its scale.)
        """
        model, config, timer = self.model, self.config, self.timer
        parts: list[Losses] = []
        compile, checkpointing = self.compiles, config.activation_checkpointing
        with (
            _residual_dropout_seed(model, config.seed, step, self.ranks.rank),
            calling_blocks(model, compile=compile, checkpointing=checkpointing),
        ):
            for left in reversed(range(config.accumulation)):
                self.network.synchronize(left == 0)
                with timer.part("batches"):
                    inputs, labels, sample_ids = next(text)
                    batch = _sent(inputs, model.device), _sent(labels, model.device), sample_ids
                with self.autocast():
                    losses = self._losses(batch, step)
                with timer.part("backward"):
                    self.scaler.scale(losses.total / config.accumulation).backward()
                    parts.append(losses._replace(total=losses.total.detach()))
        with timer.part("optimizer"):
            losses = mean_over_ranks(step_losses(parts), self.ranks)
            return losses, self._move_weights(losses, step)

    def _losses(self, batch: tuple[Tensor, Tensor, Tensor], step: int) -> Losses:
        how: dict[str, Any] = {"max_steps": self.max_steps, "timer": self.timer, "ranks": self.ranks}
        return self.network(lambda model: training_losses(model, *batch, self.config, step=step, **how))

    def _move_weights(self, losses: Losses, step: int) -> float:
        """Take the optimizer's step along the gradients that are there, and clear them; their norm."""
        self.learning_rate = set_learning_rate(self.optimizer, step, self.max_steps, self.config)
        self.scaler.unscale_(self.optimizer)
        limit = self.config.max_gradient_norm or math.inf
        norm = clip_gradients(self.model.parameters(), limit, self.ranks)
        self._check_finite("loss", float(losses.total), step)
        if not self.scaler.is_enabled():
            self._check_finite("gradient norm", norm, step)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if math.isfinite(norm):  # else the scaler has skipped the step
            self._move_balance_bias(losses)
        return norm

    def _check_finite(self, name: str, value: float, step: int) -> None:
        if not math.isfinite(value):
            raise FloatingPointError(
                f"the {name} is {value} at step {step}; lower learning_rate, or raise warmup_steps."
            )

    def _move_balance_bias(self, losses: Losses) -> None:
        for layer, load in losses.load.items():
            mlp = self.model.blocks[layer].mlp
            assert isinstance(mlp, MoEMLP)
            if mlp.router.balance_bias is not None:
                # An expert that sat the step out has no load, which says nothing against it.
                active = None if losses.active_experts is None else losses.active_experts[layer].to(load.device)
                mlp.router.balance_bias += self.config.bias_update_rate * bias_update(load, active)

    def validate(self, tokens: Tensor, done: int) -> dict[str, Any]:
        """Perplexity at every exit after `done` steps; remembers the weights when the last layer's is best."""
        entropy = self.network(lambda model: validation_losses(model, tokens, self.config, self.ranks))
        self.network.release()
        if self.config.keep_best and (self.best is None or entropy[-1] < self.best["loss"]):
            weights = {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}
            self.best = {"loss": entropy[-1], "step": done, "weights": weights}
        return {"perplexity": [math.exp(min(loss, 700.0)) for loss in entropy]}

    def take_best(self) -> int:
        """Give the model its best weights, if any were kept; the number of steps they had."""
        if self.best is None:
            return self.max_steps
        take_up(self.model.state_dict(), self.best["weights"])
        return self.best["step"]

    def state(self, done: int) -> dict[str, Any]:
        """All that `restore` needs after `done` steps, on any number of ranks: tensors are whole."""
        return {
            "step": done,
            "max_steps": self.max_steps,
            "train_config": dataclasses.asdict(self.config),
            "model_config": dataclasses.asdict(self.model.config),
            "model": whole(self.model.state_dict()),
            "optimizer": whole(optimizer_tensors(self.model, self.optimizer)),
            "scaler": self.scaler.state_dict(),
            "best": self.best and {**self.best, "weights": whole(self.best["weights"])},
            "text": self.text,
            "seconds": self.seconds,
        }

    def restore(self, state: dict[str, Any]) -> int:
        """Take up a checkpoint; the number of steps it had done."""
        check_same_run(state, self.state(0))
        take_up(self.model.state_dict(), state["model"])
        restore_optimizer(self.model, self.optimizer, state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.best = state["best"]
        self.started = time.perf_counter() - state["seconds"]
        return state["step"]


def _sent(ids: Tensor, device: torch.device) -> Tensor:
    """On the device; to a GPU from pinned memory, so that nobody waits for the copy."""
    return ids.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else ids.to(device)


@contextlib.contextmanager
def _residual_dropout_seed(model: MoEDecoder, seed: int, step: int, rank: int) -> Any:
    """Seed torch's own generator for this step, and give it back as it was. Only plain residual dropout
    draws from it, and is another on another number of ranks; layer and expert dropout have keys of their own."""
    if model.config.dropout == 0:
        yield
        return
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(int(hash_uniform(seed, _DROPOUT_STREAM, step, rank) * 2**53))
        yield
