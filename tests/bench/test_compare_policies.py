"""Policies beside each other: where the ends are, how far each is between them, and that nothing is left to chance."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from layerskip_moe.analysis.figures.policies import policy_map
from layerskip_moe.bench.contenders import PUBLISHED, contenders
from layerskip_moe.bench.policies import compare_policies
from layerskip_moe.bench.policy_tables import policies_markdown, policies_text
from layerskip_moe.files import plain
from layerskip_moe.generation.cost_model import CostModel
from layerskip_moe.generation.policies import DEL, Fixed, Heuristic


@pytest.fixture(scope="module")
def texts(small_model, invented_text):
    draws = np.random.default_rng(1)
    config = small_model().config
    return [invented_text(config, draws.random((3, 24)) < [[0.6], [0.8], [0.9]], seed) for seed in range(5)]


def compared(small_model, cost_of, texts, policies=None, **how):
    how = {"max_draft_length": 5, "resamples": 300, "progress": False, **how}
    return compare_policies(texts, small_model().config, cost_of(4), policies, **how)


def test_ends_and_what_lies_between(small_model, cost_of, texts):
    report = compared(small_model, cost_of, texts).as_report()
    rows = {row["name"]: row for row in report["rows"]}
    assert list(rows) == ["plain", "best fixed", *PUBLISHED, "oracle of pairs", "oracle of one", "oracle"]
    assert report["prompts"] == 5 and report["tokens"] == 120
    grid = np.array(report["speed_up"])
    assert grid.shape == (3, 6) and grid[:, 0] == pytest.approx(1)
    assert rows["best fixed"]["speed_up"]["value"] == pytest.approx(grid.max())
    layer, length = np.unravel_index(grid.argmax(), grid.shape)
    assert rows["best fixed"]["setting"] == f"exit layer {layer + 1}, {length} drafts"
    for oracle in ("oracle of pairs", "oracle"):
        assert rows["best fixed"]["share_of_way"][oracle] == {"value": 0, "low": 0, "high": 0}
        assert rows[oracle]["share_of_way"][oracle] == {"value": 1, "low": 1, "high": 1}
    speeds = {name: row["tokens_per_second"] for name, row in rows.items()}
    assert all(speeds[name] < speeds["oracle"] for name in PUBLISHED)
    assert speeds["best fixed"] < speeds["oracle of one"] < speeds["oracle"]
    assert speeds["best fixed"] < speeds["oracle of pairs"] <= speeds["oracle"]
    for oracle, share in rows["DEL"]["share_of_way"].items():
        way = (speeds["DEL"] - speeds["best fixed"]) / (speeds[oracle] - speeds["best fixed"])
        assert share["value"] == pytest.approx(way) and share["low"] < way < share["high"]
    faster = rows["DEL"]["faster_than"]["Cascade"]
    assert faster["value"] == pytest.approx(speeds["DEL"] / speeds["Cascade"] - 1)
    assert faster["low"] < faster["value"] < faster["high"]
    assert rows["plain"]["experts_per_token"] == 2 and rows["plain"]["acceptance_rate"] is None
    assert rows["oracle"]["acceptance_rate"] == 1 and rows["oracle"]["experts_per_token"] < 2


def test_int8_drafts_are_compared_where_they_were_recorded(small_model, invented_text, cost_of):
    config, draws = small_model().config, np.random.default_rng(2)
    texts = [invented_text(config, draws.random((3, 24)) < 0.5, seed, int8_drafts=7) for seed in range(4)]
    how = {"max_draft_length": 5, "resamples": 50, "progress": False}
    report = compare_policies(texts, config, cost_of(4), int8_cost=cost_of(4, 0.1), **how).as_report()
    rows, grid = {row["name"]: row for row in report["rows"]}, np.array(report["int8_speed_up"])
    assert report["int8_exit_layers"] == [1, 2, 3, 4] and report["int8_draft_lengths"] == list(range(8))
    assert grid.shape == (4, 8) and grid[:, 0] == pytest.approx(1) and grid.max() > np.max(report["speed_up"])
    layer, length = np.unravel_index(grid.argmax(), grid.shape)
    assert rows["best fixed"]["setting"] == f"exit layer {layer + 1}, {length} drafts, int8"
    assert rows["best fixed"]["speed_up"]["value"] == pytest.approx(grid.max())
    assert rows["best fixed"]["int8_share"] == 1 and rows["Heuristic"]["int8_share"] == 0
    assert rows["Cascade"]["setting"].endswith(", int8") and rows["oracle of one"]["setting"].endswith(", int8")
    assert "100%" in policies_text({"comparisons": [plain(report)]})
    panels = policy_map([report]).axes
    assert [axes.get_title() for axes in panels] == [
        f"Speed-up over plain decoding, greedy{of}" for of in ("", ", int8 drafts")
    ]
    named = [{text.get_text() for text in axes.get_legend().get_texts()} for axes in panels]
    for row in report["rows"]:
        if row["mean_exit_layer"] is not None:
            assert f"{row['name']}, {row['speed_up']['value']:.2f} x" in named[row["int8_share"] > 0.5]
    assert rows["fixed in stages"]["setting"].startswith("exit layer 4, 7 drafts, sure at ")
    assert rows["oracle"]["tokens_per_second"] >= max(row["tokens_per_second"] for row in report["rows"])
    pairs = rows["oracle of pairs"]["tokens_per_second"]
    assert rows["best fixed"]["tokens_per_second"] < pairs < rows["oracle"]["tokens_per_second"]
    with_none = compare_policies(texts, config, cost_of(4), **how).as_report()
    assert with_none["int8_exit_layers"] == with_none["int8_speed_up"] == []


def test_few_int8_drafts_may_be_recorded(small_model, invented_text):
    """The library's own policies draft no more than there are."""
    config = small_model().config
    text = invented_text(config, np.random.default_rng(2).random((3, 24)) < 0.5, int8_drafts=3)
    seconds = (1e-3, 1e-5, 1e-5, 1e-5, 1e-6, 1e-4, 1e-5, 1e-6, 1e-6)
    cost = CostModel(4, (0, 1, 2, 3), 6, 2, seconds)
    how = {"max_draft_length": 3, "resamples": 50, "progress": False}
    report = compare_policies([text], config, cost, int8_cost=replace(cost, int8_drafts=True), **how).as_report()
    rows = {row["name"]: row for row in report["rows"]}
    assert rows["Adaptive"]["int8_share"] == 1 and 0 < rows["Adaptive"]["mean_draft_length"] <= 3
    assert rows["Adaptive by the weights"]["int8_share"] == 0


