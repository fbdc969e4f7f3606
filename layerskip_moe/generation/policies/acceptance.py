"""Acceptance: how likely the full model is to agree with an exit's next draft, learnt from what it agreed with before.

Draft and full model choose with the same noise, so that much depends on a draft's margin m, by how much what it was
chosen by is larger than the second largest:

    P(right) = 1 - 2^-sqrt(m / h),

right half of the time where m = h. (Of int8 drafts of a model trained here, by all exits, greedy and sampled, this has
a better likelihood than m / (m + h), which doubts large margins too much: of many drafts in a row, it trusts too few.)

How margins are spread over places decides between plans, and so how sure drafts must be; how likely a single draft is
right, its own margin alone. They are taken to be exponentially distributed about a text's own mean M, whatever the
exit: that is what noise makes of them where no token dominates, and was measured to be close here, greedy text
included; a model that is sure of most tokens has narrower ones. So all that is to be known is h, of which -log h = b +
d: b is the exit's, kept from text to text, d the row's, which tells easy stretches from hard; and M, the rows' and that
of all. Where margins are not known, P(right) is the mean over them, which depends on h / M alone.

b and d take a step for each draft that was judged, b a smaller one the more it has seen: along the gradient of the
log-likelihood, with large ones cut off; where margins are not known, by how far right or wrong is from the rate. Knows
nothing of time. Next: `adaptive.py`, which weighs acceptance against it.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, pairwise

from layerskip_moe.nn.ragged import Judged, likely_right

# By place of a draft: the share of rounds that keep as many, and how likely these are all right then.
Course = tuple[tuple[float, float], ...]

_FIRST_GUESS = 2.5  # b of an exit of which nothing is known: right half of the time where the margin is 0.08
_SURE_GUESS = 7.0  # the same of one that is sure: 0.0009
# b moves by _STEP / (1 + _SLOWER * seen), and at least by _STEP / _SLOWEST.
_STEP, _SLOWER, _SLOWEST = 0.5, 0.15, 160.0
_ROW_STEP = 0.12
_LEVEL_STEP, _ROW_LEVEL_STEP = 0.02, 0.04  # of mean log margins
_MEAN_LOG = -0.5772  # of exponentially distributed numbers whose mean is 1
_LARGEST = 1.0  # gradient of a draft
_FARTHEST = 8.0  # log margins are taken to lie between minus and plus this
# Quantiles between which margins are taken to be all the same: close together where they are small, for there the
# drafts of a sure exit are wrong, if they are. Each part's share, and its margin, over the mean of all.
_QUANTILES = [0.0, *(2.0**-power for power in range(12, 5, -1)), *(part / 32 for part in range(1, 33))]
_SHARES = [high - low for low, high in pairwise(_QUANTILES)]
_MARGINS = [-math.log(1 - (low + high) / 2) for low, high in pairwise(_QUANTILES)]


class Acceptance:
    """Of drafts by some exits.

    Attributes:
        exits: all that it knows
        told: those of them that looks tell of
        seen: drafts judged so far, of the exit that has fewest, but for sure ones
    """

    def __init__(self, exits: Sequence[int], *, sure: Sequence[int] = ()) -> None:
        """sure: further exits, whose drafts are nearly what the model itself says: all of its layers, in fewer bits"""
        self.exits, self.told = (*exits, *sure), tuple(exits)
        self._exits = {exit_layer: [_FIRST_GUESS, 1.0] for exit_layer in exits}  # b, and 1 + _SLOWER * seen
        self._exits |= {exit_layer: [_SURE_GUESS, 1.0] for exit_layer in sure}
        self._level = _MEAN_LOG  # mean log margin
        self._rows: dict[int, list[float]] = {}  # d, and by how much the row's mean log margin lies above

    @property
    def seen(self) -> int:
        """How many drafts of the exit that was judged least, sure ones left aside, were judged, up to a thousand."""
        return round((min((self._exits[exit_layer][1] for exit_layer in self.told), default=1.0) - 1) / _SLOWER)

    def begin(self) -> None:
        """Forget the rows: another text begins."""
        self._rows.clear()

    def see(self, row: int, exit_layer: int, judged: Sequence[Judged], *, exits_told: int = 1) -> None:
        """Drafts of that row that were judged; where so many exits were told of the same places, each tells of the row
        that much less."""
        known, of_row = self._exits[exit_layer], self._rows.setdefault(row, [0.0, 0.0])
        (of_exit, slower), (differs, above), level = known, of_row, self._level
        for margin, right in judged:
            if math.isnan(margin):
                wrong_by = right - _course(_in_quarters(of_exit + differs, level + above), 0, 1)[0][1]
            else:
                log_margin = min(max(math.log(margin), -_FARTHEST), _FARTHEST) if margin > 0 else -_FARTHEST
                wrong_by = _gradient(log_margin + of_exit + differs, right)
                higher = (log_margin - level - above) / exits_told
                level += _LEVEL_STEP * higher
                above += _ROW_LEVEL_STEP * higher
            slower = min(slower + _SLOWER, _SLOWEST)
            of_exit += _STEP / slower * wrong_by
            differs += _ROW_STEP / exits_told * wrong_by
        known[:], of_row[:], self._level = (of_exit, slower), (differs, above), level

    def half(self, row: int, exit_layer: int) -> float:
        """h: the margin at which that exit's drafts are right half of the time."""
        return math.exp(-self._exits[exit_layer][0] - self._rows.get(row, (0.0, 0.0))[0])

    def course(self, row: int, exit_layer: int, least: float, length: int) -> Course:
        """Of rounds of at most so many drafts by that exit, kept while all are right with probability `least` or
        more."""
        return _course(self._quarters(row, exit_layer), round(32 * least), length)

    def totals(self, row: int, exit_layer: int, least: float, length: int) -> tuple[float, float, float]:
        """Of such a round: drafts that are kept, those of them that are right, and drafts that are made."""
        return _totals(self._quarters(row, exit_layer), round(32 * least), length)

    def _quarters(self, row: int, exit_layer: int) -> int:
        """Of log(M / h). (Not to the last digit: courses are the same then, and known.)"""
        of_row, above = self._rows.get(row, (0.0, 0.0))
        return _in_quarters(self._exits[exit_layer][0] + of_row, self._level + above)

    def rate(self, row: int, exit_layer: int) -> float:
        """The probability that a draft is right of whose margin nothing is known."""
        return self.course(row, exit_layer, 0.0, 1)[0][1]


