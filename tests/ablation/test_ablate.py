"""ablate: every variant with every seed, once; what is stopped goes on, what fails is told, mistakes come first."""

import json
from dataclasses import replace

import pytest

from layerskip_moe import TrainConfig
from layerskip_moe.ablation import MeasureConfig, Variant, ablate, runs
from layerskip_moe.training import loop

VARIANTS = {"base": Variant(), "paper": Variant(recipe={"exit_weights": "paper"})}
SMALL = MeasureConfig(max_windows=4, spans=(2, 4), draft_lengths=(2,), num_prompts=2, prompt_length=8, max_new_tokens=8)


@pytest.fixture
def measured(monkeypatch, result):
    """Models are measured by the sum of their weights alone; gives the list of them."""
    models = []

    def measure(model, corpus, measures, *, seed, **text):
        models.append(model)
        total = sum(float(weights.detach().double().abs().sum()) for weights in model.parameters())
        numbers = result("any", seed, perplexity=total)
        return {name: numbers[name] for name in ("exits", "union", "decoding")}

    monkeypatch.setattr(runs, "measure", measure)
    monkeypatch.setattr("layerskip_moe.ablation.write._draw", lambda out_dir, told: {})
    return models


@pytest.fixture
def no_training(monkeypatch):
    def train(*args, **options):
        raise AssertionError("nothing is left to train")

    monkeypatch.setattr(runs, "train", train)


def results_in(folder):
    paths = sorted((folder / "runs").glob("*/seed*/result.json"))
    return {f"{path.parts[-3]} {path.parts[-2]}": json.loads(path.read_text()) for path in paths}


def test_every_variant_is_trained_with_every_seed_and_differs_in_nothing_else(
    corpus, network, recipe, tmp_path, measured
):
    variants = VARIANTS | {"last": Variant(network={"moe_layers": "last half"})}
    path = ablate(corpus, network, recipe, variants, tmp_path, seeds=(3, 7), measures=SMALL, progress=False)
    assert path == tmp_path / "ablation.md" and path.read_text().startswith("# Ablation")
    found = results_in(tmp_path)
    assert sorted(found) == [f"{name} seed{seed}" for name in sorted(variants) for seed in (3, 7)]
    for name, result in found.items():
        variant, seed = name.split(" seed")
        settings = result["setting"]
        base = found[f"base seed{seed}"]["setting"]
        differ = {f for part in ("network", "recipe") for f in base[part] if base[part][f] != settings[part][f]}
        assert differ == {"base": set(), "paper": {"exit_weights"}, "last": {"moe_layers"}}[variant]
        assert (result["variant"], result["seed"], settings["recipe"]["seed"]) == (variant, int(seed), int(seed))
        assert (result["steps"], result["tokens"], result["failed"]) == (4, 4 * 4 * 16, None)
    told = json.loads((tmp_path / "ablation.json").read_text())
    assert [row["variant"] for row in told["summary"]] == list(variants)
    assert len(told["runs"]) == 6 and told["seeds"] == [3, 7]
    assert not list(tmp_path.rglob("checkpoint.pt"))
    assert len({result["exits"]["perplexity"][-1] for result in found.values()}) == 6  # each its own weights


