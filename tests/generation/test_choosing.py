"""From logits to tokens: the filters against transformers, what they keep, and that noise gives the softmax.

The statistical tests have fixed seeds; each would fail a right implementation with probability ERROR_RATE, had its
seed been drawn anew.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2_contingency, chisquare

from layerskip_moe.generation import Sampling
from layerskip_moe.generation.sampling import choose, gumbel_noise, log_probabilities

ERROR_RATE = 1e-4
LOGITS = torch.tensor([0.3, -1.2, 2.0, 1.9, -0.4, 0.0, 0.8])

# Eighths: equal logits have no order, and nearly equal ones lose theirs to rounding.
logits_lists = st.lists(st.integers(-160, 160).map(lambda n: n / 8), min_size=2, max_size=12, unique=True)
few = settings(max_examples=50, deadline=None, derandomize=True)
samplings = st.builds(
    Sampling,
    st.floats(0.05, 5.0),
    st.none() | st.integers(1, 14),
    st.none() | st.floats(0.01, 1.0),
    st.integers(0, 9),
)


def random_logits(*shape):
    return 3 * torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999, 1.0, None])
@pytest.mark.parametrize("top_k", [1, 4, 50, 99, None])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_filters_equal_those_of_transformers(temperature, top_k, top_p):
    transformers = pytest.importorskip("transformers")
    logits = random_logits(20, 50)
    expected = logits.double() / temperature
    if top_k is not None:
        expected = transformers.TopKLogitsWarper(top_k)(None, expected)
    if top_p is not None:
        expected = transformers.TopPLogitsWarper(top_p)(None, expected)
    got = log_probabilities(logits, Sampling(temperature, top_k, top_p)).exp()
    assert torch.equal(got > 0, expected > -torch.inf)
    torch.testing.assert_close(got, expected.softmax(-1), atol=1e-12, rtol=1e-9)


@given(logits_lists, samplings)
@few
def test_filters_equal_those_of_numpy(reference_probabilities, logits, sampling):
    got = log_probabilities(torch.tensor(logits), sampling).exp().numpy()
    np.testing.assert_allclose(got, reference_probabilities(logits, sampling), atol=1e-9)


@given(logits_lists, samplings, st.floats(-100, 100))
@few
def test_what_every_filter_keeps(logits, sampling, shift):
    logits = torch.tensor(logits, dtype=torch.float64)
    probabilities = log_probabilities(logits, sampling).exp()
    assert probabilities.sum().item() == pytest.approx(1.0)
    assert probabilities[logits.argmax()] > 0
    if sampling.top_k is not None:
        assert (probabilities > 0).sum() <= sampling.top_k
    torch.testing.assert_close(log_probabilities(logits + shift, sampling).exp(), probabilities, atol=1e-6, rtol=0)


def test_filters_that_filter_nothing():
    plain = log_probabilities(LOGITS, Sampling(0.7))
    torch.testing.assert_close(plain, (LOGITS.double() / 0.7).log_softmax(-1))
    assert torch.equal(log_probabilities(LOGITS, Sampling(0.7, top_k=7, top_p=1.0)), plain)
    assert torch.equal(log_probabilities(LOGITS, Sampling(0.7, top_k=1000)), plain)


@pytest.mark.parametrize("sampling", [Sampling(1.0, top_k=1), Sampling(1.0, top_p=1e-9), Sampling(1e-3)], ids=str)
def test_the_narrowest_sampling_is_greedy(sampling):
    logits = random_logits(3, 40, 11)
    noise = gumbel_noise(0, torch.arange(3), torch.arange(40).expand(3, 40), 11)
    assert torch.equal(choose(logits, sampling, noise), choose(logits, Sampling(), None))
    assert torch.equal(choose(logits, Sampling(), None), logits.argmax(-1))


@pytest.mark.parametrize("temperature", [1e-38, 1e-300, 5e-324])
def test_a_temperature_too_small_to_divide_by_is_greedy(temperature):
    noise = gumbel_noise(0, torch.arange(3), torch.arange(40).expand(3, 40), 11)
    logits = random_logits(3, 40, 11)
    assert torch.equal(choose(logits, Sampling(temperature), noise), logits.argmax(-1))


def chosen_tokens(sampling, rows=200, positions=200):
    """Tokens [rows, positions], every place with the same logits."""
    places = torch.arange(rows), torch.arange(positions).expand(rows, positions)
    noise = gumbel_noise(sampling.seed, *places, len(LOGITS))
    return choose(LOGITS.expand(rows, positions, -1), sampling, noise).numpy()


@pytest.mark.parametrize(
    "sampling",
    [Sampling(1.0), Sampling(0.5, seed=1), Sampling(2.0, top_k=4, seed=2), Sampling(1.0, top_p=0.8, seed=3)],
    ids=str,
)
def test_chosen_tokens_follow_the_softmax(reference_probabilities, sampling):
    expected = reference_probabilities(LOGITS.numpy(), sampling)
    counts = np.bincount(chosen_tokens(sampling).ravel(), minlength=7)
    assert not counts[expected == 0].any()
    possible = expected > 0
    assert chisquare(counts[possible], expected[possible] * counts.sum()).pvalue > ERROR_RATE


def test_one_place_over_many_seeds_follows_the_softmax(reference_probabilities):
    place = torch.zeros(1, dtype=torch.int64), torch.full((1, 1), 17)
    tokens = [
        int(choose(LOGITS.expand(1, 1, -1), Sampling(1.0), gumbel_noise(seed, *place, 7))) for seed in range(1500)
    ]
    expected = reference_probabilities(LOGITS.numpy(), Sampling(1.0)) * 1500
    assert chisquare(np.bincount(tokens, minlength=7), expected).pvalue > ERROR_RATE


@pytest.mark.parametrize("neighbours", ["rows", "positions", "seeds"])
def test_neighbouring_places_are_independent(neighbours):
    tokens = chosen_tokens(Sampling(1.0, seed=5))
    pairs = {
        "rows": (tokens[:-1], tokens[1:]),
        "positions": (tokens[:, :-1], tokens[:, 1:]),
        "seeds": (tokens, chosen_tokens(Sampling(1.0, seed=6))),
    }[neighbours]
    table = np.zeros((7, 7))
    np.add.at(table, (pairs[0].ravel(), pairs[1].ravel()), 1)
    assert chi2_contingency(table).pvalue > ERROR_RATE


def test_streams_are_independent():
    rows, positions = torch.arange(200), torch.arange(200).expand(200, 200)
    first, second = (gumbel_noise(0, rows, positions, 2, stream=s).argmax(-1).flatten() for s in (0, 1))
    table = np.histogram2d(first.numpy(), second.numpy(), bins=2)[0]
    assert chi2_contingency(table).pvalue > ERROR_RATE
