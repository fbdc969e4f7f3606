"""What tells whether an exit is right: areas under ROC curves against all pairs, and places that the model wrote."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerskip_moe.analysis.margins import area_under_roc, told_by_margin
from layerskip_moe.analysis.trace import TracedText


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 6)), min_size=1, max_size=30))
def test_areas_are_shares_of_pairs(places):
    right, score = (np.array(part) for part in zip(*places, strict=True))
    pairs = [(one > other) + 0.5 * (one == other) for one, other in itertools.product(score[right], score[~right])]
    found = area_under_roc(right.astype(bool), score)
    assert (found is None) == (not pairs)
    assert not pairs or found == pytest.approx(sum(pairs) / len(pairs))


def test_only_what_the_model_wrote_counts():
    said = np.array([[9, 1, 2, 9, 9], [5, 1, 2, 3, 4]])
    margin = np.array([[9.0, 3.0, 0.5, 1.0, 0.1], [1.0] * 5], dtype=np.float32)
    none = np.zeros((2, 4, 0))
    text = TracedText(np.arange(6), 2, 0.0, 0, said, said, margin / 10, margin, np.zeros((0, 5, 0)), none > 0, none)
    [told] = told_by_margin([text])
    assert told == {"exit_layer": 1, "agreement": 0.5, "by_margin": 0.75, "by_probability": 0.75}
