"""Choosing a scalar so that a mean loss is bounded: learn then test (Angelopoulos et al., arXiv 2110.01052), as CALM
uses it for early exit (arXiv 2207.07061, section 4).

Losses of n sequences, each in [0, 1]; a tolerance for their expectation, a risk of breaking it. For each candidate the
null hypothesis is that its expected loss is above the tolerance; a valid p-value of it is at most x with probability at
most x, whatever n. Testing candidates in an order that was fixed before, and stopping at the first that is not
rejected, keeps the risk for all of them together.
Knows nothing of models or exits. Next: `calibrate.py`, which supplies the losses.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Trial:
    """One candidate's test.

    Attributes:
        scale: the candidate
        mean_loss: of the sequences
        p_value: of "the expected loss is above the tolerance"
    """

    scale: float
    mean_loss: float
    p_value: float


def check_promise(tolerance: float, risk: float) -> None:
    """Raise ValueError unless both lie between 0 and 1."""
    for name, value in (("tolerance", tolerance), ("risk", risk)):
        if not 0 < value < 1:  # NaN is not either
            raise ValueError(f"{name}={value} must be above 0 and below 1; 0.05 is usual.")


def sequences_needed(tolerance: float, risk: float) -> int:
    """The least n that certifies anything: without any loss the p-value is (1 - tolerance)^n, so n is the least with
    (1 - tolerance)^n <= risk; 59 at 0.05 and 0.05."""
    check_promise(tolerance, risk)
    n = max(1, math.floor(math.log(risk) / math.log1p(-tolerance)))  # one too few at most
    return n if p_value(torch.zeros(n), tolerance) <= risk else n + 1


def p_value(losses: Tensor, tolerance: float) -> float:
    """Hoeffding-Bentkus p-value of "the expected loss is above the tolerance", of losses [n], each in [0, 1].

    With R their mean: min(exp(-n h(min(R, tolerance), tolerance)), e P[Binomial(n, tolerance) <= ceil(n R)]), and at
    most 1; h(a, b) = a ln(a / b) + (1 - a) ln((1 - a) / (1 - b)). Never above Hoeffding's exp(-2 n max(0, tolerance -
    R)^2). Raises ValueError for no losses, and for losses outside [0, 1].
    """
    n = losses.numel()
    if not n or not bool(((losses >= 0) & (losses <= 1)).all()):
        raise ValueError("losses must be one or more numbers between 0 and 1, one for each sequence.")
    total = float(losses.double().sum())
    hoeffding = -n * _divergence(min(total / n, tolerance), tolerance)
    bentkus = 1 + _log_binomial_cdf(math.ceil(total), n, tolerance)
    return math.exp(min(hoeffding, bentkus, 0.0))


def walk(
    losses_at: Callable[[float], Tensor], scales: Sequence[float], *, tolerance: float, risk: float
) -> list[Trial]:
    """Test one scale after the other, in the order given, up to the first whose p-value is above the risk.

    losses_at: scale -> losses [n], each in [0, 1], of the same n sequences at every scale, none of which had a part in
        choosing the scales

    -> every test made. All that have p_value <= risk come first, and with probability at least 1 - risk the expected
    loss of every one of them is at most the tolerance; a last one above the risk is what stopped the walk, and is not
    certified. (A public copy of CALM gives that last one back: its loss breaks the bound far more often.)
    """
    check_promise(tolerance, risk)
    tests: list[Trial] = []
    for scale in scales:
        losses = losses_at(scale)
        tests.append(Trial(scale, float(losses.double().mean()), p_value(losses, tolerance)))
        if tests[-1].p_value > risk:
            break
    return tests


def certified(tests: Sequence[Trial], *, risk: float) -> Trial | None:
    """The furthest scale that a walk certified; None where its first test failed."""
    return next((test for test in reversed(tests) if test.p_value <= risk), None)


def _divergence(a: float, b: float) -> float:
    """Kullback-Leibler divergence of a coin of a from a coin of b, in nats; 0 <= a <= b < 1."""
    return (a * math.log(a / b) if a else 0.0) + (1 - a) * math.log((1 - a) / (1 - b))


def _log_binomial_cdf(k: int, n: int, p: float) -> float:
    """ln P[Binomial(n, p) <= k]."""
    if k >= n:
        return 0.0
    i = torch.arange(k + 1, dtype=torch.float64)
    choose = math.lgamma(n + 1) - torch.lgamma(i + 1) - torch.lgamma(n - i + 1)
    return float((choose + i * math.log(p) + (n - i) * math.log1p(-p)).logsumexp(dim=0))
