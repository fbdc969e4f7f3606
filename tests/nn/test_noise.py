"""hash_uniform: uniform in (0, 1), and a function of its keys, whatever their type and shape."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from layerskip_moe.nn.kernels import using_kernels
from layerskip_moe.nn.noise import hash_uniform, hash_uniform_up_to

int64 = st.integers(-(2**63), 2**63 - 1)


@given(keys=st.lists(int64, min_size=1, max_size=4), as_tensor=st.lists(st.booleans(), min_size=4, max_size=4))
def test_tensors_and_python_integers_are_the_same_keys(keys, as_tensor):
    expected = hash_uniform(*keys)
    mixed = [torch.tensor(key) if tensor else key for key, tensor in zip(keys, as_tensor, strict=False)]
    got = hash_uniform(*mixed)
    assert got.dtype == torch.float64 and got.shape == () and got == expected
    assert 0 < got < 1


@given(key=int64)
def test_a_python_integer_wraps_as_an_int64_does(key):
    for beyond in (key + 2**64, key - 2**64, key + 2**200):
        assert hash_uniform(beyond, 1) == hash_uniform(key, 1) == hash_uniform(torch.tensor(key), 1)
        assert hash_uniform(torch.tensor(1), beyond) == hash_uniform(1, key)


@given(keys=st.lists(int64, min_size=1, max_size=6), seed=int64, count=st.integers(0, 70))
def test_all_of_the_last_keys_at_once(keys, seed, count):
    places = torch.tensor([keys, keys[::-1]])
    expected = hash_uniform(seed, places[..., None], 3, torch.arange(count))
    assert torch.equal(hash_uniform_up_to(count, seed, places, 3), expected)
    with using_kernels(False):
        assert torch.equal(hash_uniform_up_to(count, seed, places, 3), expected)


def test_keys_broadcast():
    rows, columns = torch.tensor([[3], [-4]]), torch.arange(5, dtype=torch.int32)
    grid = hash_uniform(7, rows, columns)
    assert grid.shape == (2, 5)
    for i, row in enumerate(rows.flatten().tolist()):
        assert grid[i].tolist() == [hash_uniform(7, row, column).item() for column in range(5)]


@given(keys=st.lists(int64, min_size=1, max_size=4), place=st.integers(0, 3), bit=st.integers(0, 63))
def test_one_bit_of_one_key_changes_the_number(keys, place, bit):
    other = list(keys)
    other[place % len(keys)] ^= 1 << bit
    assert hash_uniform(*keys) != hash_uniform(*other)


def test_the_order_and_the_number_of_keys_matter():
    numbers = [hash_uniform(*keys).item() for keys in [(1, 2), (2, 1), (1,), (2,), (1, 2, 0), (0, 1, 2), (1, 0)]]
    assert len(set(numbers)) == len(numbers)


# 50000 numbers; the seeds are fixed, and with random ones each test would fail once in 10^4 (1e-4 below).
COUNT, ERROR_RATE = 50_000, 1e-4


@pytest.mark.parametrize("place", [0, 1, 2])
def test_uniform_along_each_key(place):
    keys = [11, -5, 2**40]
    keys[place] = torch.arange(-100, COUNT - 100)
    numbers = hash_uniform(*keys)
    assert stats.kstest(numbers.numpy(), "uniform").pvalue > ERROR_RATE
    low_bits = (numbers * 2**40) % 1
    assert stats.kstest(low_bits.numpy(), "uniform").pvalue > ERROR_RATE


@pytest.mark.parametrize("other", [(0, 1), (1, 0), (1, 1)], ids=["seed, row + 1", "seed + 1, row", "both"])
def test_neighbouring_keys_are_independent(other):
    positions = torch.arange(COUNT)
    here, there = hash_uniform(4, 9, positions), hash_uniform(4 + other[0], 9 + other[1], positions)
    assert stats.pearsonr(here, there).pvalue > ERROR_RATE
    assert stats.kstest(((here + there) % 1).numpy(), "uniform").pvalue > ERROR_RATE
    assert stats.pearsonr(here[:-1], here[1:]).pvalue > ERROR_RATE


@pytest.mark.parametrize(("bits", "number"), [(0, 2.0**-53), (2**64 - 1, 1 - 2.0**-53)])
def test_the_ends_of_the_interval_never_come_out(bits, number):
    """SplitMix64 is a bijection: these are the keys whose 64 bits are all 0 and all 1."""
    key = key_hashing_to(bits)
    assert hash_uniform(key).item() == hash_uniform(torch.tensor(signed(key))).item() == number


def signed(x):
    return x - 2**64 if x >= 2**63 else x


def key_hashing_to(bits):
    """SplitMix64's finaliser, inverted step by step, then its increment taken back."""
    bits = undo_xor_shift(bits, 31) * pow(0x94D049BB133111EB, -1, 2**64) % 2**64
    bits = undo_xor_shift(bits, 27) * pow(0xBF58476D1CE4E5B9, -1, 2**64) % 2**64
    return (undo_xor_shift(bits, 30) - 0x9E3779B97F4A7C15) % 2**64


def undo_xor_shift(x, shift):
    result = x
    for _ in range(64 // shift + 1):
        result = x ^ (result >> shift)
    return result
