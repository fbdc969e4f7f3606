"""The repetition penalty: transformers' own arithmetic, at every place what the row's text has shown by then.

Next: `test_losslessness.py` and `test_rejection.py`, whose speculation runs under it too.
"""

import pytest
import torch

from layerskip_moe.generation import Autoregressive, EarlyExit, LayerSkipping, SelfSpeculative, Speculative, generate
from layerskip_moe.generation.sampling import gumbel_noise, penalize

PROMPTS = [[3], [5, 1, 7, 2], [8, 8, 1, 0, 2, 3]]


def test_by_hand():
    logits = torch.tensor([[2.0, -1.0, 0.0, 4.0, -3.0]])
    seen = torch.tensor([[True, True, True, False, False]])
    assert penalize(logits, seen, 2.0).tolist() == [[1.0, -2.0, 0.0, 4.0, -3.0]]
    assert penalize(logits, seen, 0.5).tolist() == [[4.0, -0.5, 0.0, 4.0, -3.0]]
    assert torch.equal(penalize(logits, seen, 1.0), logits)


@pytest.mark.parametrize("penalty", [0.7, 1.3, 5.0])
def test_equals_transformers(penalty):
    transformers = pytest.importorskip("transformers")
    generator = torch.Generator().manual_seed(0)
    logits, texts = torch.randn(8, 29, generator=generator), torch.randint(29, (8, 12), generator=generator)
    seen = torch.zeros(8, 29, dtype=torch.bool).scatter_(1, texts, True)
    expected = transformers.RepetitionPenaltyLogitsProcessor(penalty)(texts, logits)
    torch.testing.assert_close(penalize(logits, seen, penalty), expected, rtol=0, atol=0)


@torch.no_grad()
def reference_text(model, prompt, row, count, penalty, temperature, seed):
    """The whole text anew for each token; what it holds is looked up in the text itself."""
    text = list(prompt)
    for _ in range(count):
        scores = model(torch.tensor([text]))[0, -1].double()
        for token in set(text):
            scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
        if temperature:
            noise = gumbel_noise(seed, torch.tensor([row]), torch.tensor([[len(text)]]), len(scores))[0, 0]
            scores = (scores / temperature).log_softmax(-1) + noise
        text.append(int(scores.argmax()))
    return text[len(prompt) :]


@pytest.mark.parametrize(("penalty", "temperature"), [(0.8, 0.0), (1.3, 0.9)])
def test_every_strategy_writes_the_reference_s_text(exact_model, penalty, temperature):
    model, draft = exact_model(), exact_model(n_layers=1)
    expected = [
        reference_text(model, prompt, row, 12, penalty, temperature, seed=6) for row, prompt in enumerate(PROMPTS)
    ]
    arguments = dict(max_new_tokens=12, temperature=temperature, repetition_penalty=penalty, seed=6)
    strategies = [Autoregressive(), EarlyExit(1), SelfSpeculative(1, 4), SelfSpeculative(2, 3), Speculative(draft, 4)]
    for strategy in strategies:
        assert generate(model, PROMPTS, strategy, **arguments).tokens == expected, strategy
    assert generate(model, PROMPTS, **{**arguments, "repetition_penalty": 1.0}).tokens != expected


@pytest.mark.parametrize("strategy", [Autoregressive(2), EarlyExit(0.5), LayerSkipping((1,))], ids=str)
def test_a_large_penalty_leaves_no_token_twice(exact_model, strategy):
    """Of 29 tokens 12 + 6 are used at most; logits differ by far less than a factor of a million."""
    out = generate(exact_model(), PROMPTS, strategy, max_new_tokens=12, repetition_penalty=1e6)
    for prompt, row in zip(PROMPTS, out.tokens, strict=True):
        assert len({*prompt, *row}) == len(set(prompt)) + 12


def test_rows_that_left_take_their_past_with_them(exact_model):
    """The row after a stopped one is still penalized for its own text."""
    arguments = dict(max_new_tokens=12, repetition_penalty=1.5)
    whole = generate(exact_model(), PROMPTS, **arguments).tokens
    stop = whole[0][2]
    out = generate(exact_model(), PROMPTS, SelfSpeculative(1, 3), stop_tokens=[stop], **arguments).tokens
    assert out == [row[: row.index(stop)] if stop in row else row for row in whole]
    assert len(out[0]) <= 2 < max(map(len, out))


@pytest.mark.parametrize("penalty", [0, 0.0, -1.0, float("inf"), float("nan")])
def test_penalties_refused(tiny_model, penalty):
    with pytest.raises(ValueError, match=r"must be a finite number above 0; 1 changes nothing, 1\.2 is usual"):
        generate(tiny_model(), [[1]], max_new_tokens=2, repetition_penalty=penalty)
