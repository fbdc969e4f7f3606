"""What is measured and timed of a model: the same as the parts measure alone, and a pair picked on other prompts."""

from dataclasses import asdict

import pytest

from layerskip_moe import MoEDecoder
from layerskip_moe.ablation import DecodingConfig, MeasureConfig, timing
from layerskip_moe.ablation.measure import measure
from layerskip_moe.analysis import evaluate_exits, expert_union

TEXT = dict(seq_len=16, batch_size=4)


def test_a_model_is_measured_whole(corpus, network):
    model = MoEDecoder(network, seed=1)
    found = measure(model, corpus, MeasureConfig(max_windows=4, spans=(2, 4)), **TEXT, progress=False)
    held_out = dict(**TEXT, max_windows=4, progress=False)
    assert found == {
        "exits": asdict(evaluate_exits(model, corpus.validation, **held_out)),
        "union": asdict(expert_union(model, corpus.validation, (2, 4), **held_out)),
    }


def test_a_pair_is_picked_on_other_prompts_than_it_is_timed_on(corpus, network, monkeypatch):
    swept, real = [], timing.sweep_drafting

    def sweep_drafting(model, prompts, **settings):
        swept.append((prompts, settings))
        return real(model, prompts, **settings)

    monkeypatch.setattr(timing, "sweep_drafting", sweep_drafting)
    timed, compare = [], timing.compare_decoding

    def compare_decoding(model, prompts, strategies, **settings):
        timed.append((prompts, strategies))
        return compare(model, prompts, strategies, **settings)

    monkeypatch.setattr(timing, "compare_decoding", compare_decoding)
    model = MoEDecoder(network, seed=1)
    decoding = DecodingConfig(draft_lengths=(1, 2), num_prompts=2, prompt_length=8, max_new_tokens=5, prompt_seed=5)
    found = timing.time_decoding(model, corpus, decoding, progress=False)
    assert [of["temperature"] for of in found] == [0.0, 0.8]
    for of, (others, settings), (prompts, strategies) in zip(found, swept, timed, strict=True):
        assert settings["exit_layers"] == [1, 1, 2] and settings["max_new_tokens"] == 3
        assert (settings["temperature"], settings["seed"]) == (of["temperature"], 5)
        assert len(prompts) == of["prompts"] == of["identical"] == 2 and len(others) == 1
        assert others[0] not in prompts  # a pair owes none of its lead to luck on them
        drafting = strategies["self-speculative"]
        assert (drafting.exit_layer, drafting.draft_length) == (of["exit_layer"], of["draft_length"])
        assert of["exit_layer"] in (1, 2) and of["draft_length"] in (1, 2)
        assert of["speed_up"] > 0 and of["plain_tokens_per_second"] > 0 and 0 <= of["acceptance_rate"] <= 1


def test_a_text_too_short_is_refused(corpus):
    with pytest.raises(ValueError, match="too few for a window of seq_len=100000"):
        MeasureConfig().check(corpus, seq_len=100_000)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (MeasureConfig, dict(max_windows=0)),
        (MeasureConfig, dict(spans=())),
        (MeasureConfig, dict(spans=(0,))),
        (DecodingConfig, dict(draft_lengths=())),
        (DecodingConfig, dict(num_prompts=0)),
        (DecodingConfig, dict(prompt_length=0)),
        (DecodingConfig, dict(max_new_tokens=-1)),
        (DecodingConfig, dict(temperatures=(0.8, 0.8))),
        (DecodingConfig, dict(temperatures=(-1.0,))),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(kind, fields):
    with pytest.raises(ValueError, match=next(iter(fields)).removesuffix("s")):
        kind(**fields)
