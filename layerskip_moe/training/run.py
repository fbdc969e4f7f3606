"""A run in memory: what changes from step to step, how a step changes it, and what a checkpoint is to hold.

Knows nothing of when it is logged, validated or saved. Next: `losses.py`, `optimizer.py`; `run_state.py` and
`run_facts.py`, which take it apart; `loop.py`, which asks.
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from layerskip_moe.data import batches
from layerskip_moe.nn import MoEDecoder
from layerskip_moe.nn.block import MoEMLP
from layerskip_moe.nn.fingerprint import model_fingerprint
from layerskip_moe.nn.noise import hash_uniform
from layerskip_moe.training.balance import bias_update
from layerskip_moe.training.block_calls import calling_blocks
from layerskip_moe.training.checkpoint import Checkpoint
from layerskip_moe.training.config import TrainConfig
from layerskip_moe.training.losses import (
    Losses,
    mean_over_ranks,
    step_exit_weights,
    step_losses,
    training_losses,
    validation_losses,
)
from layerskip_moe.training.nonfinite import Skips, where_it_began
from layerskip_moe.training.optimizer import autocast_dtype, compiles, make_optimizer, set_learning_rate, uncompiled
from layerskip_moe.training.parallel import Ranks
from layerskip_moe.training.run_facts import check_same_run, fingerprint
from layerskip_moe.training.run_state import restore_tensors, run_tensors
from layerskip_moe.training.sharding import clip_gradients, make_network, take_up
from layerskip_moe.training.step_timer import StepTimer

_DROPOUT_STREAM = 4  # of the step's random numbers; 1 to 3 are layer and expert dropout's


class Text(Protocol):
    """What training asks of a corpus: token ids, 1-D; an empty validation split is not looked at."""

    @property
    def train(self) -> Tensor: ...

    @property
    def validation(self) -> Tensor: ...


class Run:
    """Model, optimizer and best weights so far; of several ranks (`parallel.py`) the model is a copy, divided over all.
    Raises ValueError for exits that the model lacks, and for experts that the ranks cannot divide."""

    def __init__(
        self, model: MoEDecoder, config: TrainConfig, max_steps: int, corpus: Text, ranks: Ranks | None = None
    ) -> None:
        step_exit_weights(config, model.config.n_layers, 0, max_steps)  # exits that it lacks are refused now
        self.config, self.max_steps, self.corpus = config, max_steps, corpus
        self.ranks = ranks = ranks or Ranks(0, 1, model.device)
        self.text = fingerprint(corpus.train, corpus.validation)
        if ranks.size > 1:
            ranks.check_agree((self.text, max_steps, config, model.config, model_fingerprint(model)))
        self.dtype = autocast_dtype(config.precision, ranks.device)
        self.network = make_network(model, ranks, expert_parallel=config.expert_parallel, dtype=self.dtype)
        self.model = model = self.network.model
        self.timer = StepTimer(model.device)
        self.started = time.perf_counter()  # moved back by `restore`, so that a resumed run counts what it had
        model.zero_grad(set_to_none=True)  # a run stopped in mid-step leaves gradients behind
        self.optimizer = make_optimizer(model, config)
        self.compiles = compiles(False if ranks.size > 1 and config.compile is None else config.compile, model.device)
        # float16 gradients underflow without a scale (the T4's case); disabled, the scaler passes through.
        self.scaler = torch.amp.GradScaler(model.device.type, enabled=self.dtype == torch.float16)
        self.learning_rate = 0.0
        self.skips = Skips()
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

    def text_from(self, step: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """This rank's part of the batches of a step and of all that follow."""
        config = self.config
        return batches(
            self.corpus.train,
            seq_len=config.seq_len,
            batch_size=config.batch_size,
            seed=config.seed,
            start=step * config.accumulation,
            part=(self.ranks.rank, self.ranks.size),
        )

    def step(self, step: int, text: Iterator[tuple[Tensor, Tensor, Tensor]]) -> tuple[Losses, float]:
        """One optimizer step over the next batches of text: its losses and the gradient norm.

        Where one of these is not finite, weights and optimizer stay as they were, and `skips` counts it. (Gradients
        past float16's range are not that: the scaler skips the step and lowers its scale.)
        """
        parts: list[Losses] = []
        with calling_blocks(self.model, compile=self.compiles, checkpointing=self.config.activation_checkpointing):
            for losses in self._losses(step, text):
                with self.timer.part("backward"):
                    self.scaler.scale(losses.total / self.config.accumulation).backward()
                    parts.append(losses._replace(total=losses.total.detach()))
        with self.timer.part("optimizer"):
            losses = mean_over_ranks(step_losses(parts), self.ranks)
            return losses, self._move_weights(losses, step)

    def _losses(self, step: int, text: Iterator[tuple[Tensor, Tensor, Tensor]]) -> Generator[Losses, None, None]:
        """Those of a step's batches, one after the other."""
        model, config, timer = self.model, self.config, self.timer
        how: dict[str, Any] = {"max_steps": self.max_steps, "timer": timer, "ranks": self.ranks}
        with _residual_dropout_seed(model, config.seed, step, self.ranks.rank):
            for _ in range(config.accumulation):
                with timer.part("batches"):
                    inputs, labels, sample_ids = next(text)
                    batch = _sent(inputs, model.device), _sent(labels, model.device), sample_ids
                with self.autocast():
                    losses = self.network(partial(_losses_of, batch=batch, config=config, step=step, **how))
                yield losses

    def _move_weights(self, losses: Losses, step: int) -> float:
        """Take the optimizer's step along the gradients that are there, and clear them; their norm."""
        self.learning_rate = set_learning_rate(self.optimizer, step, self.max_steps, self.config)
        self.scaler.unscale_(self.optimizer)
        limit = self.config.max_gradient_norm or math.inf
        norm = clip_gradients(self.model.parameters(), limit, self.ranks)
        broken = self._not_finite(float(losses.total), norm)
        if broken is not None:
            self.skips.skip(broken)
        else:
            self.skips.in_a_row = 0
            with uncompiled(self.ranks):
                self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if math.isfinite(norm) and broken is None:  # else the step was skipped, here or by the scaler
            self._move_balance_bias(losses)
        return norm

    def _not_finite(self, loss: float, norm: float) -> str | None:
        """What is not finite, in words; None where the step may be taken, or is the scaler's to skip."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        # With a scale below 1, it is not the scale that takes float16's gradients out of range.
        if not math.isfinite(norm) and (not self.scaler.is_enabled() or self.scaler.get_scale() < 1):
            return f"the gradient norm is {norm}"
        return None

    def told_why_it_stops(self, step: int) -> str:
        """The sentence for a run whose last steps, up to `step`, were skipped: where it began, and what to do."""
        began = step + 1 - self.skips.in_a_row
        calling = calling_blocks(self.model, compile=False, checkpointing=self.config.activation_checkpointing)
        with calling, contextlib.closing(self._losses(began, self.text_from(began))) as losses:
            where = where_it_began(self.model, (part.total for part in losses), self.ranks)
        return self.skips.told(step, where)

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
        if self.config.keep_best and entropy[-1] < (math.inf if self.best is None else self.best["loss"]):
            weights = {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}
            self.best = {"loss": entropy[-1], "step": done, "weights": weights}
        return {"perplexity": [math.exp(min(loss, 700.0)) for loss in entropy]}

    def take_best(self) -> int:
        """Give the model its best weights, if any were kept; the number of steps they had."""
        if self.best is None:
            return self.max_steps
        take_up(self.model.state_dict(), self.best["weights"])
        return self.best["step"]

    def facts(self, done: int) -> dict[str, Any]:
        """All that `restore` needs after `done` steps and that is no tensor."""
        return {
            "step": done,
            "max_steps": self.max_steps,
            "train_config": dataclasses.asdict(self.config),
            "model_config": dataclasses.asdict(self.model.config),
            "scaler": self.scaler.state_dict(),
            "best": self.best and {"loss": self.best["loss"], "step": self.best["step"]},
            "skips": dataclasses.asdict(self.skips),
            "text": self.text,
            "seconds": self.seconds,
        }

    def tensors(self) -> dict[str, Tensor]:
        """All that it needs and that is one."""
        return run_tensors(self.model, self.optimizer, self.best and self.best["weights"])

    def restore(self, checkpoint: Checkpoint) -> int:
        """Take up a checkpoint; the number of steps it had done."""
        facts = checkpoint.facts
        check_same_run(facts, self.facts(0))
        weights = restore_tensors(checkpoint, self.model, self.optimizer)
        if facts["scaler"]:  # else precision="auto" was another type on another machine: the scale begins anew
            self.scaler.load_state_dict(facts["scaler"])
        self.best = facts["best"] and {**facts["best"], "weights": weights}
        self.skips = Skips(**facts["skips"])
        self.started = time.perf_counter() - facts["seconds"]
        return facts["step"]


def _losses_of(model: MoEDecoder, *, batch: tuple[Tensor, Tensor, Tensor], config: TrainConfig, **how: Any) -> Losses:
    return training_losses(model, *batch, config, **how)


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
