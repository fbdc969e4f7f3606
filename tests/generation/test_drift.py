"""Drift: what is learnt of drafting beside plain steps, and what is not."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerskip_moe.generation.policies.drift import Drift


def see(drift, kinds, level=0.0, offset=0.0, noise=0.1, seed=0):
    """Steps of some kinds: "p" plain, "d" drafting; level by step, or one for all."""
    draw = np.random.default_rng(seed)
    levels = np.broadcast_to(level, len(kinds))
    for kind, now in zip(kinds, levels, strict=True):
        off = now + (kind == "d") * offset + noise * draw.standard_normal()
        drift.see(2e-3 * math.exp(off), 2e-3, drafting=kind == "d")


@settings(deadline=None, max_examples=30)
@given(level=st.floats(-0.3, 0.3), offset=st.floats(-0.3, 0.3), seed=st.integers(0, 10_000))
def test_the_offset_is_found_where_kinds_take_turns(level, offset, seed):
    drift = Drift(0.15)
    see(drift, ("p" * 16 + "d" * 12) * 8, level, offset, seed=seed)
    assert drift.offset == pytest.approx(offset, abs=0.1)
    assert drift.doubt < 0.06


@pytest.mark.parametrize("kind", ["p", "d"])
def test_a_machine_that_drifts_under_one_kind_of_step_tells_little_of_the_other(kind):
    drift = Drift(0.15)
    see(drift, "p" * 16 + "d" * 16 + "p" * 16)
    before = drift.offset
    see(drift, kind * 2000, level=np.linspace(0.0, 0.5, 2000))
    assert drift.offset == pytest.approx(before, abs=0.05)


def test_doubt_grows_with_time():
    drift = Drift(0.15)
    see(drift, "p" * 16 + "d" * 16)
    sure = drift.doubt
    see(drift, "d" * 20_000)
    assert sure < 0.08 and drift.doubt > 1.3 * sure


def test_one_step_in_which_something_else_happened_moves_little():
    drift, without = Drift(0.15), Drift(0.15)
    for some in (drift, without):
        see(some, "p" * 16 + "d" * 16)
    drift.see(1.0, 2e-3, drafting=True)
    assert abs(drift.offset - without.offset) < 0.05


def test_without_doubt_nothing_is_learnt():
    drift = Drift(0.0)
    see(drift, "pd" * 50, offset=0.3)
    assert drift.offset == 0.0 == drift.doubt


def test_a_machine_slower_than_when_it_was_timed_tells_little_of_drafting():
    drift = Drift(0.15)
    see(drift, "d" * 300, level=math.log(1.3))
    assert 0 <= drift.offset < 0.1


@pytest.mark.parametrize(("seconds", "reckoned"), [(0.0, 1e-3), (1e-3, 0.0), (math.nan, 1e-3)])
def test_what_took_no_time_tells_nothing(seconds, reckoned):
    drift = Drift(0.15)
    drift.see(seconds, reckoned, drafting=True)
    assert drift.offset == 0.0 and drift.doubt == 0.15
