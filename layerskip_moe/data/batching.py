"""A stream of tokens cut into examples: shuffled without end for training, in order for evaluation.

Example `w` of a stream is its tokens w*T .. w*T+T: the inputs are the first T of them, the labels the last T,
so every token but the first is a label once. Knows nothing of text or models.
"""

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

Item = TypeVar("Item")


def batches(
    tokens: Tensor, *, seq_len: int, batch_size: int, seed: int, start: int = 0, part: tuple[int, int] = (0, 1)
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Endless training batches (inputs [B, T], labels [B, T], sample_ids [B]), all int64.

    tokens: 1-D, integer. Each epoch visits every example once, in an order drawn from (seed, epoch); a batch
    may hold the end of one epoch and the beginning of the next. Batch i is a pure function of (seed, i), so
    `start=i` resumes there without reading what came before. `sample_ids` number the samples drawn over all
    epochs (i*B .. i*B+B-1): keys for random draws per sample.
    part: (r, R): only the r-th, from 0, of R equal parts of every batch, B / R of its samples; R divides B.
    Raises ValueError, at the call, for a text shorter than one example.
    """
    n_examples = _example_count(tokens, seq_len, batch_size)
    if start < 0:
        raise ValueError(f"start is the number of the first batch and cannot be {start}: use 0 or more.")
    assert batch_size % part[1] == 0 and 0 <= part[0] < part[1]
    return _shuffled(tokens, seq_len, batch_size, seed, start, n_examples, part)


def steps_per_epoch(tokens: Tensor, seq_len: int, batch_size: int) -> int:
    """Batches after which `batches` has visited every example once."""
    return -(-_example_count(tokens, seq_len, batch_size) // batch_size)


def windows(tokens: Tensor, seq_len: int, batch_size: int, limit: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Every example once and in order, as (inputs [B, T], labels [B, T]), int64.

    The last batch may be smaller. limit: at most this many examples, all by default. Fewer than T tokens at
    the end of the stream are left out. Raises ValueError, at the call, for a text shorter than one example.
    """
    n_examples = _example_count(tokens, seq_len, batch_size)
    if limit is not None:
        if limit < 1:
            raise ValueError(f"limit is a number of examples and cannot be {limit}: use 1 or more, or None.")
        n_examples = min(n_examples, limit)
    chosen = torch.arange(n_examples).split(batch_size)
    return (_examples(tokens, seq_len, part) for part in chosen)


def ahead(items: Iterator[Item], n: int = 2) -> Generator[Item, None, None]:
    """The same items in the same order, of which a background thread prepares the next n meanwhile.

    An error of `items` reaches the caller at the item's turn. The thread ends with the items, or when this iterator
    is closed or dropped, then after the item that it is at.
    """
    if n < 1:
        raise ValueError(f"n is how many items are prepared ahead and cannot be {n}: use 1 or more.")
    ended = object()
    waiting: deque[Future[Item | object]] = deque()
    pool = ThreadPoolExecutor(1, thread_name_prefix="ahead")
    try:
        for _ in range(n):
            waiting.append(pool.submit(next, items, ended))
        while True:
            item = waiting.popleft().result()
            if item is ended:
                return
            waiting.append(pool.submit(next, items, ended))
            yield item  # type: ignore[misc]
    finally:
        pool.shutdown(cancel_futures=True)


def _example_count(tokens: Tensor, seq_len: int, batch_size: int) -> int:
    if seq_len < 1 or batch_size < 1:
        raise ValueError(f"seq_len={seq_len} and batch_size={batch_size} must both be at least 1.")
    if len(tokens) < seq_len + 1:
        raise ValueError(
            f"The text has {len(tokens)} tokens but one example needs seq_len + 1 = {seq_len + 1}: "
            "use a longer text or a smaller seq_len."
        )
    return (len(tokens) - 1) // seq_len


def _shuffled(
    tokens: Tensor, seq_len: int, batch_size: int, seed: int, start: int, n_examples: int, part: tuple[int, int]
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    epoch_in_hand, order = -1, torch.empty(0, dtype=torch.int64)
    for step in count(start):
        sample_ids = torch.arange(step * batch_size, (step + 1) * batch_size).chunk(part[1])[part[0]]
        epochs = sample_ids // n_examples
        chosen = torch.empty_like(sample_ids)
        for epoch in epochs.unique().tolist():
            if epoch != epoch_in_hand:
                epoch_in_hand, order = epoch, _epoch_order(n_examples, seed, epoch)
            here = epochs == epoch
            chosen[here] = order[sample_ids[here] % n_examples]
        yield *_examples(tokens, seq_len, chosen), sample_ids


def _epoch_order(n_examples: int, seed: int, epoch: int) -> Tensor:
    # numpy takes a sequence of seeds; any int is welcome here, and it wants them without a sign.
    return torch.from_numpy(np.random.default_rng([seed % 2**64, epoch]).permutation(n_examples))


def _examples(tokens: Tensor, seq_len: int, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """chosen [B]: numbers of examples. Returns inputs [B, T] and labels [B, T]."""
    positions = chosen[:, None] * seq_len + torch.arange(seq_len + 1)
    rows = tokens[positions].long()
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
