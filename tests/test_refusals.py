"""What refusals share: any value shown in one short line, and what counts as a whole number, an index, a number."""

import numpy as np
import pytest
import torch

from layerskip_moe.refusals import require_index, require_number, require_whole, shortened, shown


@pytest.mark.parametrize("value", [None, 3, -0.5, "eight", [1, 2, 3], {"a": (1,)}])
def test_a_short_value_is_shown_whole(value):
    assert shown(value) == repr(value)


@pytest.mark.parametrize("value", [10**300, "x" * 10**5, list(range(10**4)), ["x" * 10**5] * 10**4, {"a": {"b": [[]]}}])
def test_a_long_value_is_shown_in_part_on_one_line(value):
    assert len(shown(value)) <= 240 and "\n" not in shown(value)


def test_a_text_is_shortened_without_quotes():
    assert shortened("model.norm.weight") == "model.norm.weight"
    assert shortened("two\nlines") == "two\\nlines"
    assert len(shortened("x" * 10**5)) < 240 and "..." in shortened("x" * 10**5)


@pytest.mark.parametrize("value", [True, 1.0, "1", None, 0, torch.tensor(3)])
def test_what_is_no_whole_number_or_too_small(value):
    with pytest.raises(ValueError, match=r"^layers=.* must be a whole number, 1 or more\.$"):
        require_whole("layers", value, 1)


def test_whole_numbers_up_to_the_most():
    assert require_whole("layers", 8, 1, 8) == 8
    with pytest.raises(ValueError, match=r"^layers=9 is more than any network has; it must be 8 or less\.$"):
        require_whole("layers", 9, 1, 8)


def test_an_index_is_whatever_counts():
    for value in (3, np.int64(3), torch.tensor(3)):
        require_index("row", value)
    for value in (3.0, True, "3", None, [3]):
        with pytest.raises(ValueError, match=r"^row=.* must be a whole number\.$"):
            require_index("row", value)


def test_a_number_is_finite():
    for value in (0, -2.5, 1e307):
        require_number("theta", value)
    for value in (float("nan"), float("inf"), -float("inf"), 10**400, True, "1", None):
        with pytest.raises(ValueError, match=r"^theta=.* must be a finite number\.$"):
            require_number("theta", value)
