"""This library's side of a benchmark: decoding, prefill and a training step, through the doors that users take.

Knows nothing of peers. Next: `peer_transformers.py`, which does the same work.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from layerskip_moe.generation import Autoregressive, Generation, Sampling, Session, Strategy, generate
from layerskip_moe.generation.generate import now
from layerskip_moe.nn import ModelConfig, MoEDecoder
from layerskip_moe.nn.modes import in_mode
from layerskip_moe.training.config import TrainConfig
from layerskip_moe.training.losses import training_losses
from layerskip_moe.training.optimizer import autocast_dtype


@dataclass
class Decoded:
    """The new tokens of one prompt, and when they came.

    Attributes:
        tokens: ids
        arrivals: (seconds on some clock, tokens so far), for each time that some came
    """

    tokens: list[int] = field(default_factory=list)
    arrivals: list[tuple[float, int]] = field(default_factory=list)

    def add(self, tokens: Sequence[int]) -> None:
        """Tokens that came just now."""
        self.tokens += tokens
        self.arrivals.append((time.perf_counter(), len(self.tokens)))

    @property
    def tokens_per_second(self) -> float:
        """Of all after the first arrival, which the prompt's time is part of. A round of speculation brings several
        tokens at once: those of the first are not counted."""
        (start, first), (end, last) = self.arrivals[0], self.arrivals[-1]
        return (last - first) / (end - start)


class _Arrivals:
    """A strategy that notes the tokens of its one prompt after each of its rounds."""

    def __init__(self, strategy: Strategy, decoded: Decoded) -> None:
        self._strategy, self._decoded = strategy, decoded

    def check(self, config: ModelConfig) -> None:
        """As the strategy."""
        self._strategy.check(config)

    def prepare(self, model: MoEDecoder, rows: int, sampling: Sampling) -> None:
        """As the strategy, where it has something to prepare."""
        getattr(self._strategy, "prepare", lambda *_: None)(model, rows, sampling)

    def start(self, session: Session) -> None:
        """As the strategy."""
        self._strategy.start(session)

    def step(self, session: Session) -> None:
        """A round of the strategy's; its tokens are on this side of the device when they are noted."""
        self._strategy.step(session)
        self._decoded.add(session.outputs[0][len(self._decoded.tokens) :])


def decode(
    model: MoEDecoder, prompt: Sequence[int], new_tokens: int, strategy: Strategy | None = None, *, compile: bool = True
) -> Decoded:
    """Greedy decoding of one prompt. strategy: None: plain."""
    decoded = Decoded()
    _generate(model, prompt, new_tokens, _Arrivals(strategy or Autoregressive(), decoded), compile)
    return decoded


def prefill_seconds(model: MoEDecoder, prompt: Sequence[int], *, compile: bool = True) -> float:
    """Seconds from a prompt to its first new token. All tokens but the last run together, and then that one, which
    costs as much as any decoded token."""
    stats = _generate(model, prompt, 1, Autoregressive(), compile).stats
    return stats.prefill_seconds + stats.decode_seconds


def _generate(
    model: MoEDecoder, prompt: Sequence[int], new_tokens: int, strategy: Strategy, compile: bool
) -> Generation:
    """The one place that calls `generate`."""
    return generate(model, [prompt], strategy, max_new_tokens=new_tokens, compile=compile)


def training_step(
    model: MoEDecoder,
    optimizer: torch.optim.Optimizer,
    inputs: Tensor,
    labels: Tensor,
    config: TrainConfig,
    *,
    step: int = 0,
    max_steps: int = 1,
) -> tuple[float, float]:
    """(seconds, loss) of one step: losses, gradients, optimizer. inputs, labels [B, T]; step of max_steps: where the
    recipe's schedules stand. Gradients are not clipped: the peers' are not."""
    start = now(model.device)
    dtype, kind = autocast_dtype(config.precision, model.device), model.device.type
    with in_mode(model, training=True):
        with torch.autocast(kind, dtype=dtype, enabled=dtype is not None):
            losses = training_losses(
                model, inputs, labels, torch.arange(len(inputs)), config, step=step, max_steps=max_steps
            )
        losses.total.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return now(model.device) - start, losses.total.item()
