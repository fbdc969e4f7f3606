"""Acceptance: how likely the full model is to agree with an exit's next draft, learnt from what it agreed with before.

P(right) = sigmoid(b + d), and sigmoid(b + c + d) behind drafts that were right: b is the exit's and c all exits', kept
from text to text; d is the row's, and tells easy text from hard, whatever the exit. All take a step along the gradient
of the log-likelihood for each draft that was judged, b and c a smaller one the more they have seen. With one number for
each exit and one for each row there is little to be deceived by: the best of many plans is chosen by them.

Knows nothing of time. Next: `adaptive.py`, which weighs acceptance against it.
"""

import math
from collections.abc import Sequence

_FIRST_GUESS = 0.8  # b of an exit of which nothing is known: 69%
# b and c move by _STEP / (1 + _SLOWER * seen), and at least by _STEP / _SLOWEST.
_STEP, _SLOWER, _SLOWEST = 2.0, 0.15, 160.0
_ROW_STEP = 0.15


class Acceptance:
    """Of drafts by some exits.

    Attributes:
        seen: drafts judged so far, of the exit that has fewest
    """

    def __init__(self, exits: Sequence[int]) -> None:
        self._exits = {exit_layer: [_FIRST_GUESS, 1.0] for exit_layer in exits}  # b, and 1 + _SLOWER * seen
        self._later = [0.0, 4.0]  # c, and the same; it is learnt more slowly
        self._rows: dict[int, float] = {}

    @property
    def seen(self) -> int:
        """How many drafts of the exit that was judged least were judged, up to a thousand."""
        return round((min((weight for _, weight in self._exits.values()), default=1.0) - 1) / _SLOWER)

    def begin(self) -> None:
        """Forget the rows: another text begins."""
        self._rows.clear()

    def see_draft(self, row: int, exit_layer: int, drafted: int, accepted: int) -> None:
        """A round of that row: `accepted` of `drafted` tokens were right before the first that was not."""
        for place in range(min(accepted + 1, drafted)):
            self._see(row, exit_layer, place == 0, place < accepted, _ROW_STEP)

    def see_text(self, row: int, exit_layer: int, right: Sequence[bool]) -> None:
        """Whether the exit would have been right at successive places of the row's text; of all exits, a place tells of
        the row once."""
        for place, was_right in enumerate(right):
            first = place == 0 or not right[place - 1]
            self._see(row, exit_layer, first, was_right, _ROW_STEP / len(self._exits))

    def _see(self, row: int, exit_layer: int, first: bool, right: bool, row_step: float) -> None:
        known, of_row = self._exits[exit_layer], self._rows.get(row, 0.0)
        wrong_by = right - _sigmoid(known[0] + of_row + (0.0 if first else self._later[0]))
        for moved in (known,) if first else (known, self._later):
            moved[1] = min(moved[1] + _SLOWER, _SLOWEST)
            moved[0] += _STEP / moved[1] * wrong_by
        self._rows[row] = of_row + row_step * wrong_by

    def rates(self, row: int, exit_layer: int) -> tuple[float, float]:
        """The probability that a round's first draft is right, and that one behind right ones is."""
        logit = self._exits[exit_layer][0] + self._rows.get(row, 0.0)
        return _sigmoid(logit), _sigmoid(logit + self._later[0])


def _sigmoid(logit: float) -> float:
    return 1.0 / (1.0 + math.exp(-min(max(logit, -30.0), 30.0)))
