"""The measures of confidence against their formulas, and what is refused."""

import math

import numpy as np
import pytest
import torch

from layerskip_moe.generation import EarlyExit, generate
from layerskip_moe.generation.confidence import confidence_of, first_exit, softmax_diff, state_similarity


def states(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_softmax_diff_by_hand():
    logits = torch.tensor([[0.6, 0.1, 0.3], [0.2, 0.4, 0.4], [0.0, 0.0, 1.0]]).log()
    torch.testing.assert_close(softmax_diff(logits), torch.tensor([0.3, 0.0, 1.0]))


def test_softmax_diff_equals_numpy_s():
    logits = 3 * states(40, 7, 11)
    weights = np.exp(logits.double().numpy())
    ordered = np.sort(weights / weights.sum(-1, keepdims=True), axis=-1)
    np.testing.assert_allclose(softmax_diff(logits).numpy(), ordered[..., -1] - ordered[..., -2], atol=1e-6)


def test_state_similarity_is_the_cosine():
    before, after = states(5, 16), states(5, 16, seed=1)
    expected = [
        float(np.dot(a, b) / math.sqrt(np.dot(a, a) * np.dot(b, b)))
        for a, b in zip(before.numpy(), after.numpy(), strict=True)
    ]
    assert state_similarity(before, after).tolist() == pytest.approx(expected, abs=1e-6)
    torch.testing.assert_close(state_similarity(before, 3 * before), torch.ones(5))
    torch.testing.assert_close(state_similarity(before, -before), -torch.ones(5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_measures_are_taken_in_float32(dtype):
    logits, before, after = (states(9, 12, seed=seed).to(dtype) for seed in range(3))
    assert torch.equal(softmax_diff(logits), softmax_diff(logits.float()))
    assert torch.equal(state_similarity(before, after), state_similarity(before.float(), after.float()))


def test_confidence_of_each_kind():
    hidden, previous, logits = states(4, 16), states(4, 16, seed=1), states(4, 9, seed=2)
    assert torch.equal(confidence_of("softmax_diff", hidden, previous, logits, layer=1), softmax_diff(logits))
    assert torch.equal(confidence_of("state", hidden, previous, logits, layer=1), state_similarity(previous, hidden))

    def own(*given):
        assert all(a is b for a, b in zip(given, (hidden, previous, logits), strict=True))
        return given[0][:, 0]

    assert torch.equal(confidence_of(own, hidden, previous, logits, layer=1), hidden[:, 0])


def test_first_exits():
    assert [first_exit("softmax_diff", layer) for layer in (1, 2, 3)] == [1, 2, 3]
    assert [first_exit("state", layer) for layer in (1, 2, 3)] == [2, 2, 3]
    assert first_exit(lambda hidden, previous, logits: hidden[:, 0], 1) == 1


@pytest.mark.parametrize(
    ("returned", "shape"),
    [(lambda hidden: hidden[:, :1], r"\[2, 1\]"), (lambda hidden: hidden[0, 0], r"\[\]"), (torch.ravel, r"\[32\]")],
)
def test_a_function_that_returns_another_shape_is_refused(tiny_model, returned, shape):
    strategy = EarlyExit(0.5, confidence=lambda hidden, previous, logits: returned(hidden))
    with pytest.raises(ValueError, match=rf"returned shape {shape} for 2 states; it must return one number for each\."):
        generate(tiny_model(), [[1], [2, 3]], strategy, max_new_tokens=4)