def test_a_finished_run_is_not_made_again(corpus, network, recipe, tmp_path, measured, no_training, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(runs, "train", loop.train)
        ablate(corpus, network, recipe, VARIANTS, tmp_path, seeds=(0,), measures=SMALL, progress=False)
    before = (tmp_path / "ablation.json").read_text()
    (tmp_path / "ablation.md").unlink()
    ablate(corpus, network, recipe, VARIANTS, tmp_path, seeds=(0,), measures=SMALL, progress=False)
    assert (tmp_path / "ablation.json").read_text() == before and (tmp_path / "ablation.md").exists()
    with pytest.raises(AssertionError, match="nothing is left"):  # another seed is another run
        ablate(corpus, network, recipe, VARIANTS, tmp_path, seeds=(0, 1), measures=SMALL, progress=False)


def test_a_stopped_run_goes_on_to_the_same_weights(corpus, network, recipe, tmp_path, measured, monkeypatch):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    ablate(corpus, network, recipe, VARIANTS, whole, seeds=(0,), measures=SMALL, progress=False)
    steps, real = [], loop._Run.step

    def step(run, number, text):
        steps.append((run.config.exit_weights, number))
        if steps.count(("paper", 2)) == 1 and number == 2 and run.config.exit_weights == "paper":
            raise KeyboardInterrupt
        return real(run, number, text)

    monkeypatch.setattr(loop._Run, "step", step)
    with pytest.raises(KeyboardInterrupt):
        ablate(corpus, network, recipe, VARIANTS, stopped, seeds=(0,), measures=SMALL, progress=False)
    assert [name for name in results_in(stopped)] == ["base seed0"]
    assert json.loads((stopped / "ablation.json").read_text())["summary"][0]["variant"] == "base"
    ablate(corpus, network, recipe, VARIANTS, stopped, seeds=(0,), measures=SMALL, progress=False)
    base, paper = [("equal", n) for n in range(4)], [("paper", n) for n in (0, 1, 2, 2, 3)]
    assert steps == base + paper  # the base once, the other from where it was stopped
    told = [{name: result["exits"] for name, result in results_in(folder).items()} for folder in (whole, stopped)]
    assert told[0] == told[1] and len(told[0]) == 2


def test_a_run_stopped_while_it_was_measured_is_only_measured_again(
    corpus, network, recipe, tmp_path, measured, monkeypatch
):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    only = {"base": Variant()}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(runs, "measure", interrupted)
        ablate(corpus, network, recipe, only, tmp_path, seeds=(0,), measures=SMALL, progress=False)
    monkeypatch.setattr(loop._Run, "step", interrupted)
    ablate(corpus, network, recipe, only, tmp_path, seeds=(0,), measures=SMALL, progress=False)
    assert len(measured) == 1 and list(results_in(tmp_path)) == ["base seed0"]


def test_a_run_that_diverges_is_told_and_the_next_begins(corpus, network, recipe, tmp_path, measured):
    variants = {"base": Variant(), "wild": Variant(recipe={"learning_rate": 1e30}), "paper": VARIANTS["paper"]}
    path = ablate(corpus, network, recipe, variants, tmp_path, seeds=(0,), measures=SMALL, progress=False)
    found = results_in(tmp_path)
    assert "lower learning_rate" in found["wild seed0"]["failed"] and found["paper seed0"]["failed"] is None
    assert f"- wild, seed 0: {found['wild seed0']['failed']}" in path.read_text()
    assert not list(tmp_path.rglob("checkpoint.pt"))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (dict(recipe={"learning_rate": 0.5}), r"of another recipe \(learning_rate was 0.001 and is now 0.5\)"),
        (dict(measures={"max_windows": 5}), r"of another measures \(max_windows was 4 and is now 5\)"),
        (dict(network={"d_ff": 8}), r"of another network \(d_ff was 16 and is now 8\)"),
    ],
)
def test_results_of_other_settings_are_not_mixed(
    corpus, network, recipe, tmp_path, measured, no_training, monkeypatch, changes, sentence
):
    only = {"base": Variant()}
    with monkeypatch.context() as patch:
        patch.setattr(runs, "train", loop.train)
        ablate(corpus, network, recipe, only, tmp_path, seeds=(0,), measures=SMALL, progress=False)
    parts = {"network": network, "recipe": recipe, "measures": SMALL}
    for part, fields in changes.items():
        parts[part] = replace(parts[part], **fields)
    with pytest.raises(ValueError, match=sentence) as error:
        ablate(
            corpus, parts["network"], parts["recipe"], only, tmp_path, seeds=(0,), measures=parts["measures"],
            progress=False,
        )  # fmt: skip
    assert str(error.value).endswith("or another out_dir.")


def test_a_damaged_result_is_not_taken(corpus, network, recipe, tmp_path, measured, no_training):
    folder = tmp_path / "runs" / "base" / "seed0"
    folder.mkdir(parents=True)
    for text in ("{", "[]", "{}"):
        (folder / "result.json").write_text(text)
        with pytest.raises(ValueError, match=r"result.json is damaged \(.*remove it"):
            ablate(corpus, network, recipe, VARIANTS, tmp_path, seeds=(0,), measures=SMALL, progress=False)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (dict(variants={"paper": Variant()}), "the variants paper lack 'base'"),
        (dict(variants={"base": Variant(), "long": Variant(recipe={"max_steps": 9})}), "'long' changes max_steps"),
        (dict(variants={"base": Variant(), "a/b": Variant()}), "'a/b' must be named as a folder can be"),
        (dict(variants={"base": Variant(), "x": Variant(network={"top_k": 9})}), "top_k=9 experts cannot be chosen"),
        (
            dict(variants={"base": Variant(), "x": Variant(recipe={"exit_weights": "drafting", "drafting_exit": 4})}),
            "drafting_exit=4 must be an early exit",
        ),
        (dict(variants={"base": Variant(), "x": Variant(network={"max_seq_len": 8})}), "longer than max_seq_len=8"),
        (dict(variants={"base": Variant(), "x": Variant(network={"max_seq_len": 15})}), "longer than max_seq_len=15"),
        (dict(seeds=()), "seeds=.* must be at least one"),
        (dict(seeds=(1, 1)), "differ from each other"),
        (dict(measures=MeasureConfig(spans=(2, 17))), "within a window of seq_len=16"),
        (dict(measures=MeasureConfig(prompt_length=60, num_prompts=2)), "past max_seq_len=64"),
        (dict(measures=MeasureConfig(num_prompts=9000)), "separate prompts"),
        (dict(recipe=TrainConfig(max_steps=4, seq_len=5000)), "longer than max_seq_len=64"),
    ],
)
def test_a_mistake_is_found_before_anything_is_trained(
    corpus, network, recipe, tmp_path, no_training, changes, sentence
):
    given = dict(network=network, recipe=recipe, variants=VARIANTS, seeds=(0,), measures=SMALL) | changes
    with pytest.raises(ValueError, match=sentence):
        ablate(corpus, out_dir=tmp_path, progress=False, **given)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "fields",
    [
        dict(max_windows=0), dict(spans=()), dict(spans=(0,)), dict(draft_lengths=()), dict(num_prompts=0),
        dict(prompt_length=0), dict(max_new_tokens=-1), dict(temperatures=(0.8, 0.8)), dict(temperatures=(-1.0,)),
    ],
    ids=str,
)  # fmt: skip
def test_measures_that_make_no_sense_are_refused(fields):
    with pytest.raises(ValueError, match=next(iter(fields)).removesuffix("s")):
        MeasureConfig(**fields)
