"""ablate: every variant with every seed, once; what is stopped goes on, what fails is told, mistakes come first."""

import json
import os
import re
import shutil
import signal
from dataclasses import replace

import pytest

from layerskip_moe import TrainConfig
from layerskip_moe.ablation import DecodingConfig, MeasureConfig, Variant, ablate, grid, runs
from layerskip_moe.bench import describe_machine
from layerskip_moe.training import loop
from layerskip_moe.training import run as run_module

VARIANTS = {"base": Variant(), "paper": Variant(recipe={"exit_weights": "paper"})}
SMALL = dict(
    measures=MeasureConfig(max_windows=4, spans=(2, 4)),
    decoding=DecodingConfig(draft_lengths=(2,), num_prompts=2, prompt_length=8, max_new_tokens=8),
    progress=False,
)


@pytest.fixture
def measured(monkeypatch, result):
    """Models are measured by the sum of their weights alone, and timed by it; gives what was done to which sum."""
    done = []

    def total(model):
        return sum(float(weights.detach().double().abs().sum()) for weights in model.parameters())

    def measure(model, corpus, measures, **text):
        done.append(("measured", total(model)))
        numbers = result("any", 0, perplexity=total(model))
        return {name: numbers[name] for name in ("exits", "union")}

    def time_decoding(model, corpus, decoding, **options):
        done.append(("timed", total(model)))
        return result("any", 0, tokens_per_second=total(model))["decoding"]

    monkeypatch.setattr(runs, "measure", measure)
    monkeypatch.setattr(runs, "time_decoding", time_decoding)
    monkeypatch.setattr("layerskip_moe.ablation.write._draw", lambda out_dir, told: {})
    return done


@pytest.fixture
def no_training(monkeypatch):
    def train(*args, **options):
        raise AssertionError("nothing is left to train")

    monkeypatch.setattr(runs, "train", train)


ORDER = [f"{name} seed{seed}" for seed in (3, 7) for name in VARIANTS]


def folder_of(out_dir, name):
    return out_dir / "runs" / name.replace(" ", "/")


def results_in(folder):
    paths = sorted((folder / "runs").glob("*/seed*/result.json"))
    return {f"{path.parts[-3]} {path.parts[-2]}": json.loads(path.read_text()) for path in paths}


def test_every_variant_is_trained_with_every_seed_and_differs_in_nothing_else(
    corpus, network, recipe, tmp_path, measured
):
    variants = VARIANTS | {"last": Variant(network={"moe_layers": "last half"})}
    path = ablate(corpus, network, recipe, variants, tmp_path, seeds=(3, 7), **SMALL)
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
    assert not list(tmp_path.rglob("checkpoints"))
    assert len({result["exits"]["perplexity"][-1] for result in found.values()}) == 6  # each its own weights


def test_a_finished_run_is_not_made_again(corpus, network, recipe, tmp_path, measured, no_training, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(runs, "train", loop.train)
        ablate(corpus, network, recipe, VARIANTS, tmp_path, seeds=(0,), **SMALL)
    before = (tmp_path / "ablation.json").read_text()
    (tmp_path / "ablation.md").unlink()
    ablate(corpus, network, recipe, VARIANTS, tmp_path, seeds=(0,), **SMALL)
    assert (tmp_path / "ablation.json").read_text() == before and (tmp_path / "ablation.md").exists()
    with pytest.raises(AssertionError, match="nothing is left"):  # another seed is another run
        ablate(corpus, network, recipe, VARIANTS, tmp_path, seeds=(0, 1), **SMALL)


def test_a_stopped_run_goes_on_to_the_same_weights(corpus, network, recipe, tmp_path, measured, monkeypatch):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    ablate(corpus, network, recipe, VARIANTS, whole, seeds=(0,), **SMALL)
    steps, real = [], run_module.Run.step

    def step(run, number, text):
        steps.append((run.config.exit_weights, number))
        if steps.count(("paper", 2)) == 1 and number == 2 and run.config.exit_weights == "paper":
            raise KeyboardInterrupt
        return real(run, number, text)

    monkeypatch.setattr(run_module.Run, "step", step)
    with pytest.raises(KeyboardInterrupt):
        ablate(corpus, network, recipe, VARIANTS, stopped, seeds=(0,), **SMALL)
    assert [name for name in results_in(stopped)] == ["base seed0"]
    assert json.loads((stopped / "ablation.json").read_text())["summary"][0]["variant"] == "base"
    ablate(corpus, network, recipe, VARIANTS, stopped, seeds=(0,), **SMALL)
    base, paper = [("equal", n) for n in range(4)], [("paper", n) for n in (0, 1, 2, 2, 3)]
    assert steps == base + paper  # the base once, the other from where it was stopped
    told = [{name: result["exits"] for name, result in results_in(folder).items()} for folder in (whole, stopped)]
    assert told[0] == told[1] and len(told[0]) == 2


def test_ctrl_c_says_how_an_ablation_goes_on(corpus, network, recipe, tmp_path, measured, monkeypatch):
    real = run_module.Run.step

    def step(run, number, text):
        if number == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return real(run, number, text)

    only = {"base": Variant()}
    sentence = "base, seed 0, is saved as far as it is; the same again goes on"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match=sentence) as stopped:
        patch.setattr(run_module.Run, "step", step)
        ablate(corpus, network, recipe, only, tmp_path, seeds=(0,), **SMALL)
    assert stopped.value.exit_status == 130
    assert "step-00000003" in [path.name for path in tmp_path.rglob("step-*")]
    ablate(corpus, network, recipe, only, tmp_path, seeds=(0,), **SMALL)
    assert list(results_in(tmp_path)) == ["base seed0"] and not list(tmp_path.rglob("checkpoints"))


