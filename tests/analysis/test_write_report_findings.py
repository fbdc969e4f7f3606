"""What a report computes beside what was measured: the recipe's schedule, training's means, balance over training."""

import json

import pytest

from layerskip_moe.analysis import findings, write_report
from layerskip_moe.analysis.recipe_schedule import recipe_schedule
from layerskip_moe.training.balance import balance_metrics
from layerskip_moe.training.exit_loss import active_exits, exit_weights
from layerskip_moe.training.layer_dropout import layer_dropout_rates


def _recipe(steps, n_layers=5, **changed):
    config = dict(
        layer_dropout_max=0.2, layer_dropout_depth="linear", layer_dropout_time="exp", layer_dropout_part="block",
        exit_weights="paper", exit_loss_scale=0.5, exit_curriculum="rotational", exit_rotation=3,
    )  # fmt: skip
    return {"steps": steps, "n_layers": n_layers, "train_config": config | changed}


@pytest.mark.parametrize("curriculum", ["rotational", "gradual", "all", "none"])
@pytest.mark.parametrize("steps", [1, 7, 1000])
def test_the_schedule_is_what_training_computes(curriculum, steps):
    schedule = recipe_schedule(_recipe(steps, exit_curriculum=curriculum))
    for step, rates in zip(schedule.dropout_steps, schedule.rates, strict=True):
        assert rates == layer_dropout_rates(step, steps, 5, p_max=0.2, depth="linear", time="exp").tolist()
    shown = zip(schedule.curriculum_steps, schedule.active, schedule.weights, strict=True)
    for step, active, weights in shown:
        expected = active_exits(step, steps, 5, curriculum=curriculum, rotation=3)
        assert active == expected.tolist()
        assert weights == exit_weights(expected, kind="paper", scale=0.5).tolist()


@pytest.mark.parametrize("steps", [1, 2, 7, 199, 200, 201, 1000])
def test_steps_shown_span_the_run_in_order(steps):
    schedule = recipe_schedule(_recipe(steps, exit_curriculum="gradual"))
    for shown in (schedule.dropout_steps, schedule.curriculum_steps):
        assert shown == sorted(set(shown)) and (shown[0], shown[-1]) == (0, steps - 1)
        assert len(shown) == min(steps, 200)


@pytest.mark.parametrize(("steps", "rotation", "shown"), [(1000, 3, 12), (5, 3, 5), (1000, 100, 400)])
def test_a_rotation_is_shown_step_by_step(steps, rotation, shown):
    """Evenly spaced, 1000 steps at every 5th would show a rotation of 5 as standing still."""
    schedule = recipe_schedule(_recipe(steps, exit_rotation=rotation))
    assert schedule.curriculum_steps == list(range(shown))


def test_recipe_json_is_read_where_no_recipe_is_given(written, full_report, tmp_path):
    given, beside = full_report["recipe"], _recipe(50)
    (tmp_path / "recipe.json").write_text(json.dumps(beside))
    assert written({})[1]["recipe"] == beside
    assert written({"recipe": given})[1]["recipe"] == given
    assert "first 12 of 50 steps" in written({})[0]


@pytest.mark.parametrize("content", ['{"steps": ', "[1]", '{"steps": 3, "sugar": 100}'])
def test_a_damaged_recipe_is_refused_in_a_sentence(tmp_path, content):
    (tmp_path / "recipe.json").write_text(content)
    with pytest.raises(ValueError, match="not the JSON that training writes"):
        write_report(tmp_path, {})
    assert not (tmp_path / "report.json").exists()


def test_seconds_by_part_weigh_each_record_by_its_steps(train_records):
    means = findings.mean_seconds_by_part(train_records)
    assert means["forward"] == pytest.approx((10 * 0.3 + 10 * 0.2 + 5 * 0.1) / 25)
    assert means["batches"] == pytest.approx(0.001) and list(means) == ["batches", "forward", "backward"]
    train_records[1].pop("seconds")  # of an older version, say
    assert findings.mean_seconds_by_part(train_records)["forward"] == pytest.approx((10 * 0.3 + 5 * 0.1) / 15)
    assert findings.mean_seconds_by_part([{"step": 9}]) is None


def test_seconds_by_part_come_from_metrics_where_none_are_given(written, full_report, train_records, tmp_path):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in train_records))
    given = full_report["training"]
    assert written({"training": given})[1]["training"] == given
    alone = written({})[1]["training"]
    text, held = written({"training": {**given, "seconds_by_part": None}})
    assert alone == {"seconds_by_part": held["training"]["seconds_by_part"]}
    assert held["training"]["seconds_by_part"] == findings.mean_seconds_by_part(train_records)
    assert "the largest part into `backward`" in text and "| forward | 220.0 |" in text


@pytest.mark.parametrize(("count", "said"), [(1, "1 step was skipped"), (2, "2 steps were skipped"), (0, None)])
def test_skipped_steps_are_told_whatever_else_is_known(written, full_report, train_records, tmp_path, count, said):
    skipped = [{"split": "skipped", "step": n, "loss": None, "gradient_norm": 1.0} for n in range(count)]
    for others, given in (([], {}), (train_records, {}), (train_records, {"training": full_report["training"]})):
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in [*skipped, *others]))
        text, held = written(given)
        assert (held.get("training") or {}).get("skipped_steps", 0) == count
        assert f"{said}, loss or gradient not being finite" in text if count else "skipped, loss" not in text


def test_balance_over_training_compares_the_ends(written, train_records, tmp_path):
    import torch

    found = findings.balance_over_training(train_records)
    first = balance_metrics(torch.tensor([9, 11, 13, 7]))
    assert found["steps"] == [10, 25]
    assert found["max_violation"] == pytest.approx([first["max_violation"] / 2, 0.0])
    assert found["normalized_entropy"] == pytest.approx([(first["normalized_entropy"] + 1) / 2, 1.0])
    for records, said in (
        (train_records, "By MaxVio, the load became more even"),
        (train_records[:2], "became **less** even"),
    ):
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        assert said in written({})[0]


def test_measures_of_balance_that_disagree_over_training_are_said_to(written, train_records, tmp_path):
    train_records[0]["load"]["1"], train_records[-1]["load"]["1"] = [16, 8, 8, 8], [15, 15, 10, 0]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in train_records))
    text, held = written({})
    found = held["findings"]["balance_over_training"]
    assert found["max_violation"] == pytest.approx([0.3, 0.25]) and found["dead_experts"] == [0.0, 0.125]
    assert "more even during training (by entropy" in text


def test_balance_over_training_needs_two_loads_with_choices(train_records):
    assert findings.balance_over_training(train_records[:1]) is None
    train_records[-1]["load"] = {"1": [0, 0, 0, 0], "2": [0, 0, 0, 0]}
    assert findings.balance_over_training(train_records) is None
    train_records[-1]["load"] = {"1": [0, 0, 0, 0], "2": [5, 5, 5, 5]}  # a layer that dropped every sample
    assert findings.balance_over_training(train_records)["max_violation"][1] == 0.0


def test_the_threshold_named_agrees_and_saves_layers():
    held_out = {
        "thresholds": [0.2, 0.6, 0.8, 1.0], "mean_layers": [1.1, 2.0, 2.5, 3.0], "agreement": [0.5, 0.95, 0.99, 1.0],
        "exits": [[1, 1, 1]] * 4,
    }  # fmt: skip
    assert findings.best_threshold(held_out)["threshold"] == 0.6
    held_out["agreement"] = [0.5, 0.6, 0.7, 1.0]
    found = findings.best_threshold(held_out)
    assert found["threshold"] is None and found["mean_layers"] is None
