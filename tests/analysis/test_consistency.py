"""The losses that a calibration bounds, against definitions by hand and against decoding token by token."""

import pytest
import torch

from layerskip_moe.analysis.consistency import full_model, measure
from layerskip_moe.analysis.exit_states import exit_opinions
from layerskip_moe.generation import Autoregressive, EarlyExit, generate

PROMPTS = [[3], [5, 1, 7, 2], [8, 8, 1], [1, 2], [16, 4, 9, 9, 0]]
EARLY = EarlyExit((0.25, 0.3, 0.2))
HOW = dict(max_new_tokens=9, batch_size=2)


def texts_by_hand(model, strategy, stops):
    """Each prompt alone, up to and with its first stop token, which is -1."""
    rows = []
    for prompt in PROMPTS:
        text = generate(model, [prompt], strategy, max_new_tokens=9).tokens[0]
        cut = next((place for place, token in enumerate(text) if token in stops), None)
        rows.append(text if cut is None else [*text[:cut], -1])
    return rows


def choices_by_hand(model, prompt, text, thresholds=None):
    """What is said at each place of a text, everything before it having gone through all layers: by the full model, or
    by the first layer that reaches its threshold; and those layers."""
    said = exit_opinions(model, [prompt], [text], confidence="softmax_diff", first=1, batch_size=1, progress=False)
    exits = [model.config.n_layers] * len(text)
    if thresholds is not None:
        for place in range(len(text)):
            sure = [n for n, level in enumerate(thresholds) if said.confidence[n, place] >= level]
            exits[place] = min(sure, default=len(thresholds)) + 1
    return [int(said.choice[layer - 1, place]) for place, layer in enumerate(exits)], exits


def differing(one, other):
    return sum(a != b for a, b in zip(one, other, strict=False)) + abs(len(one) - len(other))


@pytest.fixture
def model(decoder):
    return decoder(n_layers=4)


@pytest.mark.parametrize("cache", ["exact", "propagate"])
@pytest.mark.parametrize("stops", [[], [2, 7, 11]])
def test_textual_is_the_share_of_places_that_differ(model, cache, stops):
    strategy = EarlyExit(EARLY.threshold, cache=cache)
    full, early = (texts_by_hand(model, one, stops) for one in (Autoregressive(), strategy))
    sequences = full_model(model, PROMPTS, None, "textual", stop_tokens=stops, **HOW)
    assert sequences.texts == sequences.full == full
    found = measure(model, strategy, sequences, "textual", stop_tokens=stops, **HOW)
    expected = [differing(a, b) / max(len(a), len(b)) for a, b in zip(early, full, strict=True)]
    assert found.losses.tolist() == pytest.approx(expected)
    places = sum(max(len(a), len(b)) for a, b in zip(early, full, strict=True))
    assert found.agreement == pytest.approx(1 - sum(map(differing, early, full)) / places)
    assert 0 < found.losses.mean() < 1 and 1 < found.mean_layers < 4
    assert not stops or len({len(text) for text in full}) > 1


@pytest.mark.parametrize("stops", [[], [2, 7, 11]])
def test_token_is_asked_along_the_full_models_text(model, stops):
    strategy = EarlyExit(EARLY.threshold, cache="exact")
    sequences = full_model(model, PROMPTS, None, "token", stop_tokens=stops, **HOW)
    found = measure(model, strategy, sequences, "token", stop_tokens=stops, **HOW)
    expected, depths, wrong = [], [], 0
    for prompt, text in zip(PROMPTS, sequences.full, strict=True):
        said, exits = choices_by_hand(model, prompt, text, strategy.threshold)
        said = [-1 if token in stops else token for token in said]
        expected.append(differing(said, text) / len(text))
        wrong += differing(said, text)
        depths += exits
    assert found.losses.tolist() == pytest.approx(expected)
    assert found.mean_layers == pytest.approx(sum(depths) / len(depths))
    assert found.agreement == pytest.approx(1 - wrong / len(depths))
    assert 0 < sum(expected) < len(expected)


def test_risk_is_by_how_much_more_often_the_reference_is_missed(model):
    strategy = EarlyExit(EARLY.threshold, cache="exact")
    truth = [[4, 1, 9, 3, 3, 2, 0, 8, 12], [7], [0, 1, 2, 3, 4], [5] * 9, [6, 2]]
    # The full model is right everywhere in the last, early exit in the second; of the others, now and then.
    truth[4] = generate(model, [PROMPTS[4]], max_new_tokens=9).tokens[0]
    truth[1] = choices_by_hand(model, PROMPTS[1], truth[1], strategy.threshold)[0]
    sequences = full_model(model, PROMPTS, truth, "risk", stop_tokens=[], **HOW)
    found = measure(model, strategy, sequences, "risk", stop_tokens=[], **HOW)
    expected = []
    for prompt, text in zip(PROMPTS, truth, strict=True):
        early, full = (
            choices_by_hand(model, prompt, text, strategy.threshold)[0],
            choices_by_hand(model, prompt, text)[0],
        )
        misses = [sum(a != b for a, b in zip(said, text, strict=True)) / len(text) for said in (early, full)]
        expected.append(max(0.0, misses[0] - misses[1]))
    assert found.losses.tolist() == pytest.approx(expected)
    assert sequences.texts == truth and max(expected) > 0


@pytest.mark.parametrize("cache", ["exact", "propagate"])
def test_along_its_own_text_early_exit_says_that_text(model, cache):
    """So that what was said along a text is what real decoding says: the same exits, the same cache."""
    strategy = EarlyExit(EARLY.threshold, cache=cache, decay=True)
    own = generate(model, PROMPTS, strategy, max_new_tokens=9)
    sequences = full_model(model, PROMPTS, own.tokens, "risk", stop_tokens=[], **HOW)
    found = measure(model, strategy, sequences, "risk", stop_tokens=[], **HOW)
    misses = [differing(full, text) for full, text in zip(sequences.full, own.tokens, strict=True)]
    assert max(misses) > 0 and found.losses.tolist() == [0.0] * 5
    assert found.agreement == pytest.approx(1 - sum(misses) / 45)
    assert found.mean_layers == pytest.approx(own.stats.mean_layers)


@pytest.mark.parametrize("consistency", ["textual", "token", "risk"])
def test_the_full_model_loses_nothing(model, consistency):
    truth = [[1, 2, 3]] * 5
    sequences = full_model(model, PROMPTS, truth, consistency, stop_tokens=[2], **HOW)
    found = measure(model, EarlyExit(1.0), sequences, consistency, stop_tokens=[2], **HOW)
    assert found.losses.tolist() == [0.0] * 5 and (found.agreement, found.mean_layers) == (1.0, 4.0)
    assert found.losses.dtype == torch.float64