def test_a_run_stopped_while_it_was_measured_is_only_measured_again(
    corpus, network, recipe, tmp_path, measured, monkeypatch
):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    only = {"base": Variant()}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(runs, "measure", interrupted)
        ablate(corpus, network, recipe, only, tmp_path, seeds=(0,), **SMALL)
    monkeypatch.setattr(run_module.Run, "step", interrupted)
    ablate(corpus, network, recipe, only, tmp_path, seeds=(0,), **SMALL)
    assert [what for what, _ in measured] == ["measured", "timed"] and list(results_in(tmp_path)) == ["base seed0"]


def test_a_run_that_diverges_is_told_and_the_next_begins(corpus, network, recipe, tmp_path, measured):
    variants = {"base": Variant(), "wild": Variant(recipe={"learning_rate": 1e30}), "paper": VARIANTS["paper"]}
    path = ablate(corpus, network, recipe, variants, tmp_path, seeds=(0,), **SMALL)
    found = results_in(tmp_path)
    assert "lower learning_rate" in found["wild seed0"]["failed"] and found["paper seed0"]["failed"] is None
    assert f"- wild, seed 0: {found['wild seed0']['failed']}" in path.read_text()
    assert not list(tmp_path.rglob("checkpoints"))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (dict(recipe={"learning_rate": 0.5}), r"of another recipe \(learning_rate was 0.001 and is now 0.5\)"),
        (dict(measures={"max_windows": 5}), r"of another measures \(max_windows was 4 and is now 5\)"),
        (dict(decoding={"prompt_seed": 5}), r"of another decoding \(prompt_seed was 0 and is now 5\)"),
        (dict(network={"d_ff": 8}), r"of another network \(d_ff was 16 and is now 8\)"),
    ],
)
def test_results_of_other_settings_are_not_mixed(
    corpus, network, recipe, tmp_path, measured, no_training, monkeypatch, changes, sentence
):
    only = {"base": Variant()}
    with monkeypatch.context() as patch:
        patch.setattr(runs, "train", loop.train)
        ablate(corpus, network, recipe, only, tmp_path, seeds=(0,), **SMALL)
    parts = {"network": network, "recipe": recipe, **SMALL}
    for part, fields in changes.items():
        parts[part] = replace(parts[part], **fields)
    with pytest.raises(ValueError, match=sentence) as error:
        ablate(corpus, variants=only, out_dir=tmp_path, seeds=(0,), **parts)
    assert str(error.value).endswith("or another out_dir.")


