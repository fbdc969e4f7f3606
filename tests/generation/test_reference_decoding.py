"""Decoding against a slow reference that shares nothing with it: no cache, its own filters and its own noise."""

import math

import numpy as np
import pytest
import torch

from layerskip_moe.generation import Autoregressive, Sampling, SelfSpeculative, generate
from layerskip_moe.generation.sampling import gumbel_noise

PROMPTS = [[3], [5, 1, 7, 2], [8, 8, 1, 0, 2, 3]]
MASK = (1 << 64) - 1


def splitmix64(state):
    """One step of SplitMix64 (Steele, Lea, Flood 2014) in Python's whole numbers."""
    z = (state + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def gumbel(*keys):
    state = 0
    for key in keys:
        state = splitmix64(state ^ (key & MASK))
    return -math.log(-math.log(((state >> 12) + 0.5) / 2**52))


@torch.no_grad()
def reference_text(model, prompt, row, count, sampling, probabilities):
    text = list(prompt)
    for _ in range(count):
        p = probabilities(model(torch.tensor([text]))[0, -1].numpy(), sampling)
        if sampling.greedy:
            text.append(int(p.argmax()))
            continue
        noise = np.array([gumbel(sampling.seed, 0, row, len(text), token) for token in range(len(p))])
        with np.errstate(divide="ignore"):
            text.append(int((np.log(p) + noise).argmax()))
    return text[len(prompt) :]


def test_the_reference_hash_is_the_published_one():
    assert splitmix64(1234567) == 6457827717110365317  # the first number of the authors' generator for this seed


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(0.6, seed=7),
        Sampling(1.3, seed=-5),
        Sampling(1.0, top_k=3, seed=2**63 + 1),
        Sampling(1.0, top_p=0.6, seed=0),
        Sampling(0.9, top_k=7, top_p=0.8, seed=3),
    ],
    ids=str,
)
@pytest.mark.parametrize("switches", [{}, dict(moe_layers="every other", tie_embeddings=True)], ids=str)
def test_every_strategy_writes_the_reference_s_text(
    trained_model, assert_same_text, reference_probabilities, switches, sampling
):
    model = trained_model(**switches)
    expected = [
        reference_text(model, prompt, row, 12, sampling, reference_probabilities) for row, prompt in enumerate(PROMPTS)
    ]
    for strategy in (Autoregressive(), SelfSpeculative(1, 3), SelfSpeculative(2, 4)):
        got = generate(
            model,
            PROMPTS,
            strategy,
            max_new_tokens=12,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            seed=sampling.seed,
        )
        assert_same_text(model, PROMPTS, expected, got.tokens, sampling)


def test_noise_is_a_function_of_seed_stream_row_position_and_token():
    rows, positions = torch.tensor([4, 0]), torch.tensor([[0, 9, 10], [2**40, 1, 7]])
    noise = gumbel_noise(11, rows, positions, 5, stream=2)
    assert noise.dtype == torch.float64
    for a, row in enumerate(rows.tolist()):
        for t, position in enumerate(positions[a].tolist()):
            for token in range(5):
                assert noise[a, t, token].item() == pytest.approx(gumbel(11, 2, row, position, token), rel=1e-12)
