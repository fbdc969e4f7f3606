"""evaluate_early_exit against a loop over single tokens and layers, and against evaluate_exits at both ends."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from layerskip_moe.analysis import evaluate_early_exit, evaluate_exits, held_out
from layerskip_moe.generation import EarlyExit, generate

SEQ_LEN = 5


def _most_likely(hidden, previous, logits):
    return logits.softmax(-1).amax(-1)


def _confidence_by_hand(kind, hidden, previous, logits):
    """hidden, previous [D], logits [V] of one state."""
    if kind == "state":
        return float((hidden @ previous) / (hidden.norm() * previous.norm()))
    probabilities = sorted((logits - logits.logsumexp(0)).exp().tolist())
    return probabilities[-1] - probabilities[-2] if kind == "softmax_diff" else probabilities[-1]


def _reference(model, text, n_windows, thresholds, kind, min_layer):
    """Position by position and layer by layer, stopping as decoding would: rows of (exit, nats, agreed) for each
    threshold, and every confidence by layer."""
    n_layers = model.config.n_layers
    rows, confidences = {threshold: [] for threshold in thresholds}, {}
    for start in range(0, n_windows * SEQ_LEN, SEQ_LEN):
        for end in range(start + 1, start + SEQ_LEN + 1):
            inputs, label = text[start:end][None], text[end]
            positions = torch.arange(end - start)[None]
            states = [model.embed(inputs)]
            for layer in range(n_layers):
                states.append(model.run(states[-1], [layer], positions=positions).hidden)
            logits = [model.unembed(state[0, -1]) for state in states]
            sure = {}
            for layer in range(max(min_layer, 2) if kind == "state" else min_layer, n_layers):
                sure[layer] = _confidence_by_hand(kind, states[layer][0, -1], states[layer - 1][0, -1], logits[layer])
                confidences.setdefault(layer, []).append(sure[layer])
            for threshold in thresholds:
                leaves = [n for n, c in sure.items() if threshold < 1 and (threshold <= 0 or c >= threshold)]
                taken = min(leaves, default=n_layers)
                nats = -logits[taken].log_softmax(-1)[label].item()
                rows[threshold].append((taken, nats, bool(logits[taken].argmax() == logits[-1].argmax())))
    return rows, confidences


@pytest.mark.parametrize(("live_logits", "batch_size"), [(2**24, 3), (3 * 17, 2), (1, 100)])
@pytest.mark.parametrize("min_layer", [1, 2, 4])
@pytest.mark.parametrize("kind", ["softmax_diff", "state", _most_likely])
def test_equals_a_loop_over_tokens_and_layers(decoder, tokens, monkeypatch, kind, min_layer, live_logits, batch_size):
    monkeypatch.setattr(held_out, "LIVE_LOGITS", live_logits)
    model, text = decoder(n_layers=4).eval(), tokens(24)  # 4 windows of 5, and 3 tokens left over
    thresholds = [-1.0, 0.0, 0.1, 0.15, 0.2, 0.7, 0.8, 0.9, 1.0, 2.0]
    found = evaluate_early_exit(
        model, text, thresholds=thresholds, confidence=kind, min_layer=min_layer, seq_len=SEQ_LEN,
        batch_size=batch_size, progress=False,
    )  # fmt: skip
    with torch.no_grad():
        rows, confidences = _reference(model, text, 4, thresholds, kind, min_layer)
    assert found.thresholds == thresholds and found.tokens == 20
    for index, threshold in enumerate(thresholds):
        taken, nats, agreed = zip(*rows[threshold], strict=True)
        assert found.exits[index] == [taken.count(n) for n in range(1, 5)]
        assert found.mean_layers[index] == pytest.approx(sum(taken) / 20)
        assert found.perplexity[index] == pytest.approx(math.exp(sum(nats) / 20), rel=1e-5)
        assert found.agreement[index] == pytest.approx(sum(agreed) / 20)
    if min_layer == 1:
        assert any(sum(count > 0 for count in exits) > 2 for exits in found.exits), "the thresholds decide something"
    for layer in range(1, 5):
        told = (found.confidence_mean[layer - 1], found.confidence_low[layer - 1], found.confidence_high[layer - 1])
        if layer in confidences:
            values = torch.tensor(confidences[layer], dtype=torch.float64)
            quartiles = values.quantile(torch.tensor([0.25, 0.75], dtype=torch.float64))
            assert told == pytest.approx((values.mean().item(), *quartiles.tolist()), abs=1e-6)
        else:
            assert told == (None, None, None)


@pytest.mark.parametrize("kind", ["softmax_diff", "state"])
def test_the_ends_are_evaluate_exits(decoder, tokens, kind):
    model, text = decoder(), tokens(40)
    how = dict(seq_len=6, batch_size=4, progress=False)
    found = evaluate_early_exit(model, text, thresholds=[0.0, 1.0], confidence=kind, **how)
    fixed = evaluate_exits(model, text, **how)
    first = 2 if kind == "state" else 1
    assert found.mean_layers == [first, 3]
    assert found.perplexity == pytest.approx([fixed.perplexity[first - 1], fixed.perplexity[-1]])
    assert found.agreement == pytest.approx([fixed.agreement[first - 1], 1.0])
    assert found.tokens == fixed.tokens


@pytest.mark.parametrize(("kind", "threshold"), [("softmax_diff", 0.15), ("state", 0.8), (_most_likely, 0.25)])
def test_is_what_exact_early_exit_decides_while_decoding(decoder, kind, threshold):
    model = decoder(n_layers=4)
    for prompt in range(3):  # of one token, so that every position of the text is one that was decoded
        strategy = EarlyExit(threshold, confidence=kind, cache="exact")
        decoded = generate(model, [[prompt]], strategy, max_new_tokens=24, temperature=1.0, seed=prompt)
        text = torch.tensor([prompt, *decoded.tokens[0]])
        found = evaluate_early_exit(
            model, text, thresholds=[threshold], confidence=kind, seq_len=24, batch_size=1, progress=False
        )
        left = Counter(decoded.layers_run[0])
        assert len(left) > 1 and found.exits == [[left[n] for n in range(1, 5)]]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    thresholds=st.lists(st.floats(-0.5, 1.5), min_size=1, max_size=5),
    kind=st.sampled_from(["softmax_diff", "state"]),
    n_layers=st.integers(1, 4),
    data=st.data(),
)
def test_a_higher_threshold_never_leaves_earlier(decoder, tokens, thresholds, kind, n_layers, data):
    min_layer = data.draw(st.integers(1, n_layers))
    how = dict(confidence=kind, min_layer=min_layer, seq_len=6, batch_size=2, progress=False)
    found = evaluate_early_exit(decoder(n_layers=n_layers), tokens(20), thresholds=sorted(thresholds), **how)
    assert found.mean_layers == sorted(found.mean_layers)
    for mean, exits, agreement in zip(found.mean_layers, found.exits, found.agreement, strict=True):
        assert sum(exits) == found.tokens == 18 and len(exits) == n_layers
        assert mean == pytest.approx(sum(n * count for n, count in enumerate(exits, start=1)) / 18)
        assert not any(exits[: min_layer - 1])
        assert exits[-1] / 18 <= agreement + 1e-9 <= 1 + 1e-8
    for low, high in zip(found.confidence_low, found.confidence_high, strict=True):
        assert (low is None) == (high is None) and (low is None or low <= high)
    assert found.confidence_mean[-1] is None


def test_one_pass_for_all_thresholds_and_one_chunk_of_logits_at_a_time(decoder, tokens, monkeypatch):
    model, passes, rows = decoder(), [], []
    monkeypatch.setattr(held_out, "LIVE_LOGITS", 4 * 17)
    run, unembed = model.run, model.unembed
    monkeypatch.setattr(model, "run", lambda hidden, layers, **how: passes.append(1) or run(hidden, layers, **how))
    monkeypatch.setattr(model, "unembed", lambda hidden: rows.append(hidden.shape[:-1].numel()) or unembed(hidden))
    how = dict(seq_len=6, batch_size=2, progress=False)
    evaluate_early_exit(model, tokens(37), thresholds=[0.1, 0.3, 0.5, 0.9], **how)
    assert len(passes) == 3
    assert max(rows) == 4 and sum(rows) == 36 * 3


def test_a_functions_first_previous_is_the_embedding(decoder, tokens):
    model, text, seen = decoder(n_layers=2), tokens(7), []

    def confidence(hidden, previous, logits):
        seen.append(previous)
        return torch.zeros(len(hidden))

    evaluate_early_exit(
        model, text, thresholds=[0.5], confidence=confidence, seq_len=6, batch_size=1, progress=False
    )  # fmt: skip
    assert len(seen) == 1 and torch.equal(seen[0], model.embed(text[:6]))


def test_max_windows_and_modes(decoder, tokens):
    model, text = decoder(dropout=0.5).train(), tokens(100)
    how = dict(thresholds=[0.2], seq_len=6, batch_size=2, progress=False)
    some = evaluate_early_exit(model, text, max_windows=3, **how)
    assert some == evaluate_early_exit(model, text[:19], **how)
    assert some.tokens == 18 and all(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"thresholds": []}, "one or more numbers"),
        ({"thresholds": [0.5, math.nan]}, "one or more numbers"),
        ({"min_layer": 0}, "between 1 and n_layers=3"),
        ({"min_layer": 4}, "between 1 and n_layers=3"),
        ({"confidence": "entropy"}, "'entropy' is unknown"),
        ({"confidence": lambda hidden, previous, logits: logits}, "one number for each"),
        ({"seq_len": 33}, "max_seq_len is 32"),
        ({"seq_len": 100}, "longer text"),
    ],
)
def test_bad_input_is_refused_and_the_mode_put_back(decoder, tokens, change, said):
    model = decoder().train()
    how = dict(thresholds=[0.5], seq_len=6, batch_size=2, progress=False)
    with pytest.raises(ValueError, match=said):
        evaluate_early_exit(model, tokens(80), **{**how, **change})
    assert all(module.training for module in model.modules())