def test_a_field_that_came_later_counts_as_its_default(
    corpus, network, recipe, tmp_path, measured, no_training, monkeypatch
):
    only = {"base": Variant()}
    with monkeypatch.context() as patch:
        patch.setattr(runs, "train", loop.train)
        ablate(corpus, network, recipe, only, tmp_path, seeds=(0,), **SMALL)
    later = {  # dense_d_ff, if it is not given, is d_ff
        "result.json": {"network": ["sliding_window", "dense_d_ff", "dropout"], "recipe": ["router_coherence_weight"]},
        "decoding.json": {"decoding": ["prompt_seed"]},
    }
    for name, parts in later.items():
        path = tmp_path / "runs/base/seed0" / name
        saved = json.loads(path.read_text())
        for part, fields in parts.items():
            for field in fields:
                del saved["setting"][part][field]
        path.write_text(json.dumps(saved))
    ablate(corpus, network, recipe, only, tmp_path, seeds=(0,), **SMALL)
    assert [what for what, _ in measured] == ["measured", "timed"]  # neither again
    for changes in (
        dict(network=replace(network, dropout=0.5)),
        dict(recipe=replace(recipe, router_coherence_weight=0.5)),
    ):
        with pytest.raises(ValueError, match=r"(dropout|router_coherence_weight) was 0.0 and is now 0.5"):
            ablate(
                corpus,
                variants=only,
                out_dir=tmp_path,
                seeds=(0,),
                **dict(network=network, recipe=recipe) | changes,
                **SMALL,
            )


def test_a_damaged_result_is_not_taken(corpus, network, recipe, tmp_path, measured, no_training):
    folder = tmp_path / "runs" / "base" / "seed0"
    folder.mkdir(parents=True)
    for text in ("", "{", "[]", "{}", "[" * 10**5, '{"setting": 3}', '{"setting": {"network": []}}', "\udcff", "null"):
        (folder / "result.json").write_text(text, errors="surrogateescape")
        with pytest.raises(ValueError, match=r"result.json is damaged \(.*remove it"):
            ablate(corpus, network, recipe, VARIANTS, tmp_path, seeds=(0,), **SMALL)
    with open(folder / "result.json", "wb") as file:
        file.truncate(2**40)
    with pytest.raises(ValueError, match=r"damaged .it has 1099511627776 bytes"):
        ablate(corpus, network, recipe, VARIANTS, tmp_path, seeds=(0,), **SMALL)


@pytest.fixture
def made(corpus, network, recipe, tmp_path, measured):
    """made(): the ablation of one seed again, all of whose runs are made and timed."""

    def again(**how):
        return ablate(corpus, network, recipe, VARIANTS, tmp_path, seeds=(0,), **SMALL | how)

    again()
    return again


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        ("result.json exits perplexity", "lots", "its exits.perplexity is 'lots'"),
        ("result.json exits perplexity 2", float("nan"), "its exits.perplexity.2 is nan"),
        ("result.json exits perplexity 2", 10**400, "its exits.perplexity.2 is 1000"),
        ("result.json exits perplexity", [], "its lists are not of one length"),
        ("result.json exits", None, "its exits is None"),
        ("result.json union spans 0", True, "its union.spans.0 is True"),
        ("result.json union independent", [1.0], "its lists are not of one length"),
        ("result.json parameters", "x" * 10**5, "its parameters is 'xxx"),
        ("result.json failed", 3, "its failed is 3"),
        ("result.json steps", None, "its steps is None"),
        ("result.json changes", [], "its changes is []"),
        ("result.json seed", 7, "is of another run ('base', seed 7)"),
        ("result.json setting network n_layers", [], "n_layers=[] must be a whole number"),
        ("result.json setting text", [], "is of another text"),
        ("decoding.json decoding 1 speed_up", "fast", "its decoding.1.speed_up is 'fast'"),
        ("decoding.json decoding", {}, "its decoding is {}"),
        ("decoding.json machine versions", {}, "it lacks machine.versions.torch"),
        ("decoding.json machine", None, "its machine is None"),
    ],
)
def test_a_result_with_other_values_than_there_can_be_is_named(made, tmp_path, place, value, words, is_one_sentence):
    name, *way, last = place.split()
    path = tmp_path / "runs" / "base" / "seed0" / name
    contents = inner = json.loads(path.read_text())
    for key in way:
        inner = inner[int(key) if key.isdigit() else key]
    inner[int(last) if last.isdigit() else last] = value
    path.write_text(json.dumps(contents))
    with pytest.raises(ValueError, match=re.escape(words)) as refused:
        made()
    assert str(path) in str(refused.value) and is_one_sentence(str(refused.value))


