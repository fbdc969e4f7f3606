"""Packing, shuffling and resuming, on streams whose tokens are their own positions."""

from itertools import islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layerskip_moe.data import batches, steps_per_epoch, windows

SHAPES = dict(length=st.integers(12, 60), seq_len=st.integers(1, 11), batch_size=st.integers(1, 9))


@settings(max_examples=50, deadline=None)
@given(**SHAPES, seed=st.integers(-3, 3))
def test_an_epoch_visits_every_window_once(length, seq_len, batch_size, seed):
    tokens = torch.arange(length, dtype=torch.int32)
    n_windows = (length - 1) // seq_len
    steps = steps_per_epoch(tokens, seq_len, batch_size)
    assert (steps - 1) * batch_size < n_windows <= steps * batch_size
    inputs, labels, sample_ids = map(
        torch.cat,
        zip(*islice(batches(tokens, seq_len=seq_len, batch_size=batch_size, seed=seed), steps), strict=True),
    )
    assert inputs.dtype == labels.dtype == sample_ids.dtype == torch.int64
    assert sample_ids.tolist() == list(range(steps * batch_size))
    assert torch.equal(labels, inputs + 1)
    assert torch.equal(inputs, inputs[:, :1] + torch.arange(seq_len))
    first_epoch = inputs[:n_windows, 0]
    assert torch.equal(first_epoch.sort().values, torch.arange(n_windows) * seq_len)


@settings(max_examples=50, deadline=None)
@given(**SHAPES, seed=st.integers(0, 3), start=st.integers(0, 40))
def test_a_resumed_stream_equals_the_rest_of_the_first(length, seq_len, batch_size, seed, start):
    tokens = torch.arange(length)
    shape = dict(seq_len=seq_len, batch_size=batch_size, seed=seed)
    whole = list(islice(batches(tokens, **shape), start, start + 4))
    resumed = list(islice(batches(tokens, **shape, start=start), 4))
    for batch, again in zip(whole, resumed, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(batch, again, strict=True))


def test_order_depends_on_the_seed_and_on_the_epoch():
    tokens = torch.arange(41)

    def order(seed, epoch):
        [(inputs, _, _)] = islice(batches(tokens, seq_len=1, batch_size=40, seed=seed, start=epoch), 1)
        return inputs.flatten().tolist()

    orders = [order(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(o) for o in orders}) == 4
    assert all(sorted(o) == list(range(40)) for o in orders)
    assert all(o != sorted(o) for o in orders)


def test_starting_late_skips_what_came_before():
    # One by one, a trillion batches would take a month.
    _, _, sample_ids = next(batches(torch.arange(100), seq_len=4, batch_size=2, seed=0, start=10**12))
    assert sample_ids.tolist() == [2 * 10**12, 2 * 10**12 + 1]


@settings(max_examples=50, deadline=None)
@given(**SHAPES, limit=st.none() | st.integers(1, 70))
def test_windows_come_in_order_up_to_the_limit(length, seq_len, batch_size, limit):
    tokens = torch.arange(length, dtype=torch.int32)
    parts = list(windows(tokens, seq_len, batch_size, limit))
    inputs, labels = map(torch.cat, zip(*parts, strict=True))
    n_windows = min((length - 1) // seq_len, limit or length)
    assert torch.equal(inputs.flatten(), torch.arange(n_windows * seq_len))
    assert torch.equal(labels, inputs + 1)
    assert all(len(part) == batch_size for part, _ in parts[:-1])


@pytest.mark.parametrize(
    "cut",
    [
        lambda tokens: batches(tokens, seq_len=8, batch_size=1, seed=0),
        lambda tokens: windows(tokens, 8, 1),
        lambda tokens: steps_per_epoch(tokens, 8, 1),
    ],
)
def test_a_text_shorter_than_one_window_is_refused_at_the_call(cut):
    with pytest.raises(ValueError, match=r"8 tokens .* seq_len \+ 1 = 9"):
        cut(torch.arange(8))
    cut(torch.arange(9))


@pytest.mark.parametrize("wrong", [dict(seq_len=0), dict(batch_size=0), dict(start=-1)])
def test_sizes_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        batches(torch.arange(9), **{**dict(seq_len=2, batch_size=1, seed=0), **wrong})
    with pytest.raises(ValueError, match="limit"):
        windows(torch.arange(9), 2, 1, limit=0)
