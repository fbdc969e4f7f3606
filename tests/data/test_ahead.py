"""Items prepared ahead: the same ones, no more than asked for, errors in their place, and no thread left behind."""

import threading
from itertools import count, islice

import pytest

from layerskip_moe.data import ahead


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]


@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("length", [0, 1, 2, 7])
def test_the_items_come_in_order_and_the_thread_ends_with_them(n, length):
    assert list(ahead(iter(range(length)), n)) == list(range(length))
    assert threads() == []


def test_so_many_are_prepared_while_one_is_worked_on():
    made, enough = [], threading.Event()

    def items():
        for number in count():
            made.append(number)
            if number == 3:
                enough.set()
            yield number

    stream = ahead(items(), 3)
    assert next(stream) == 0
    assert enough.wait(10)  # 1, 2 and 3, though nobody has asked for them
    stream.close()
    assert made == [0, 1, 2, 3] and threads() == []


def test_an_error_comes_after_the_items_before_it():
    def items():
        yield 0
        yield 1
        raise OSError("the disk is gone")

    stream = ahead(items())
    assert list(islice(stream, 2)) == [0, 1]
    with pytest.raises(OSError, match="the disk is gone"):
        next(stream)
    assert list(stream) == [] and threads() == []


def test_none_ahead_is_refused():
    with pytest.raises(ValueError, match="n is how many items"):
        next(ahead(iter([1]), 0))
