"""What a change changed, from pairs of runs that differ in nothing else: the mean difference and how sure it is.

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
    """The mean of n differences, and its 95% confidence interval.

    Attributes:
        mean: of the differences
        low: the interval's lower end; None for a single pair, which says nothing of its spread
        high: its upper end; likewise
        pairs: n
    """

    mean: float
    low: float | None
    high: float | None
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
        return PairedDifference(middle, None, None, 1)
    reach = _T[min(n - 1, len(_T)) - 1] * stdev(differences) / math.sqrt(n)
    return PairedDifference(middle, middle - reach, middle + reach, n)
