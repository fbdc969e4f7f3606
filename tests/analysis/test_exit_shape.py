"""The shape of thresholds against a slow search over positions, and at its ends."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layerskip_moe.analysis.exit_shape import choose_shape, spaced_exits, thresholds_at


def slow_shape(confidence, harm, tolerance):
    """Position by position; confidences and harms as lists by layer."""
    exits, n = len(confidence), len(confidence[0])
    best, fewest = [0.0] * exits, exits * n
    for step in range(40):
        levels = []
        for sure, bad in zip(confidence, harm, strict=True):
            allowed = []
            for level in sure:
                reached = [b for c, b in zip(sure, bad, strict=True) if c >= level]
                if sum(reached) / len(reached) <= tolerance * step / 10:
                    allowed.append(level)
            levels.append(max(0.0, min(allowed, default=1.0)))
        depths, suffered = 0, 0.0
        for position in range(n):
            left = [layer for layer in range(exits) if confidence[layer][position] >= levels[layer]]
            depths += min(left, default=exits)
            suffered += harm[left[0]][position] if left else 0.0
        if suffered / n <= tolerance and depths < fewest:
            best, fewest = [1 - level for level in levels], depths
    return best


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(1, 4), st.integers(1, 25), st.sampled_from([0.0625, 0.25, 0.5]), st.data())
def test_equals_a_slow_search(exits, n, tolerance, data):
    table = st.lists(st.sampled_from([-0.5, 0.0, 0.25, 0.5, 0.75, 1.0]), min_size=n, max_size=n)
    confidence = data.draw(st.lists(table, min_size=exits, max_size=exits))
    harms = st.lists(st.sampled_from([-1.0, 0.0, 1.0]), min_size=n, max_size=n)
    harm = data.draw(st.lists(harms, min_size=exits, max_size=exits))
    assert choose_shape(torch.tensor(confidence), torch.tensor(harm), tolerance) == slow_shape(
        confidence, harm, tolerance
    )


def test_without_harm_all_leave_at_once():
    sure = torch.rand(3, 50, generator=torch.Generator().manual_seed(0))
    shape = choose_shape(sure, torch.zeros(3, 50), 0.05)
    assert thresholds_at(shape, 0.0) == pytest.approx(sure.min(dim=1).values.tolist())


def test_where_every_exit_harms_nobody_leaves():
    sure = torch.rand(3, 50, generator=torch.Generator().manual_seed(0))
    assert choose_shape(sure, torch.ones(3, 50), 0.05) == [0.0] * 3


def test_a_layer_that_may_be_trusted_sooner_has_a_lower_threshold():
    """Layer 1 errs below 0.9, layer 2 below 0.4."""
    sure = torch.linspace(0, 1, 101).repeat(2, 1)
    harm = torch.stack([sure[0] < 0.895, sure[1] < 0.395]).float()
    first, second = choose_shape(sure, harm, 0.05)
    assert first < second
    assert 1 - second < 0.45 and 1 - first < 0.95


def test_one_exit_layer_or_none():
    assert choose_shape(torch.zeros(0, 5), torch.zeros(0, 5), 0.05) == []


@given(st.lists(st.floats(0, 1), max_size=5), st.floats(0, 1), st.floats(0, 1))
def test_a_smaller_scale_lowers_every_threshold(shape, one, other):
    low, high = sorted([one, other])
    below, above = thresholds_at(shape, low), thresholds_at(shape, high)
    assert all(0 <= a <= b <= 1 for a, b in zip(below, above, strict=True))
    assert thresholds_at(shape, 1.0) == (1.0,) * len(shape)
    assert thresholds_at([1.0] * 3, low) == pytest.approx((low,) * 3)


@pytest.mark.parametrize(
    ("first", "n_layers", "count", "exits"),
    [
        (1, 12, 3, [3, 6, 9]),
        (1, 12, 1, [6]),
        (4, 12, 2, [6, 9]),
        (2, 5, None, [2, 3, 4]),
        (2, 5, 3, [2, 3, 4]),
        (2, 5, 9, [2, 3, 4]),
        (1, 1, 2, []),
    ],
)
def test_exits_are_evenly_spaced(first, n_layers, count, exits):
    assert spaced_exits(first, n_layers, count) == exits


@given(first=st.integers(1, 20), more=st.integers(0, 30), count=st.integers(1, 30))
def test_there_are_as_many_exits_as_asked_for_between_the_first_and_the_last_layer(first, more, count):
    exits = spaced_exits(first, first + more, count)
    assert len(set(exits)) == len(exits) == min(count, more)
    assert exits == sorted(exits) and all(first <= layer < first + more for layer in exits)
