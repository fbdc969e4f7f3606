"""Fixed: the same exit layer and draft length in every round.

Next: `heuristic.py`, which adapts the length.
"""

from dataclasses import dataclass
from numbers import Real
from typing import Any

from layerskip_moe.generation.policies.policy import RoundReport
from layerskip_moe.generation.session import Session
from layerskip_moe.nn.ragged import Stage
from layerskip_moe.refusals import require_index, shown

_MOST = 2**16  # drafts


@dataclass(frozen=True)
class Fixed:
    """Always the same.

    Attributes:
        exit_layer: the layers that draft, n in 1..L
        draft_length: tokens drafted per round; 0 is plain decoding
        int8_drafts: whether drafts are made from int8 copies of the weights, see `SelfSpeculative`
        stage: how those of one row are made in two stages; None: one by one
    """

    exit_layer: int
    draft_length: int
    int8_drafts: bool = False
    stage: Stage | None = None

    shadow = False
    should_stop = None

    def __post_init__(self) -> None:
        check_length("draft_length", self.draft_length, least=0)

    def plan(self, session: Session) -> list[tuple[int, int]]:
        """The same for every row."""
        return [(self.exit_layer, self.draft_length)] * len(session.row_numbers)

    def observe(self, round: RoundReport) -> None:
        """Nothing is learnt."""


def check_length(name: str, length: int, *, least: int = 1) -> None:
    """Raise ValueError for a number of drafts below `least`, or past what any round has: policies weigh each number."""
    require_index(name, length)
    if length < least:
        raise ValueError(f"{name}={length} must be {least} or more: it counts tokens.")
    if length > _MOST:
        raise ValueError(f"{name}={shown(length)} is more than any round has; it must be {_MOST} or less.")


def is_share(value: Any) -> bool:
    """Whether it is a number between 0 and 1."""
    is_number = isinstance(value, Real)
    return is_number and 0 <= value <= 1  # NaN is not either