@lru_cache(maxsize=4096)
def _course(quarters: int, least: int, length: int) -> Course:
    """Where log(M / h) is so many quarters, and `least` so many 32nds. Drafts are right independently of each other."""
    half = math.exp(-min(max(quarters / 4, -30.0), 30.0))
    rising = [likely_right(margin, half) for margin in _MARGINS]
    # Of the margins from each one on: their share, and the share that is right, too.
    shares_right = [share * likely for share, likely in zip(_SHARES, rising, strict=True)]
    shares, rights = ([*accumulate(reversed(parts), initial=0.0)][::-1] for parts in (_SHARES, shares_right))
    kept, right, course = 1.0, 1.0, list[tuple[float, float]]()
    for _ in range(length):
        first = bisect_left(rising, least / 32 / right) if least else 0
        kept *= shares[first]
        right *= rights[first] / shares[first] if shares[first] else 1.0
        course.append((kept, right))
    return tuple(course)


@lru_cache(maxsize=4096)
def _totals(quarters: int, least: int, length: int) -> tuple[float, float, float]:
    """The sums of such a course."""
    course = _course(quarters, least, length)
    kept = sum(share for share, _ in course)
    # The first draft is made in any case, each other one where the one before it was kept.
    return kept, sum(share * right for share, right in course), 1.0 + kept - course[-1][0]


def _in_quarters(minus_log_half: float, level: float) -> int:
    """Of log(M / h), of -log h and mean log margin."""
    return round(4 * (minus_log_half + level - _MEAN_LOG))


def _gradient(log_ratio: float, right: bool) -> float:
    """Of the log-likelihood of one draft by -log h, of log(m / h); weighted down where that is large, lest one draft
    that was wrong in spite of its margin counts for many."""
    exponent = math.log(2) * math.exp(min(max(log_ratio, -60.0), 60.0) / 2)
    wrong = math.exp(-exponent)
    step = min(exponent / 2, _LARGEST)
    return step * wrong / -math.expm1(-exponent) if right else -step
