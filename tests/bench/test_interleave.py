"""interleave: who runs when; summaries and ratios by hand."""

import json

import pytest

from layerskip_moe.bench.interleave import interleave, ratio, summary


def runs_of(names, log):
    def run(name):
        log.append(name)
        return len(log)

    return {name: lambda name=name: run(name) for name in names}


def test_warm_up_then_turns_that_rotate():
    log = []
    results = interleave(runs_of("abc", log), 4, warm_up=2)
    assert "".join(log) == "abcabc" + "abc" + "bca" + "cab" + "abc"
    assert results["a"] == [7, 12, 14, 16]  # when it ran: what the warm-up gave is left out


def test_with_fewer_repeats_than_runs_the_turns_are_spread():
    log = []
    interleave(runs_of("abcdef", log), 3, warm_up=0)
    assert "".join(log[::6]) == "ace"


def test_no_repeats_are_refused():
    with pytest.raises(ValueError, match="repeats=0 must be 1 or more"):
        interleave({}, 0)


def test_a_ratio_is_the_median_within_repeats():
    # 0.1, 4, 2: not the ratio of the medians, which are equal.
    told = ratio([1.0, 4.0, 10.0], [10.0, 1.0, 5.0])
    assert told["median"] == 2.0 and told["samples"] == [0.1, 4.0, 2.0]
    assert told["quartiles"] == [pytest.approx(1.05), 3.0]
    assert json.loads(json.dumps(summary([3.0, 1.0]))) == {
        "median": 2.0,
        "quartiles": [1.5, 2.5],
        "samples": [3.0, 1.0],
    }
