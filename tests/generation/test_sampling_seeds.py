"""The same seed gives the same text, however rows are grouped, whoever proposes, wherever decoding was begun."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layerskip_moe.generation import (
    Autoregressive,
    EarlyExit,
    LayerSkipping,
    Sampling,
    SelfSpeculative,
    Session,
    Speculative,
    generate,
)
from layerskip_moe.generation.sampling import gumbel_noise

PROMPTS = [[3], [5, 1, 7, 2], [4] * 8, [1, 2], [8, 8, 1, 0, 2, 3]]
STRATEGIES = [Autoregressive(), SelfSpeculative(1, 2), SelfSpeculative(2, 5)]


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_batch_size_does_not_show(trained_model, assert_same_text, strategy, temperature):
    model, sampling = trained_model(), Sampling(temperature, seed=9)
    arguments = dict(max_new_tokens=8, temperature=temperature, seed=9)
    expected = generate(model, PROMPTS, Autoregressive(), **arguments).tokens
    for batch_size in (1, 2, 5):
        got = generate(model, PROMPTS, strategy, batch_size=batch_size, **arguments)
        assert_same_text(model, PROMPTS, expected, got.tokens, sampling)
        assert len(got.row_stats) == 5 and got.stats.generated == 40


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_a_row_does_not_depend_on_its_neighbours(trained_model, assert_same_text, strategy):
    model, sampling = trained_model(), Sampling(1.0, seed=9)
    arguments = dict(max_new_tokens=9, temperature=1.0, seed=9)
    before = generate(model, PROMPTS, strategy, **arguments).tokens
    for others in ([[6], [2], PROMPTS[2]], [[1] * 11, [7, 7], PROMPTS[2], [5], [6, 6]]):
        after = generate(model, others, strategy, **arguments).tokens
        assert_same_text(model, PROMPTS[2:3], before[2:3], after[2:3], sampling, first_row=2)


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_a_text_taken_up_again_goes_on_as_it_would_have(trained_model, assert_same_text, strategy):
    """Noise belongs to a position in the text, not to a step of the decoding."""
    model, sampling = trained_model(), Sampling(1.0, seed=4)
    whole = generate(model, PROMPTS, strategy, max_new_tokens=12, temperature=1.0, seed=4).tokens
    longer = [prompt + text[:5] for prompt, text in zip(PROMPTS, whole, strict=True)]
    rest = generate(model, longer, strategy, max_new_tokens=7, temperature=1.0, seed=4).tokens
    assert_same_text(model, longer, [text[5:] for text in whole], rest, sampling)


def test_rejection_repeats_itself_and_does_not_see_the_batch_size(trained_model):
    arguments = dict(max_new_tokens=12, temperature=1.0, seed=2)
    strategy = SelfSpeculative(1, 3, coupling="rejection")
    texts = [
        generate(trained_model(), PROMPTS, strategy, batch_size=size, **arguments).tokens for size in (None, None, 1, 2)
    ]
    assert texts[0] == texts[1] == texts[2] == texts[3]


def test_a_draft_model_s_text_does_not_see_the_batch_size(exact_model):
    model, arguments = exact_model(), dict(max_new_tokens=12, temperature=1.0, seed=2)
    expected = generate(model, PROMPTS, **arguments).tokens
    for coupling in ("shared", "rejection"):
        strategy = Speculative(exact_model(n_layers=1), 3, coupling)
        texts = [generate(model, PROMPTS, strategy, batch_size=size, **arguments).tokens for size in (None, 1, 2)]
        assert texts[0] == texts[1] == texts[2]
        assert (texts[0] == expected) == (coupling == "shared")


LOSSY = [
    Autoregressive(2),
    EarlyExit(0.8),
    EarlyExit(0.8, cache="exact", decay=True),
    EarlyExit(0.9, "state"),
    LayerSkipping((1, 3)),
    LayerSkipping(random=2),
]


@pytest.mark.parametrize("strategy", LOSSY, ids=str)
def test_lossy_rows_do_not_depend_on_their_batch(exact_model, strategy):
    """In float64: no other strategy's text says what is right, only the same row in other company."""
    model, arguments = exact_model(n_layers=5), dict(max_new_tokens=9, temperature=1.0, seed=9)
    expected = generate(model, PROMPTS, strategy, **arguments)
    assert expected.tokens != generate(model, PROMPTS, **arguments).tokens
    got = generate(model, PROMPTS, strategy, batch_size=2, **arguments)
    assert (got.tokens, got.layers_run) == (expected.tokens, expected.layers_run)
    others = [[1] * 11, [7, 7], PROMPTS[2], [5], [6, 6]]
    assert generate(model, others, strategy, **arguments).tokens[2] == expected.tokens[2]


@pytest.mark.parametrize(
    "strategy",
    [Autoregressive(), SelfSpeculative(1, 3, coupling="rejection"), EarlyExit(0.3), LayerSkipping(random=1)],
    ids=str,
)
def test_other_seeds_and_other_rows_get_other_texts(tiny_model, strategy):
    def texts(seed):
        return generate(tiny_model(), [[3]] * 4, strategy, max_new_tokens=12, temperature=1.5, seed=seed).tokens

    all_texts = [tuple(text) for seed in (0, 1, -1) for text in texts(seed)]
    assert len(set(all_texts)) == 12


@settings(max_examples=30, deadline=None)
@given(
    advances=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(1, 9)), min_size=1, max_size=12),
    together=st.booleans(),
    stream=st.sampled_from([0, 1, 3]),
)
def test_noise_is_that_of_its_place_however_it_was_drawn_before(trained_model, advances, together, stream):
    """Drawn for some places ahead, kept, and drawn again, while rows go on at one pace or each at its own."""
    model = trained_model(max_seq_len=128)
    with torch.inference_mode():
        session = Session(model, [[3, 9], [5, 1, 7]], Sampling(0.8, seed=4), max_new_tokens=100)
        session.prefill()
        for first, second, count in advances:
            found = session.noise(count, stream=stream)
            places = session.cache.lengths[:, None] + torch.arange(1, count + 1)
            assert torch.equal(found, gumbel_noise(4, session.rows, places, 29, stream=stream))
            accepted = [first, first if together else second]
            session.append(torch.zeros(2, 6, dtype=torch.int64), accepted)
        session.close()
