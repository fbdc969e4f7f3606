"""calibrate_early_exit: what it certifies is what decoding measures, on sequences that did not choose the shape."""

import json

import pytest
import torch

from layerskip_moe.analysis import calibrate
from layerskip_moe.analysis.calibrate import NEW_DOCUMENTS, THESE_DOCUMENTS, calibrate_early_exit, prompts_needed
from layerskip_moe.analysis.consistency import full_model, measure
from layerskip_moe.analysis.exit_shape import thresholds_at
from layerskip_moe.analysis.learn_then_test import p_value, sequences_needed
from layerskip_moe.analysis.train_classifier import train_classifier
from layerskip_moe.generation import EarlyExit, generate
from layerskip_moe.generation.calibration import Certified
from layerskip_moe.nn.fingerprint import model_fingerprint

PROMPTS = [[i % 17, (5 * i + 1) % 17, (i * i) % 17][: 1 + i % 3] for i in range(40)]
REFERENCES = [[(3 * i + t) % 17 for t in range(1 + i % 8)] for i in range(40)]
HOW = dict(tolerance=0.3, risk=0.1, max_new_tokens=6, steps=6, batch_size=16, progress=False)


@pytest.fixture
def model(decoder):
    """Its last layer says a little, so that early exits agree with it often."""
    model = decoder(n_layers=4)
    with torch.no_grad():
        model.blocks[3].attention.output.weight.mul_(0.3)
    return model


@pytest.mark.parametrize("consistency", ["textual", "token", "risk"])
@pytest.mark.parametrize("kind", ["softmax_diff", "state"])
def test_the_certificate_is_of_real_decoding(model, monkeypatch, consistency, kind):
    seen, decay = [], kind == "softmax_diff"  # neighbouring states are too alike for a threshold that falls
    monkeypatch.setattr(
        calibrate, "full_model", lambda model, prompts, *args, **how: seen.append(prompts) or full_model(
            model, prompts, *args, **how
        ),
    )  # fmt: skip
    strategy = EarlyExit(0.1, kind, 1, decay, "exact", 2.0)
    found = calibrate_early_exit(model, PROMPTS, strategy, references=REFERENCES, consistency=consistency, **HOW)
    for_shape, certifying = seen
    assert sorted(for_shape + certifying) == sorted(PROMPTS) and len(for_shape) == 10 == found.shape_sequences
    assert found.scale < 1 and found.p_value <= 0.1 and found.sequences == 30
    assert found.strategy.threshold == thresholds_at(found.shape, found.scale)
    assert found.strategy == EarlyExit(found.strategy.threshold, kind, 1, decay, "exact", 2.0)
    assert found.shape[0] == 0 or kind != "state"

    how = dict(stop_tokens=[], max_new_tokens=6, batch_size=7)
    order = [PROMPTS.index(prompt) for prompt in certifying]
    references = [REFERENCES[i][:6] for i in order]
    again = measure(
        model, found.strategy, full_model(model, certifying, references, consistency, **how), consistency, **how
    )
    if consistency != "risk":  # prompts that are there twice have one reference or another
        assert found.mean_loss == pytest.approx(float(again.losses.mean()))
        assert found.p_value == pytest.approx(p_value(again.losses, 0.3))
        assert (found.agreement, found.mean_layers) == pytest.approx((again.agreement, again.mean_layers))
    scales = [1 - (step / 6) ** 2 for step in range(1, 7)]
    assert [trial.scale for trial in found.tests] == scales[: len(found.tests)]
    passed = [trial for trial in found.tests if trial.p_value <= 0.1]
    assert passed[-1].scale == found.scale and len(found.tests) - len(passed) <= 1


