"""From logits to a token: temperature, top-k, top-p, and noise that belongs to a place in the text.

Sampling is by the Gumbel-max trick: the token is argmax(log p + g), g Gumbel noise keyed by (seed, row,
position) and by nothing else. Whoever proposes a token at a position meets the same noise, so the full
model's choice there does not depend on who proposed what: the same seed gives the same text under every
lossless strategy and batch size. Greedy is the case without noise.

Knows nothing of models, caches or drafts. Next: `session.py`.
"""

import math
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

from layerskip_moe.nn import few_rows
from layerskip_moe.nn.noise import hash_uniform_up_to
from layerskip_moe.refusals import require_index, shown


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: 0 takes the most likely token; above 0 the logits are divided by it
        top_k: only the k most likely tokens stay (None: all)
        top_p: only the most likely tokens that together reach this probability stay (None: all; nucleus
            sampling, arXiv 1904.09751)
        seed: of the noise; equal seeds give equal text
        repetition_penalty: above 1 makes tokens less likely that are already in the row, prompt included (CTRL, arXiv
            1909.05858): their logits are divided by it where positive, multiplied where negative; 1 changes nothing
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p", "repetition_penalty"):
            value = getattr(self, name)
            if not isinstance(value, Real) and not (value is None and name == "top_p"):
                raise ValueError(f"{name}={shown(value)} must be a number.")
        if self.top_k is not None:
            require_index("top_k", self.top_k)
        require_index("seed", self.seed)
        if not (self.temperature >= 0.0 and _is_finite(self.temperature)):  # NaN is not either
            raise ValueError(f"temperature={shown(self.temperature)} must be 0 (greedy) or a number above it.")
        if self.top_k is not None and not self.top_k >= 1:
            raise ValueError(f"top_k={self.top_k} must be 1 or more, or None to keep every token.")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1.")
        if not (self.repetition_penalty > 0.0 and _is_finite(self.repetition_penalty)):
            raise ValueError(
                f"repetition_penalty={shown(self.repetition_penalty)} must be a finite number above 0; 1 changes "
                "nothing, 1.2 is usual."
            )

    @property
    def greedy(self) -> bool:
        """Whether there is no noise."""
        return self.temperature == 0.0

    @property
    def filters(self) -> bool:
        """Whether more than temperature and noise decides: some tokens are left out, or weighed down."""
        return self.top_k is not None or self.top_p is not None or self.repetition_penalty != 1.0


def _is_finite(number: float) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # a whole number past what a float holds
        return False


def log_probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """Log-probabilities [..., V] in float64 that a sampled token follows, -inf for those filtered out.

    Temperature first, then top-k, then top-p among what is left, renormalised: the order of transformers.
    """
    assert not sampling.greedy
    scores = logits.double()
    # The best at 0 before dividing: a temperature near 0 would else make infinities, and NaN of them.
    scores = (scores - scores.amax(dim=-1, keepdim=True)) / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < scores.shape[-1]:
        kept = scores.topk(sampling.top_k, dim=-1)
        scores = torch.full_like(scores, float("-inf")).scatter(-1, kept.indices, kept.values)
    if sampling.top_p is not None and sampling.top_p < 1.0:
        ordered, order = scores.sort(dim=-1, descending=True, stable=True)
        probabilities = ordered.softmax(dim=-1)
        # A token stays while those before it have not reached top_p; so the first always stays.
        outside = probabilities.cumsum(dim=-1) - probabilities >= sampling.top_p
        scores = scores.masked_fill(outside.scatter(-1, order, outside), float("-inf"))
    return scores.log_softmax(dim=-1)


def penalize(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits [..., V] with those of `seen` tokens ([..., V] bool) made less likely, as transformers does it."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def gumbel_noise(seed: int, rows: Tensor, positions: Tensor, vocab_size: int, *, stream: int = 0) -> Tensor:
    """Gumbel noise [A, T, V] in float64 for rows [A] and positions [A, T]; `stream` gives independent draws."""
    uniform = hash_uniform_up_to(vocab_size, seed, stream, rows[:, None], positions)
    return uniform.log_().neg_().log_().neg_()


def choose(logits: Tensor, sampling: Sampling, noise: Tensor | None) -> Tensor:
    """Tokens [..., T] from logits [..., T, V] and noise that goes with them, such as [A, T, V] (None when greedy)."""
    if noise is None:
        return logits.argmax(dim=-1)
    if sampling.top_k is None and sampling.top_p is None:  # the same, times the temperature, less a constant
        scaled = (noise * sampling.temperature).expand_as(logits)
        return few_rows.choose(logits.flatten(0, -2), scaled.flatten(0, -2)).view(logits.shape[:-1])
    return (log_probabilities(logits, sampling) + noise).argmax(dim=-1)


def choose_by_margin(logits: Tensor, sampling: Sampling, noise: Tensor | None) -> tuple[Tensor, Tensor]:
    """What `choose` chooses, and margins [..., T] float64: by how much logit and noise of each, in logits, exceed the
    second largest; nan where sampling filters or penalises, for then more decides."""
    if sampling.filters:
        tokens = choose(logits, sampling, noise)
        return tokens, torch.full_like(tokens, math.nan, dtype=torch.float64)
    scaled = None if noise is None else (noise * sampling.temperature).expand_as(logits).flatten(0, -2)
    tokens, margins = few_rows.choose_by_margin(logits.flatten(0, -2), scaled)
    return tokens.view(logits.shape[:-1]), margins.view(logits.shape[:-1])


def choose_with_confidence(logits: Tensor, sampling: Sampling, noise: Tensor | None) -> tuple[Tensor, Tensor]:
    """What `choose` chooses, and how probable each of those tokens was, [A, T] float: under the distribution it was
    drawn from, or, when greedy, the softmax of the logits."""
    if noise is None:
        tokens, logs = logits.argmax(dim=-1), logits.float().log_softmax(dim=-1)
    else:
        logs = log_probabilities(logits, sampling)
        tokens = (logs + noise).argmax(dim=-1)
    return tokens, logs.gather(-1, tokens[..., None])[..., 0].exp().float()
