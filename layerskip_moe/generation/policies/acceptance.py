"""Acceptance: how often the full model agrees with each exit, by row and place of a draft, and how far a draft's
certainty tells that it will.

Knows nothing of time. Next: `adaptive.py`, which weighs acceptance against it.
"""

import math
from collections.abc import Sequence

_DECAY, _POOLED_DECAY = 0.97, 0.999  # per observation, of a row's counts, and of those of all rows and texts
_ROW_WEIGHT, _PLACE_WEIGHT = 8.0, 4.0  # tries that the prior of a row, and of a place, counts as
_PAIRS = 128  # (certainty, accepted) that the exponent is fitted to
_FEWEST_PAIRS, _NEW_PAIRS = 24, 16  # for a first fit, and for the next one

_Counts = list[list[float]]  # by place of a draft: [times right, tries], where all before it were right


class Acceptance:
    """Of `exits`, for drafts of up to `length` tokens.

    P(place k is right | those before it are) is estimated from decayed counts: of a row, with those of all rows and
    texts as its prior, and of a place, with the place before as its prior; one half where nothing is known.
    """

    def __init__(self, exits: Sequence[int], length: int) -> None:
        self.exits, self.length = tuple(exits), length
        self._pooled: dict[int, _Counts] = {exit_layer: self._nothing() for exit_layer in exits}
        self._rows: dict[tuple[int, int], _Counts] = {}  # by row and exit
        self._pairs: dict[int, list[tuple[float, bool]]] = {exit_layer: [] for exit_layer in exits}
        self._exponents: dict[int, float] = {}
        self._new_pairs = dict.fromkeys(exits, 0)  # since the last fit

    def _nothing(self) -> _Counts:
        return [[0.0, 0.0] for _ in range(self.length)]

    def begin(self) -> None:
        """Forget the rows: another text begins."""
        self._rows.clear()

    def see_draft(self, row: int, exit_layer: int, drafted: int, accepted: int) -> None:
        """A round of that row: `accepted` of `drafted` tokens were right before the first that was not."""
        self._see(row, exit_layer, [True] * accepted + [False] * (drafted > accepted))

    def see_given_up(self, row: int, exit_layer: int, place: int, certainty: float) -> None:
        """A draft at that place, behind ones that were right, was not verified: it counts as likely as it seemed."""
        exponent = self.exponent(exit_layer)
        if exponent is not None and place < self.length:
            self._count(row, exit_layer, place, certainty**exponent)

    def see_text(self, row: int, exit_layer: int, right: Sequence[bool]) -> None:
        """Whether the exit was right at successive places of the text: each may have begun a draft."""
        for start in range(len(right)):
            wrong = next((place for place in range(start, len(right)) if not right[place]), None)
            self._see(row, exit_layer, right[start : len(right) if wrong is None else wrong + 1])

    def _see(self, row: int, exit_layer: int, right: Sequence[bool]) -> None:
        for place, was_right in enumerate(right[: self.length]):
            self._count(row, exit_layer, place, was_right)

    def _count(self, row: int, exit_layer: int, place: int, right: float) -> None:
        own = self._rows.setdefault((row, exit_layer), self._nothing())
        for counts, decay in ((own, _DECAY), (self._pooled[exit_layer], _POOLED_DECAY)):
            count = counts[place]
            count[0] = decay * count[0] + right
            count[1] = decay * count[1] + 1

    def rates(self, row: int, exit_layer: int, *, doubt: float = 0.0) -> list[float]:
        """For each place of a draft, the probability that it is right where all before it are; less `doubt` standard
        errors."""
        own = self._rows.get((row, exit_layer))
        rates, prior = [], 0.5
        for place, (right, tries) in enumerate(self._pooled[exit_layer]):
            rate = (right + _PLACE_WEIGHT * prior) / (tries + _PLACE_WEIGHT)
            if own is not None:
                rate = (own[place][0] + _ROW_WEIGHT * rate) / (own[place][1] + _ROW_WEIGHT)
            weighed = tries + _PLACE_WEIGHT if own is None else own[place][1] + min(tries, _ROW_WEIGHT) + _PLACE_WEIGHT
            rates.append(max(rate - doubt * math.sqrt(rate * (1 - rate) / weighed), 0.0))
            prior = rate
        return rates

    def see_certainties(self, exit_layer: int, certainties: Sequence[float], accepted: int) -> None:
        """How certain a round's drafts were, of which so many were right; those behind the first wrong one tell
        nothing."""
        pairs = self._pairs[exit_layer]
        pairs += [(certainty, place < accepted) for place, certainty in enumerate(certainties[: accepted + 1])]
        self._new_pairs[exit_layer] += min(accepted + 1, len(certainties))
        del pairs[:-_PAIRS]

    def fit_exponents(self) -> None:
        """Fit P(right) = certainty ^ exponent, by maximum likelihood, for each exit of which enough was seen since."""
        for exit_layer, pairs in self._pairs.items():
            if len(pairs) >= _FEWEST_PAIRS and self._new_pairs[exit_layer] >= _NEW_PAIRS:
                self._new_pairs[exit_layer] = 0
                self._exponents[exit_layer] = _fitted_exponent(pairs)

    def exponent(self, exit_layer: int) -> float | None:
        """The exponent in P(right) = certainty ^ exponent; None where too little was seen to fit one."""
        return self._exponents.get(exit_layer)


def _fitted_exponent(pairs: Sequence[tuple[float, bool]]) -> float:
    """The largest likelihood's, between 0.02 and 4. It has one maximum, as its logarithm is concave in the exponent."""
    logs = [(math.log(min(max(certainty, 1e-9), 1 - 1e-6)), right) for certainty, right in pairs]

    def slope(exponent: float) -> float:
        total = 0.0
        for log, right in logs:
            probability = math.exp(exponent * log)
            total += log if right else -log * probability / (1 - probability)
        return total

    low, high = 0.02, 4.0
    for _ in range(12):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    return math.sqrt(low * high)
