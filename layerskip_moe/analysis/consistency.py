"""How far early exit's text is from the full model's, a loss in [0, 1] for each sequence: what a calibration bounds.

Every loss is of real decoding, token by token, with `EarlyExit` and the cache as it leaves it. A text ends after
max_new_tokens tokens, or with its first stop token, which counts as one of its tokens (all stop tokens alike).
Knows nothing of thresholds. Next: `calibrate.py`.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from layerskip_moe.generation import Autoregressive, Session, Strategy, generate
from layerskip_moe.nn import ModelConfig, MoEDecoder

# "textual": both write on their own; the share of places where the texts differ, of the longer one's. One early token
#     that is not the full model's changes all that follows it, so this is the strictest.
# "token": along the full model's text; the share of places where early exit would have said another token. What it
#     said before is not held against it twice.
# "risk": along the reference; max(0, R_early - R_full), R the share of places where a model says another token than
#     the reference. To be early and right costs nothing, even where the full model is wrong.
Consistency = Literal["textual", "token", "risk"]

_END = -1  # stands for any stop token


@dataclass(frozen=True)
class Sequences:
    """n sequences, and what early exit is compared with on them.

    Attributes:
        prompts: token ids
        texts: what stands after each: the full model's text, for "risk" the reference
        full: the full model's choice at every place of texts; under "textual" and "token", texts itself
    """

    prompts: list[list[int]]
    texts: list[list[int]]
    full: list[list[int]]


@dataclass(frozen=True)
class Measured:
    """Early exit on n sequences.

    Attributes:
        losses: [n] float64, each in [0, 1]
        agreement: share of all places where its token is the full model's, 0 to 1
        mean_layers: layers run per token, 1 to L
    """

    losses: Tensor
    agreement: float
    mean_layers: float


def full_model(
    model: MoEDecoder,
    prompts: list[list[int]],
    references: list[list[int]] | None,
    consistency: Consistency,
    *,
    stop_tokens: Collection[int],
    **decoding: Any,
) -> Sequences:
    """What the full model says. references: for "risk", one for each prompt; decoding: `generate`'s settings."""
    if consistency == "risk":
        assert references is not None, "calibrate_early_exit asks for them"
        texts = [_ended(text, stop_tokens, len(text)) for text in references]
        return Sequences(prompts, texts, _said_along(model, Autoregressive(), prompts, texts, stop_tokens, decoding))
    said = generate(model, prompts, Autoregressive(), stop_tokens=stop_tokens, **decoding).tokens
    texts = [_ended(text, stop_tokens, decoding["max_new_tokens"]) for text in said]
    return Sequences(prompts, texts, texts)


def measure(
    model: MoEDecoder,
    strategy: Strategy,
    sequences: Sequences,
    consistency: Consistency,
    *,
    stop_tokens: Collection[int],
    **decoding: Any,
) -> Measured:
    """Decode every sequence with `strategy`, greedily, and compare."""
    layers: list[list[int]] = []
    if consistency == "textual":
        out = generate(model, sequences.prompts, strategy, stop_tokens=stop_tokens, **decoding)
        early, layers = [_ended(text, stop_tokens, decoding["max_new_tokens"]) for text in out.tokens], out.layers_run
    else:
        early = _said_along(model, strategy, sequences.prompts, sequences.texts, stop_tokens, decoding, layers)
    rows = list(zip(early, sequences.texts, sequences.full, strict=True))
    if consistency == "risk":
        losses = [max(0.0, (_differing(said, text) - _differing(full, text)) / len(text)) for said, text, full in rows]
    else:
        losses = [_differing(said, full) / max(len(said), len(full)) for said, _, full in rows]
    places = sum(max(len(said), len(full)) for said, _, full in rows)
    run = [depth for row in layers for depth in row]
    return Measured(
        losses=torch.tensor(losses, dtype=torch.float64),
        agreement=1 - sum(_differing(said, full) for said, _, full in rows) / places,
        mean_layers=sum(run) / len(run) if run else float(model.config.n_layers),
    )


class _Along:
    """A strategy that writes a given text, whatever it would say: each of its tokens is kept in the output, and the
    text's own is taken for the newest in its place. texts [n, N], by the prompts' numbers."""

    def __init__(self, strategy: Strategy, texts: Tensor) -> None:
        self._strategy, self._texts = strategy, texts

    def check(self, config: ModelConfig) -> None:
        """As the strategy."""
        self._strategy.check(config)

    def start(self, session: Session) -> None:
        """As the strategy."""
        self._strategy.start(session)

    def step(self, session: Session) -> None:
        """A round of the strategy's; its token has not been run yet, so that another can stand there."""
        place = session.max_new_tokens - session.remaining[0]  # the same for all rows: none ends before its last token
        self._strategy.step(session)
        session.newest = self._texts[session.rows, place][:, None]


def _said_along(
    model: MoEDecoder,
    strategy: Strategy,
    prompts: list[list[int]],
    texts: list[list[int]],
    stop_tokens: Collection[int],
    decoding: dict[str, Any],
    layers: list[list[int]] | None = None,
) -> list[list[int]]:
    """What the strategy would say at each place of texts; layers is given the layers run at each."""
    count = decoding["max_new_tokens"]
    written = torch.tensor([[*text, *[0] * (count - len(text))] for text in texts], device=model.device).clamp(min=0)
    out = generate(model, prompts, _Along(strategy, written), stop_tokens=[], **decoding)
    if layers is not None:
        layers += [run[: len(text)] for run, text in zip(out.layers_run, texts, strict=True)]
    said = [[_END if token in stop_tokens else token for token in row] for row in out.tokens]
    return [row[: len(text)] for row, text in zip(said, texts, strict=True)]


def _ended(tokens: Sequence[int], stop_tokens: Collection[int], count: int) -> list[int]:
    """A text with its end: a stop token, or where it stopped before `count` tokens, as _END."""
    for place, token in enumerate(tokens):
        if token in stop_tokens:
            return [*tokens[:place], _END]
    return [*tokens, *[_END] * (len(tokens) < count)]


def _differing(one: list[int], other: list[int]) -> int:
    """Places where two texts differ, of the longer one's."""
    return sum(a != b for a, b in zip(one, other, strict=False)) + abs(len(one) - len(other))
