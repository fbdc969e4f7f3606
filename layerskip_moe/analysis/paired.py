"""What a change changed, from pairs of runs that differ in nothing else: the mean difference and how sure it is, and
how sure many such are together.

Knows nothing of what was measured. Next: `ablation/summary.py`, which pairs runs by seed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

# Student's t at 0.975 for 1, 2, ... 30 degrees of freedom.
_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


@dataclass(frozen=True)
class PairedDifference:
    """The mean of n differences, its 95% confidence interval, and how likely chance alone is to give as much.

    Attributes:
        mean: of the differences
        low: the interval's lower end; None for a single pair, which says nothing of its spread
        high: its upper end; likewise
        p: of Student's two-sided test that the differences' mean is 0; below 0.05 where the interval leaves out 0;
            likewise
        pairs: n
    """

    mean: float
    low: float | None
    high: float | None
    p: float | None
    pairs: int


def paired_difference(
    values: Sequence[float], baseline: Sequence[float], *, relative: bool = False
) -> PairedDifference:
    """Mean of d_i = values[i] - baseline[i] and Student's interval mean +- t s / sqrt(n), with s the differences'
    standard deviation and t of n - 1 degrees of freedom at 97.5% (past 30 of them that of 30, which is a little wide).

    relative: differences as shares of the baseline, d_i = values[i] / baseline[i] - 1.
    The interval takes differences to be normal. Raises ValueError without pairs, or for lists of different lengths.
    """
    if not values or len(values) != len(baseline):
        raise ValueError(
            f"{len(values)} values and {len(baseline)} of the baseline make no pairs; give as many of each, at least 1."
        )
    pairs = list(zip(values, baseline, strict=True))
    differences = [value / base - 1 if relative else value - base for value, base in pairs]
    n, middle = len(differences), mean(differences)
    if n == 1:
        return PairedDifference(middle, None, None, None, 1)
    error = stdev(differences) / math.sqrt(n)
    reach = _T[min(n - 1, len(_T)) - 1] * error
    t = middle / error if error else math.copysign(math.inf, middle) if middle else 0.0
    return PairedDifference(middle, middle - reach, middle + reach, student_p(t, n - 1), n)


def student_p(t: float, degrees: int) -> float:
    """P(|T| >= |t|) for Student's T with so many degrees of freedom, 1 or more, by the finite series of Abramowitz and
    Stegun, 26.7.3 and 26.7.4, in angle = atan(t / sqrt(degrees)); off by at most some 1e-15."""
    angle = math.atan(abs(t) / math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for k in range(1 + odd, degrees, 2):  # 1, cos^2 / 2, 1*3 cos^4 / (2*4), ...; or cos, 2 cos^3 / 3, ...
        total += term
        term *= cosine**2 * k / (k + 1)
    within = 2 / math.pi * (angle + sine * total) if odd else sine * total
    return min(max(1 - within, 0.0), 1.0)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the same order: to call all those below 0.05 real is to be wrong about any of them
    in at most 5% of cases, however many were tested and however they hang together. The k-th smallest of n becomes
    (n - k + 1) p, no less than the one before and at most 1 (Holm, Scandinavian Journal of Statistics 6, 1979)."""
    adjusted, least = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        least = max(least, min((len(p_values) - rank) * p_values[place], 1.0))
        adjusted[place] = least
    return adjusted