@pytest.mark.parametrize("name", ["result.json", "decoding.json"])
def test_a_result_cut_off_anywhere_is_named_and_without_it_the_run_is_made_again(made, tmp_path, name):
    path = tmp_path / "runs" / "paper" / "seed0" / name
    whole = path.read_bytes()
    for length in (0, 1, len(whole) // 2, len(whole) - 3):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=f"{name} is damaged .*remove it, and the run is made again"):
            made()
    path.unlink()
    made()
    assert json.loads(path.read_text()).keys() == json.loads(whole).keys()


def test_a_damaged_timing_is_named_before_others_are_timed(made, tmp_path):
    (tmp_path / "runs/base/seed0/decoding.json").unlink()
    path = tmp_path / "runs/other/seed0/decoding.json"
    path.parent.mkdir(parents=True)
    path.write_text('{"machine": {"cpu": "a CPU"}}')
    with pytest.raises(ValueError, match=r"other/seed0/decoding.json is damaged .it lacks machine.device"):
        made()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (dict(variants={"paper": Variant()}), "the variants paper lack 'base'"),
        (dict(variants={"base": Variant(), "long": Variant(recipe={"max_steps": 9})}), "'long' changes max_steps"),
        *(
            (dict(variants={"base": Variant(), name: Variant()}), f"'{name}' must be named as a folder can be")
            for name in ("a/b", "", ".", "..")
        ),
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
        (dict(decoding=DecodingConfig(prompt_length=60, num_prompts=2)), "past max_seq_len=64"),
        (dict(decoding=DecodingConfig(num_prompts=9000)), "separate prompts"),
        (dict(recipe=TrainConfig(max_steps=4, seq_len=5000)), "longer than max_seq_len=64"),
    ],
)
def test_a_mistake_is_found_before_anything_is_trained(
    corpus, network, recipe, tmp_path, no_training, changes, sentence
):
    given = dict(network=network, recipe=recipe, variants=VARIANTS, seeds=(0,)) | SMALL | changes
    with pytest.raises(ValueError, match=sentence):
        ablate(corpus, out_dir=tmp_path, **given)
    assert list(tmp_path.iterdir()) == []


def test_all_are_trained_before_any_is_timed_and_each_as_it_was_trained(corpus, network, recipe, tmp_path, measured):
    ablate(corpus, network, recipe, VARIANTS, tmp_path, seeds=(3, 7), **SMALL)
    sums = [results_in(tmp_path)[name]["exits"]["perplexity"][-1] for name in ORDER]
    assert measured == [*(("measured", of) for of in sums), *(("timed", of) for of in sums)]  # by seed, then variant
    for name in ORDER:
        timed = json.loads((folder_of(tmp_path, name) / "decoding.json").read_text())
        assert f"{timed['variant']} seed{timed['seed']}" == name
        assert timed["machine"] == describe_machine("cpu")
        assert timed["decoding"][0]["tokens_per_second"] == results_in(tmp_path)[name]["exits"]["perplexity"][-1]
    told = json.loads((tmp_path / "ablation.json").read_text())
    assert told["machine"] == describe_machine("cpu") and all(run["decoding"] for run in told["runs"])


