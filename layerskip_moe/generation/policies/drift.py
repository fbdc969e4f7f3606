"""Drift: by how much drafting is dearer or cheaper than reckoned, beside plain steps, on this machine by now.

log(seconds / seconds reckoned) is `level` for plain steps and `level` + `offset` for rounds that draft, and noise. A
machine's level moves by a third within minutes and hits both alike; the offset, which is what a choice between the
two is about, moves slowly. A Kalman filter of the two (Kalman 1960) tells them apart: the offset is learnt where one
kind of step follows the other, and hardly from rounds that only ever follow their like, so that a plan that was
followed while all was fast is not kept for it.

Knows nothing of plans. Next: `adaptive.py`, which weighs by it.
"""

import math

_LEVEL_MOVES, _OFFSET_MOVES = 5e-4, 4e-6  # variances, from one step to the next
_NOISE = 0.02  # variance of a step
_FAR = 0.25  # no step tells of more: something else may have come between
_LEVEL = 0.3  # standard deviation of the level before anything is seen: machines drift by as much


class Drift:
    """Attributes:
    offset: the best guess; 0.1: drafting takes e^0.1 times as long as was reckoned, beside plain steps
    """

    def __init__(self, doubt: float) -> None:
        """doubt: standard deviation of the offset before anything is seen; 0: it is 0, and stays so."""
        self.offset = self._level = 0.0
        self._most = doubt**2
        # Variances of level and offset, and what they have in common.
        self._of_level, self._of_offset, self._common = _LEVEL**2, self._most, 0.0

    @property
    def level(self) -> float:
        """The best guess of how much longer than reckoned all steps take, plain ones too, as a logarithm."""
        return self._level

    @property
    def doubt(self) -> float:
        """The standard deviation of the offset."""
        return math.sqrt(self._of_offset)

    def see(self, seconds: float, reckoned: float, *, drafting: bool) -> None:
        """How long a step took, and how long it should have; what took no time, or should have, tells nothing."""
        if not (self._most and seconds > 0 and reckoned > 0):
            return
        self._of_level += _LEVEL_MOVES
        self._of_offset = min(self._of_offset + _OFFSET_MOVES, self._most)
        level, offset = self._of_level + drafting * self._common, self._common + drafting * self._of_offset
        total = level + drafting * offset + _NOISE
        off = math.log(seconds / reckoned) - self._level - drafting * self.offset
        off = min(max(off, -_FAR), _FAR)
        self._level += level / total * off
        self.offset += offset / total * off
        self._of_level -= level * level / total
        self._common -= level * offset / total
        self._of_offset -= offset * offset / total