def test_documents_have_a_part_in_shape_or_certificate_and_one_prompt_each_where_there_are_enough(model, monkeypatch):
    """At tolerance 0.3 and risk 0.1 it takes 7 to certify; prompts can be told from another by their first 3 tokens."""
    prompts = [[i // 17, i % 17, 5] for i in range(40)]
    seen = []
    monkeypatch.setattr(
        calibrate,
        "full_model",
        lambda model, asked, *args, **how: seen.append(asked) or full_model(model, asked, *args, **how),
    )

    def used(documents):
        del seen[:]
        found = calibrate_early_exit(model, prompts, documents=documents, **HOW)
        parts = [[documents[prompts.index(prompt)] for prompt in part] for part in seen]
        assert (found.shape_sequences, found.sequences) == tuple(map(len, parts))
        assert (found.shape_documents, found.documents) == tuple(len(set(part)) for part in parts)
        return found, *parts

    # 14 documents of 2 or 3 prompts: 3 to 5 of them are a quarter of 40 prompts at most, and 9 or more are left.
    found, shape, certifying = used([i % 14 for i in range(40)])
    assert not set(shape) & set(certifying) and 8 <= len(shape) <= 10
    assert len(certifying) == len(set(certifying)) == 14 - len(set(shape)) and found.holds_for == NEW_DOCUMENTS
    # 8 documents of 5: 2 for the shape, 6 left, which are too few for one prompt of each.
    found, shape, certifying = used([i % 8 for i in range(40)])
    assert not set(shape) & set(certifying) and len(certifying) == 30
    assert (found.shape_documents, found.documents, found.holds_for) == (2, 6, THESE_DOCUMENTS)
    # One: its prompts are dealt.
    found, shape, certifying = used([3] * 40)
    assert (len(shape), len(certifying), found.documents, found.holds_for) == (10, 30, 1, THESE_DOCUMENTS)


@pytest.mark.parametrize(("min_layer", "exits"), [(1, {2}), (3, {3})])
def test_few_exits_are_the_only_ones_that_are_taken(model, min_layer, exits):
    strategy = EarlyExit(0.1, min_layer=min_layer)
    found = calibrate_early_exit(model, PROMPTS, strategy, consistency="token", exits=1, **HOW)
    assert {layer for layer, depth in enumerate(found.shape, start=1) if depth} == exits
    out = generate(model, PROMPTS, found.strategy, max_new_tokens=6)
    assert {depth for row in out.layers_run for depth in row} == exits | {4}


def test_the_seed_draws_the_split_and_nothing_else_is_random(model):
    one, same, other = (calibrate_early_exit(model, PROMPTS, consistency="token", seed=s, **HOW) for s in (0, 0, 1))
    assert one == same and one.shape != other.shape


def test_a_file_decodes_as_what_was_certified(model, tmp_path):
    classifier = train_classifier(model, [[*p, *r] for p, r in zip(PROMPTS, REFERENCES, strict=True)], progress=False)
    found = calibrate_early_exit(model, PROMPTS, EarlyExit(1.0, classifier), consistency="token", **HOW)
    path = tmp_path / "runs" / "early_exit.json"
    found.save(path, checkpoint="x")
    assert {file.name for file in path.parent.iterdir()} == {"early_exit.json", "early_exit.safetensors"}
    told = json.loads(path.read_text())["calibration"]
    assert told["checkpoint"] == "x" and (told["scale"], told["sequences"]) == (found.scale, 30)
    assert told["tests"][0].keys() == {"scale", "mean_loss", "p_value"}
    assert (told["prompt_lengths"], told["documents"], told["holds_for"]) == ([1, 3], 30, NEW_DOCUMENTS)
    assert EarlyExit(path).certified == Certified(model_fingerprint(model), 6)
    got = generate(model, PROMPTS[:5], EarlyExit(path), max_new_tokens=6)
    expected = generate(model, PROMPTS[:5], found.strategy, max_new_tokens=6)
    assert (got.tokens, got.layers_run) == (expected.tokens, expected.layers_run)


def test_where_no_exit_can_be_trusted_nobody_leaves(decoder, tmp_path):
    """Confident at every layer, and wrong: the certificate is of the full model, whose loss is nought."""
    model = decoder(n_layers=3)
    with torch.no_grad():
        model.blocks[2].attention.output.weight.mul_(100)

    def always(hidden, previous, logits):
        return torch.ones(len(hidden))

    found = calibrate_early_exit(
        model, PROMPTS, EarlyExit(0.5, always), consistency="token", **{**HOW, "tolerance": 0.1}
    )
    assert (found.scale, found.mean_loss, found.agreement, found.mean_layers) == (1.0, 0.0, 1.0, 3.0)
    assert found.strategy.threshold == (1.0, 1.0) and found.p_value == pytest.approx(0.9**30)
    plain = generate(model, PROMPTS[:4], max_new_tokens=6)
    assert generate(model, PROMPTS[:4], found.strategy, max_new_tokens=6).tokens == plain.tokens
    with pytest.raises(ValueError, match="is a function, which no file can hold"):
        found.save(tmp_path / "x.json")


@pytest.mark.parametrize(("tolerance", "risk"), [(0.05, 0.05), (0.1, 0.05), (0.02, 0.2), (0.5, 0.5), (0.9, 0.9)])
def test_too_few_prompts_are_refused_with_the_number_needed(model, tolerance, risk):
    needed = prompts_needed(tolerance, risk)

    def left(n):
        return n - max(1, n // 4)

    assert left(needed) >= sequences_needed(tolerance, risk) > left(needed - 1)
    how = {**HOW, "tolerance": tolerance, "risk": risk}
    message = f"takes at least {sequences_needed(tolerance, risk)}, even without any loss; give {needed} or more"
    with pytest.raises(ValueError, match=message):
        calibrate_early_exit(model, [[1]] * (needed - 1), **how)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(consistency="exact"), "consistency='exact' is unknown"),
        (dict(consistency="risk"), "needs one reference for each prompt"),
        (dict(consistency="risk", references=REFERENCES[1:]), "needs one reference for each prompt"),
        (dict(consistency="risk", references=[[]] * 40), "of 1 token or more"),
        (dict(documents=[1, 2]), "documents has 2 numbers for 40 prompts"),
        (dict(exits=0), "exits=0 must be 1 or more, or None for all"),
        (dict(steps=0), "steps=0 must be 1 or more"),
        (dict(tolerance=0.0), "tolerance=0.0 must be above 0"),
        (dict(max_new_tokens=500), "past max_seq_len"),
        (dict(strategy=EarlyExit(0.5, min_layer=9)), "min_layer=9 must be between 1 and n_layers=4"),
    ],
    ids=str,
)
def test_bad_input_is_refused(model, change, message):
    with pytest.raises(ValueError, match=message):
        calibrate_early_exit(model, PROMPTS, **{**HOW, **change})