def test_without_timing_it_stops_when_all_are_trained(
    corpus, network, recipe, tmp_path, measured, no_training, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr(runs, "train", loop.train)
        path = ablate(corpus, network, recipe, VARIANTS, tmp_path, seeds=(3, 7), timing=False, **SMALL)
    assert "Decoding of 4 runs is not timed yet" in path.read_text()
    told = json.loads((tmp_path / "ablation.json").read_text())
    assert told["machine"] is None and [run["decoding"] for run in told["runs"]] == [None] * 4
    assert not list(tmp_path.rglob("decoding.json"))

    real, left = runs.time_decoding, [1]

    def time_decoding(*args, **options):  # stopped after the first
        if not left:
            raise KeyboardInterrupt
        left.pop()
        return real(*args, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(runs, "time_decoding", time_decoding)
        ablate(corpus, network, recipe, VARIANTS, tmp_path, seeds=(3, 7), **SMALL)
    assert "Decoding of 3 runs is not timed yet" in path.read_text()
    ablate(corpus, network, recipe, VARIANTS, tmp_path, seeds=(3, 7), **SMALL)
    assert [what for what, _ in measured] == ["measured"] * 4 + [
        "timed"
    ] * 4 and "not timed yet" not in path.read_text()


def test_what_is_asked_for_does_not_replace_what_else_there_is(corpus, network, recipe, tmp_path, measured):
    variants = VARIANTS | {"deep": Variant(network={"n_layers": 6, "moe_layers": (1, 2)})}
    ablate(corpus, network, recipe, variants, tmp_path, seeds=(0, 1), timing=False, **SMALL)
    before = json.loads((tmp_path / "ablation.json").read_text())
    count = len(measured)
    ablate(corpus, network, recipe, {"base": Variant()}, tmp_path, seeds=(1,), timing=False, **SMALL)
    after = json.loads((tmp_path / "ablation.json").read_text())
    assert len(measured) == count and [row["variant"] for row in after["summary"]] == ["base", "deep", "paper"]
    rows = {row["variant"]: row for row in after["summary"]}
    assert all(row["mean"] == rows[row["variant"]]["mean"] for row in before["summary"])
    assert after["variants"] == before["variants"] and after["seeds"] == [0, 1]

    # Only what is asked for is trained and timed.
    (tmp_path / "runs/paper/seed0/result.json").unlink()
    path = ablate(corpus, network, recipe, {"base": Variant()}, tmp_path, seeds=(1, 2), **SMALL)
    assert [what for what, _ in measured[count:]] == ["measured", "timed", "timed"]
    assert "Decoding of 4 runs is not timed yet" in path.read_text()

    # Other settings are not mixed with them, though nothing of them is asked for.
    (tmp_path / "runs/base/seed1/result.json").unlink()
    other = replace(network, dropout=0.5)
    with pytest.raises(ValueError, match=r"runs/base/seed0/result.json is of another network \(dropout was 0.0"):
        ablate(corpus, other, recipe, {"base": Variant()}, tmp_path, seeds=(1,), **SMALL)
    path = tmp_path / "runs/deep/seed0/result.json"
    saved = json.loads(path.read_text())
    saved["changes"]["network"]["top_k"] = 99
    path.write_text(json.dumps(saved))
    with pytest.raises(ValueError, match=r"runs/deep/seed0/result.json does not fit here .*top_k=99.* remove it"):
        ablate(corpus, network, recipe, {"base": Variant()}, tmp_path, seeds=(1,), **SMALL)


def test_a_run_that_is_trained_again_is_timed_again(corpus, network, recipe, tmp_path, measured):
    ablate(corpus, network, recipe, VARIANTS, tmp_path, seeds=(0,), **SMALL)
    (tmp_path / "runs/paper/seed0/result.json").unlink()
    path = ablate(corpus, network, recipe, VARIANTS, tmp_path, seeds=(0,), timing=False, **SMALL)
    assert "Decoding of 1 run is not timed yet" in path.read_text()
    assert [path.parts[-3] for path in tmp_path.rglob("decoding.json")] == ["base"]


def test_a_result_of_another_device_is_not_taken(corpus, network, recipe, tmp_path, measured):
    ablate(corpus, network, recipe, {"base": Variant()}, tmp_path, seeds=(0,), timing=False, **SMALL)
    path = tmp_path / "runs/base/seed0/result.json"
    saved = json.loads(path.read_text())
    assert saved["setting"]["device"] == "cpu" and saved["machine"] == describe_machine("cpu")
    path.write_text(json.dumps(saved | {"setting": saved["setting"] | {"device": "cuda"}}))
    with pytest.raises(ValueError, match=r"result.json is of another device; give the same settings again"):
        ablate(corpus, network, recipe, {"base": Variant()}, tmp_path, seeds=(0,), **SMALL)


def test_a_model_that_is_gone_cannot_be_timed(corpus, network, recipe, tmp_path, measured):
    ablate(corpus, network, recipe, VARIANTS, tmp_path, seeds=(0,), timing=False, **SMALL)
    shutil.rmtree(tmp_path / "runs/paper/seed0/model")
    with pytest.raises(ValueError, match=r"model is gone, .* remove result.json beside it"):
        ablate(corpus, network, recipe, VARIANTS, tmp_path, seeds=(0,), **SMALL)
    ablate(corpus, network, recipe, VARIANTS, tmp_path, seeds=(0,), timing=False, **SMALL)


def test_all_are_timed_on_one_machine(corpus, network, recipe, tmp_path, measured, monkeypatch):
    ablate(corpus, network, recipe, {"base": Variant()}, tmp_path, seeds=(0,), **SMALL)
    other = describe_machine("cpu") | {"cpu": "another", "memory_gib": 1.0}
    monkeypatch.setattr(grid, "describe_machine", lambda device: other)
    with pytest.raises(ValueError, match=r"was timed elsewhere \(cpu was .* and is now 'another'\); time all runs"):
        ablate(corpus, network, recipe, VARIANTS, tmp_path, seeds=(0,), **SMALL)
    ablate(corpus, network, recipe, {"base": Variant()}, tmp_path, seeds=(0,), **SMALL)  # nothing is left to time
    ablate(corpus, network, recipe, VARIANTS, tmp_path, seeds=(0,), timing=False, **SMALL)
    assert [what for what, _ in measured] == ["measured", "timed", "measured"]
