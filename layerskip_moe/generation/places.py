"""Places of a round of which each row has as many as it likes: the newest token, place 0, and the drafts after it.

Where rows have different numbers of them, each place is run as a row of its own, over its row's cache.

N places of any rows, A active rows, T places of the row that has most, V vocabulary. Knows nothing of drafts. Next:
`drafting.py` and `proposals.py`, which run them.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from layerskip_moe.generation.session import Session


def in_turn(places: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
    """Some places of each row, one after the other: N rows and N places."""
    return [row for row, some in enumerate(places) for _ in some], [place for some in places for place in some]


def as_index(session: Session, rows: Sequence[int], places: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The same as tensors [N]."""
    device = session.newest.device
    return torch.tensor(rows, device=device), torch.tensor(places, device=device)


def where(session: Session, rows: Tensor, places: Tensor) -> dict[str, Any]:
    """The cache and the positions [N, 1] of these places, as `MoEDecoder.run` takes them."""
    cache = session.cache.subset(rows)
    return {"cache": cache, "positions": (cache.lengths + places)[:, None]}


def by_row(told: Tensor, rows: Tensor, places: Tensor, *, shape: tuple[int, int]) -> Tensor:
    """Logits [N, 1, V] of these places -> [A, T, V], zeros elsewhere; shape: (A, T)."""
    return told.new_zeros(*shape, told.shape[-1]).index_put((rows, places), told[:, 0])