def test_the_same_numbers_every_time(small_model, cost_of, texts):
    one, other = (compared(small_model, cost_of, texts).as_report() for _ in range(2))
    assert one == other
    assert compared(small_model, cost_of, texts, seed=1).as_report() != one


def test_intervals_are_of_prompts_drawn_anew(small_model, cost_of, texts):
    """Of one prompt there is no other draw."""
    rows = compared(small_model, cost_of, texts[:1]).as_report()["rows"]
    assert all(row["speed_up"]["low"] == row["speed_up"]["value"] == row["speed_up"]["high"] for row in rows)


def test_a_policy_is_new_and_goes_on_learning(small_model, cost_of, texts):
    made = []

    def make():
        made.append(Heuristic(2, length=3))
        return made[-1]

    compared(small_model, cost_of, texts, {"mine": [make]})
    assert len(made) == 1
    # One that meets each text by itself has other rounds, unless it forgets between them.
    runs = compared(small_model, cost_of, texts, {"DEL": [DEL]}).runs
    alone = [compared(small_model, cost_of, [text], {"DEL": [DEL]}).runs[2].rounds[0] for text in texts]
    assert runs[2].rounds[0] == alone[0] and runs[2].rounds != alone


def test_of_several_settings_the_fastest_is_told(small_model, cost_of, texts):
    pairs = {n: compared(small_model, cost_of, texts, {"x": [partial(Fixed, n, 2)]}).runs[2] for n in (1, 2, 3)}
    best = min(pairs, key=lambda n: sum(pairs[n].seconds))
    run = compared(small_model, cost_of, texts, {"x": [partial(Fixed, n, 2) for n in pairs]}).runs[2]
    assert run.setting == f"exit layer {best}" and run.seconds == pairs[best].seconds


def test_every_contender_can_be_made_for_any_model_with_an_exit():
    assert [len(makers) for makers in contenders(2, None).values()] == [1, 1, 1, 1]
    assert [len(makers) for makers in contenders(12, None).values()] == [11, 11, 1, 11]
    assert set(PUBLISHED) <= set(contenders(2, None))


def test_what_cannot_be_compared(small_model, cost_of, texts):
    with pytest.raises(ValueError, match="these are 0 texts of temperatures \\[\\], 0 of them continued"):
        compared(small_model, cost_of, [])
    with pytest.raises(ValueError, match="max_draft_length=0 must be 1 or more"):
        compared(small_model, cost_of, texts, max_draft_length=0)
    with pytest.raises(ValueError, match="a model of one layer has none that could draft"):
        compare_policies(texts, small_model(n_layers=1).config, cost_of(1), progress=False)


def test_tables_and_picture(small_model, cost_of, texts):
    report = plain(compared(small_model, cost_of, texts).as_report())
    result = {"command": "layerskip-moe bench policies", "comparisons": [report], "figures": {"policies": "p.png"}}
    told = policies_text(result)
    assert "greedy: 5 prompts, 120 new tokens" in told
    assert told.count("\nHeuristic") == 2, "its row, and how much faster than the others it is"
    markdown = policies_markdown(result)
    assert "| policy | tokens/s | speed-up |" in markdown and "](p.png)" in markdown
    assert "| accepted | drafts the full model agreed with, of all that were verified |" in markdown
    [axes] = policy_map([report]).axes
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    drafting = [row for row in report["rows"] if row["name"] != "plain"]
    assert labels[-len(drafting) :] == [f"{row['name']}, {row['speed_up']['value']:.2f} x" for row in drafting]
    places = [(float(line.get_xdata()[0]), float(line.get_ydata()[0])) for line in axes.lines]
    assert places == [(row["mean_exit_layer"], row["mean_draft_length"]) for row in drafting]


def test_maps_that_cannot_be_drawn(small_model, cost_of, texts):
    with pytest.raises(ValueError, match="There is no comparison to draw"):
        policy_map([])
    report = compared(small_model, cost_of, texts).as_report()
    with pytest.raises(ValueError, match="it takes two exit layers"):
        policy_map([{**report, "exit_layers": [1]}])
