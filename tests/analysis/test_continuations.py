"""score_continuations against a loop that asks the model for one token at a time."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from layerskip_moe.analysis import held_out, score_continuations
from layerskip_moe.generation import generate

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11], [3, 3], [16]]
OUTPUTS = [[4, 5], [0, 1, 2, 3, 4, 5, 6, 7], [], [9], [12, 12, 12]]


def _reference(model, prompts, outputs):
    nats, same = [], []
    for prompt, output in zip(prompts, outputs, strict=True):
        for place, token in enumerate(output):
            logits = model(torch.tensor([prompt + output[:place]]))[0, -1]
            nats.append(-logits.log_softmax(-1)[token].item())
            same.append(int(logits.argmax()) == token)
    return math.exp(sum(nats) / len(nats)), sum(same) / len(same), len(nats)


@pytest.mark.parametrize("live_logits", [2**24, 3 * 17, 1])
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_equals_a_loop_over_tokens(decoder, monkeypatch, batch_size, live_logits):
    monkeypatch.setattr(held_out, "LIVE_LOGITS", live_logits)
    model = decoder()
    with torch.no_grad():
        outputs = [*OUTPUTS[:4], [int(model.eval()(torch.tensor([[16]])).argmax()), 12, 12]]
        perplexity, agreement, n_tokens = _reference(model, PROMPTS, outputs)
    found = score_continuations(model, PROMPTS, outputs, batch_size=batch_size)
    assert found.perplexity == pytest.approx(perplexity, rel=1e-5)  # cross entropies are float32
    assert found.agreement == pytest.approx(agreement) and 0 < agreement < 1
    assert found.tokens == n_tokens == 14


def test_the_models_own_greedy_text_agrees_in_full(decoder):
    model = decoder()
    outputs = generate(model, PROMPTS, max_new_tokens=9).tokens
    greedy = score_continuations(model, PROMPTS, outputs)
    assert greedy.agreement == 1.0 and greedy.tokens == 45
    other = [[(token + 1) % 17 for token in output] for output in outputs]
    assert score_continuations(model, PROMPTS, other).perplexity > greedy.perplexity


def test_a_model_that_knows_nothing_has_the_vocabularys_perplexity(decoder):
    model = decoder()
    model.head.weight.data.zero_()
    assert score_continuations(model, PROMPTS, OUTPUTS).perplexity == pytest.approx(17.0)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(order=st.permutations(range(5)), batch_size=st.integers(1, 6))
def test_order_and_batches_do_not_matter(decoder, order, batch_size):
    model = decoder()
    found = score_continuations(model, [PROMPTS[i] for i in order], [OUTPUTS[i] for i in order], batch_size=batch_size)
    usual = score_continuations(model, PROMPTS, OUTPUTS)
    assert found.perplexity == pytest.approx(usual.perplexity, rel=1e-6)
    assert (found.agreement, found.tokens) == (usual.agreement, usual.tokens)


def test_one_pass_and_only_output_tokens_are_unembedded(decoder, monkeypatch):
    model, passes, rows = decoder(), [], []
    monkeypatch.setattr(held_out, "LIVE_LOGITS", 4 * 17)
    run, unembed = model.run, model.unembed
    monkeypatch.setattr(model, "run", lambda hidden, layers, **how: passes.append(1) or run(hidden, layers, **how))
    monkeypatch.setattr(model, "unembed", lambda hidden: rows.append(len(hidden)) or unembed(hidden))
    score_continuations(model, PROMPTS, OUTPUTS)
    assert len(passes) == 1 and max(rows) == 4 and sum(rows) == 14


@pytest.mark.parametrize(("prompts", "outputs"), [([], []), ([[1], [2, 3]], [[], []])])
def test_nothing_to_score_is_not_a_number(decoder, prompts, outputs):
    found = score_continuations(decoder(), prompts, outputs)
    assert math.isnan(found.perplexity) and math.isnan(found.agreement) and found.tokens == 0


def test_a_certain_model_proved_wrong_has_infinite_perplexity(decoder):
    model = decoder(dtype=torch.float32)
    model.head.weight.data.mul_(1e6)
    assert score_continuations(model, [[1, 2]], [[0, 1, 2]]).perplexity == math.inf


def test_text_as_long_as_the_model_allows_and_one_more(decoder):
    model = decoder()
    assert score_continuations(model, [[1] * 30], [[2] * 3]).tokens == 3  # the last token is never run
    with pytest.raises(ValueError, match="max_seq_len is 32"):
        score_continuations(model, [[1] * 30], [[2] * 4])


@pytest.mark.parametrize(
    ("prompts", "outputs", "batch_size", "said"),
    [
        ([[1]], [], 8, "one output per prompt"),
        ([[1], []], [[1], [1]], 8, "prompt 1 is empty"),
        ([[1], [17]], [[1], [1]], 8, "row 1 holds token id 17"),
        ([[1]], [[-1]], 8, "ids 0 to 16"),
        ([[1]], [[1]], 0, "batch_size=0"),
    ],
)
def test_bad_input_is_refused(decoder, prompts, outputs, batch_size, said):
    with pytest.raises(ValueError, match=said):
        score_continuations(decoder(), prompts, outputs, batch_size=batch_size)


def test_dropout_is_off_and_the_mode_put_back(decoder):
    model = decoder(dropout=0.5).train()
    assert score_continuations(model, PROMPTS, OUTPUTS) == score_continuations(model, PROMPTS, OUTPUTS)
    assert all(module.training for module in model.modules())
