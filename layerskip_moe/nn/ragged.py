"""Rows of which each has as many places as it likes: a newest token, place 0, and drafts after it.

Where rows have different numbers of places, each place is run as a row of its own, over its row's cache.

N places of any rows, A rows, T places of the row that has most, V vocabulary. Knows nothing of models. Next:
`rounds.py` and `generation/drafting.py`, which run them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from layerskip_moe.refusals import require_index

MOST_PROPOSED = 8  # places that are run over at a time, see `Stage`
LOOK_BACK = 1024  # tokens of a text in which its last ones are looked for
# Drafts that are looked up, over the tokens by which a text has repeated itself. After m of these it goes on to do so
# for k more with a probability of about m / (m + k), and a third is about what verifying one more must promise.
MOST_PER_REPEATED = 2

Judged = tuple[float, bool]  # of a draft: its margin (nan: not known), and whether the model that verifies agreed


def likely_right(margin: float, half: float) -> float:
    """How likely a draft of that margin, 0 or more, is right, where one of margin `half` is right half of the time."""
    return 1.0 - math.exp2(-math.sqrt(margin / half))


@dataclass(frozen=True)
class MarginRule:
    """When a row drafts no more: by its drafts' margins, which are by how much what a draft was chosen by, its logit
    and its place's noise, is larger than the second largest (of int8 drafts, as `few_rows.choose_by_margin` says). The
    model that verifies chooses with the same noise, so that a draft which was clearly the first is likely to be its
    choice, too.

    A draft of margin m is taken to be right with probability 1 - 2^-sqrt(m / half), and is kept while all of a row's
    drafts so far, it too, are right with probability `least` or more.

    Attributes:
        halves: by row, above 0, in logits: the margin of drafts that are right half of the time
        least: 0 to 1; 0 keeps all, but for margins that are no numbers
    """

    halves: Sequence[float]
    least: float

    def __post_init__(self) -> None:
        if not isinstance(self.halves, Sequence):
            raise ValueError(f"halves={self.halves!r} must be a list, with a number for each row.")
        if not all(half > 0 for half in self.halves) or not 0 <= self.least <= 1:
            raise ValueError(f"halves={list(self.halves)} must be above 0, and least={self.least} between 0 and 1.")

    def kept(self, margins: Tensor, limits: Sequence[int]) -> list[int]:
        """How many of each row's drafts are kept, of margins [A, T - 1] and up to its limit."""
        found = []
        for half, of_row, limit in zip(self.halves, margins.tolist(), limits, strict=True):
            all_right, count = 1.0, 0
            for margin in of_row[:limit]:
                all_right *= likely_right(margin, half)
                if not all_right >= self.least:  # (nor where it is not a number)
                    break
                count += 1
            found.append(count)
        return found


@dataclass(frozen=True)
class Stage:
    """How drafts are made in two stages: the first layers propose tokens one after another while they are sure, and
    the other layers that draft run over all of these at once, `MOST_PROPOSED` at most, and choose. The drafts are the
    same, in fewer runs of the later layers (staged speculative decoding, Spector and Re, arXiv 2308.04623). Where the
    text's last tokens stood in it before, what followed them there is proposed instead, and both stages run over it
    once. Where so many stood there that the text may be trusted to go on repeating itself, what followed is drafted
    as it is, and nothing after it: no layer is asked, for up to `MOST_PER_REPEATED` times as many tokens as stood
    there. In a round in which a proposal of the text was wrong, the text is not asked again.

    Attributes:
        exit_layer: the layers that propose, fewer than draft
        sure: the least margin of a proposal that is followed, 0 or more
        lookup: how many last tokens must have stood in the text before, of the last `LOOK_BACK`, for what followed to
            be proposed; 0: the text is not asked
        sure_lookup: how many for it to be drafted as it is, `lookup` or more; 0: it never is, and drafts are those that
            the layers would make one by one, to the last bit
    """

    exit_layer: int
    sure: float
    lookup: int = 4
    sure_lookup: int = 0

    def __post_init__(self) -> None:
        for name in ("exit_layer", "lookup", "sure_lookup"):
            require_index(name, getattr(self, name))
        if not (self.exit_layer >= 1 and self.sure >= 0 and 0 <= self.lookup < LOOK_BACK):
            raise ValueError(
                f"exit_layer={self.exit_layer} must be 1 or more, sure={self.sure} 0 or more, and lookup={self.lookup} "
                f"0 to {LOOK_BACK - 1}."
            )
        if self.sure_lookup and not 0 < self.lookup <= self.sure_lookup < LOOK_BACK:
            raise ValueError(
                f"sure_lookup={self.sure_lookup} must be 0, or from lookup={self.lookup}, which then is 1 or more, to "
                f"{LOOK_BACK - 1}."
            )


class Staged(NamedTuple):
    """What was done to make drafts in stages: how many layers propose, how often they ran, how often the others that
    draft did, the places that both ran over, how often the head did; of what is expected, not whole numbers; and how
    many drafts, the last ones, were looked up instead."""

    exit_layer: int
    proposing: float
    choosing: float
    places: float
    heads: float
    looked_up: int = 0


def in_turn(places: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
    """Some places of each row, one after the other: N rows and N places."""
    return [row for row, some in enumerate(places) for _ in some], [place for some in places for place in some]


def as_index(rows: Sequence[int], places: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """The same as tensors [N]."""
    return torch.tensor(rows, device=device), torch.tensor(places, device=device)


def by_row(told: Tensor, rows: Tensor, places: Tensor, *, shape: tuple[int, int]) -> Tensor:
    """Logits [N, 1, V] of these places -> [A, T, V], zeros elsewhere; shape: (A, T)."""
    return told.new_zeros(*shape, told.shape[-1]).index_put((rows, places), told[:, 0])


def before_the_first_wrong(right: Tensor, limits: Sequence[int]) -> list[int]:
    """How many of each row's drafts, right [A, T - 1] bool, come before the first that is not, up to its limit."""
    return [[*row[:limit], False].index(False) for row, limit in zip(right.tolist(), limits, strict=True)]
