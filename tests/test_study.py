"""study: every section that a report documents, on the smallest models that have them."""

import math
from types import SimpleNamespace

import pytest

from layerskip_moe import ModelConfig, MoEDecoder, load_corpus
from layerskip_moe.analysis import write_report
from layerskip_moe.study import StudyConfig, describe, side_by_side, study

SMALL = dict(seq_len=16, batch_size=4, max_windows=8, num_prompts=5, prompt_length=8, max_new_tokens=8)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for index in range(12):
        (folder / f"{index}.txt").write_text(f"The {index} brown foxes jump over the lazy dogs, again.\n" * 60)
    return load_corpus(folder, vocab_size=300, cache_dir=folder / "cache", progress=False)


def model_of(n_layers, corpus, **more):
    sizes = dict(d_model=16, n_heads=2, d_ff=16, num_experts=4, top_k=2, max_seq_len=64, init_std=0.3)
    return MoEDecoder(ModelConfig(corpus.vocab_size, n_layers=n_layers, **sizes | more))


def test_all_sections_and_a_report_of_them(corpus, tmp_path):
    model = model_of(5, corpus).train()
    found = study(model, corpus, StudyConfig(**SMALL, draft_lengths=(1, 3), thresholds=(0.0, 0.2, 1.0)), progress=False)
    assert model.training

    sweep = found["sweep"]
    assert (sweep["exit_layers"], sweep["draft_lengths"], sweep["prompts"]) == ([1, 2], [1, 3], 1)
    assert sweep["identical"] == sweep["outputs"] == 4
    greedy, sampled = found["decoding"]
    assert (greedy["temperature"], sampled["temperature"], greedy["prompts"]) == (0.0, 0.8, 5)
    for comparison in (greedy, sampled):
        _, speculative, adaptive, no_int8 = comparison["strategies"]
        assert [row["identical"] for row in comparison["strategies"]] == [5] * 4
        assert no_int8["name"] == "self-speculative, adaptive, no int8"
        assert adaptive["name"] == "self-speculative, adaptive" and adaptive["exit_layer"] is None
        assert {name: speculative[name] for name in sweep["chosen"]} == sweep["chosen"]

    (lossy,) = found["strategies"]
    layers = {row["name"]: row["mean_layers"] for row in lossy["strategies"]}
    assert layers["plain"] == layers["self-speculative"] == 5.0
    assert layers["first 2 layers alone"] == 2.0 and layers["without every 4th layer"] == 4.0
    assert layers["without 1 layers at random"] == 4.0
    assert 1.0 <= layers["early exit at 0.2"] <= 5.0 and 1.0 <= layers["early exit at 0.2, exact cache"] <= 5.0

    early = found["early_exit"]
    assert [row["threshold"] for row in early["decoding"]["strategies"]] == [None, 0.0, 0.2, 1.0]
    assert [row["mean_layers"] for row in early["decoding"]["strategies"]][::3] == [5.0, 5.0]
    assert early["decoding"]["strategies"][1]["mean_layers"] == 1.0
    assert early["held_out"]["mean_layers"][0] == 1.0 and early["held_out"]["perplexity"][2] == pytest.approx(
        found["exits"].perplexity[-1]
    )
    assert early["by_prompt"]["threshold"] == 0.2
    assert [sum(row) for row in early["by_prompt"]["exits"]] == [4] * early["decoding"]["prompts"]

    text = write_report(tmp_path, found).read_text(encoding="utf-8")
    for title in ("Decoding", "Every way to decode", "Leaving early", "Exit layers", "Experts", "Continuations"):
        assert f"## {title}" in text


def test_what_was_measured_is_described(corpus):
    model = model_of(3, corpus)
    told = describe(model, corpus)
    assert told.keys() == {"machine", "model", "corpus"} and told["machine"]["device"] == "cpu"
    assert told["model"]["parameters"] == sum(weights.numel() for weights in model.parameters())
    assert told["model"]["active_parameters"] < told["model"]["parameters"] and told["model"]["config"] == model.config
    assert told["corpus"] == {
        "name": corpus.name,
        "train_tokens": len(corpus.train),
        "validation_tokens": len(corpus.validation),
        "vocab_size": model.config.vocab_size,
    }


def test_a_part_of_it_for_a_comparison(corpus):
    config = StudyConfig(**SMALL, thresholds=(0.1, 0.1000001))  # near, and yet two
    model = model_of(3, corpus)
    whole, part = (
        study(model, corpus, config, progress=False),
        study(model, corpus, config, whole=False, progress=False),
    )
    assert whole.keys() - part.keys() == {"expert_choice", "early_exit", "strategies"}
    assert part["exits"] == whole["exits"] and len(whole["early_exit"]["decoding"]["strategies"]) == 3


@pytest.mark.parametrize("n_layers", [1, 2, 3])
@pytest.mark.parametrize("num_experts", [0, 4])
def test_small_and_dense_models_have_what_they_can_have(corpus, n_layers, num_experts):
    model = model_of(n_layers, corpus, num_experts=num_experts)
    found = study(model, corpus, StudyConfig(**SMALL | {"num_prompts": 1, "max_new_tokens": 1}), progress=False)
    assert all(row["identical"] == 1 for row in found["decoding"][0]["strategies"])
    assert bool(found["expert_choice"].layers) == bool(num_experts)


def test_a_setting_given_whole_is_not_swept(corpus):
    found = study(model_of(3, corpus), corpus, StudyConfig(**SMALL, exit_layer=2, draft_length=3), progress=False)
    assert found["sweep"] is None
    row = found["decoding"][0]["strategies"][1]
    assert (row["exit_layer"], row["draft_length"]) == (2, 3)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"temperature": 0}, "temperature=0 is greedy"),
        ({"seq_len": 10**6}, "too few for two windows of seq_len"),
        ({"max_windows": 1}, "max_windows=1 must be 2 or more"),
        ({"exit_layer": 4}, "exit_layer=4 must be between 1 and n_layers=3"),
        ({"exit_layer": 0}, "exit_layer=0 must be between 1 and n_layers=3"),
        ({"draft_length": 0}, "draft_length=0"),
        ({"max_new_tokens": 60}, "past max_seq_len=64"),
        ({"thresholds": ()}, "at least one threshold"),
        ({"thresholds": (0.1, 0.1)}, "thresholds=.* must rise"),
        ({"thresholds": (0.5, 0.1)}, "thresholds=.* must rise"),
        ({"prompt_length": 0}, "prompt_length=0"),
        ({"thresholds": (math.nan,)}, "threshold"),
        ({"draft_lengths": ()}, "at least one draft length"),
        ({"num_prompts": 0}, "num_prompts=0"),
    ],
)
def test_what_cannot_be_measured_is_said_before(corpus, settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        StudyConfig(**SMALL | settings).check(model_of(3, corpus).config, corpus)


def test_two_runs_side_by_side():
    def found(ppl):
        exits = SimpleNamespace(perplexity=[9.0, ppl], agreement=[0.5, 1.0])
        return {"exits": exits, "experts": SimpleNamespace(metrics={1: {"max_violation": ppl}}), "decoding": [ppl]}

    results = [SimpleNamespace(steps=7, best_step=best, seconds=1.0) for best in (5, 7)]
    told = side_by_side(results[0], found(3.0), results[1], found(4.0), seed=2)
    assert (told["steps"], told["seed"]) == (7, 2)
    assert [run["name"] for run in told["runs"]] == ["with LayerSkip", "without LayerSkip"]
    assert [run["perplexity"][-1] for run in told["runs"]] == [3.0, 4.0]
    assert [run["best_step"] for run in told["runs"]] == [5, 7]
