"""Rows of which each has as many places as it likes: a newest token, place 0, and drafts after it.

Where rows have different numbers of places, each place is run as a row of its own, over its row's cache.

N places of any rows, A rows, T places of the row that has most, V vocabulary. Knows nothing of models. Next:
`rounds.py` and `generation/drafting.py`, which run them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


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
