"""The newer pictures show the data they are given: read back from what matplotlib holds."""

import math

import numpy as np
import pytest

from layerskip_moe.analysis import figures

SETTING = {"temperature": 0.8, "top_p": None, "prompts": 4}


def _lines(axes):
    """Label -> y values of a panel's curves, nan for gaps."""
    return {line.get_label(): np.asarray(line.get_ydata()).tolist() for line in axes.lines}


def _texts(axes):
    return [text.get_text() for text in axes.texts]


def _mesh(axes):
    (mesh,) = axes.collections
    return mesh.get_array()


def _ticks(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


def test_speed_up_contour_writes_each_point_and_marks_the_chosen_one_and_one(full_report):
    sweep = full_report["sweep"]
    figure = figures.speed_up_contour(sweep)
    axes = figure.axes[0]
    written = {text.get_position(): text.get_text() for text in axes.texts}
    assert written == {
        (exit_layer, draft): f"{sweep['speed_up'][i][j]:.2f}"
        for i, exit_layer in enumerate(sweep["exit_layers"])
        for j, draft in enumerate(sweep["draft_lengths"])
    }
    assert [text.get_position() for text in axes.texts if text.get_weight() == "bold"] == [(2, 4)]
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["as fast as plain decoding", "chosen"]
    filled, line = axes.collections
    assert line.levels.tolist() == [1.0]
    assert filled.levels[0] < 0.973 and filled.levels[-1] > 1.231


def test_speed_up_contour_has_no_line_for_one_where_all_are_faster():
    figure = figures.speed_up_contour(
        {**SETTING, "exit_layers": [2, 4], "draft_lengths": [3, 6], "speed_up": [[2, 1.5], [1.2, 1.1]]}
    )
    assert len(figure.axes[0].collections) == 1 and not figure.legends


def test_speed_up_contour_of_one_exit_layer_is_a_heat_map_with_gaps():
    axes = figures.speed_up_contour(
        {**SETTING, "exit_layers": [2], "draft_lengths": [3, 4, 8], "speed_up": [[1.25, None, 0.75]]}
    ).axes[0]
    assert _mesh(axes).tolist() == [[1.25], [None], [0.75]]
    assert _texts(axes) == ["1.25", "0.75"]


def _drafting(exit_layer, drafted, accepted, name="draft"):
    return {"name": name, "exit_layer": exit_layer, "drafted_by_position": drafted, "accepted_by_position": accepted}


def test_acceptance_by_position_conditional_and_of_all_drafts():
    rows = [_drafting(None, [], [], "plain"), _drafting(2, [100, 90, 80], [80, 60, 30])]
    left, right = figures.acceptance_by_position([{"temperature": 0, "strategies": rows}]).axes
    assert _lines(left) == {"exit layer 2, greedy": pytest.approx([80, 75, 50])}
    assert _lines(right) == {"exit layer 2, greedy": pytest.approx([80, 100 * 60 / 90, 37.5])}
    assert left.lines[0].get_xdata().tolist() == [1, 2, 3]


def test_acceptance_by_position_counts_draft_lengths_of_one_exit_together():
    # Every draft is kept with probability 0.5, so the pooled conditional rate is 50% everywhere.
    rows = [_drafting(2, [64], [32]), _drafting(2, [64, 64, 64], [32, 16, 8]), _drafting(None, [8, 0], [4, 0], "small")]
    left, right = figures.acceptance_by_position([{"temperature": 0, "strategies": rows}]).axes
    assert _lines(left)["exit layer 2, greedy"] == [50, 50, 50]
    assert _lines(right)["exit layer 2, greedy"] == [50, 25, 12.5]
    small = _lines(left)["small, greedy"]
    assert small[0] == 50 and math.isnan(small[1])


def test_acceptance_by_position_tells_decodings_apart_by_line_style(full_report):
    figure = figures.acceptance_by_position(full_report["decoding"])
    styles = {line.get_label(): line.get_linestyle() for line in figure.axes[0].lines}
    assert styles["exit layer 1, greedy"] == styles["exit layer 2, greedy"] == "-"
    assert styles["exit layer 1, temperature 0.8"] == "--"


def test_quality_puts_each_strategy_at_its_perplexity_and_speed(full_report):
    rows = full_report["strategies"][0]["strategies"]
    figure = figures.quality(full_report["strategies"])
    (axes,) = figure.axes
    drawn = [(line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines]
    assert drawn == [(row["perplexity"], row["tokens_per_second"]) for row in rows]
    assert [line.get_marker() for line in axes.lines] == ["o", "o", "^", "^"]  # the last two wrote other text
    assert sorted(_texts(axes)) == [
        "△ every 2nd (31% of 4-grams distinct)",
        "△ layers 1-2 (87% of 4-grams distinct)",
        "● exit 2, draft 4 (87% of 4-grams distinct)",
        "● plain (87% of 4-grams distinct)",
    ]
    places = {text.xy: text.xyann[1] for text in axes.texts}
    by_speed = [places[point] for point in sorted(places, key=lambda point: point[1])]
    assert by_speed == sorted(by_speed) and by_speed[0] >= 0 and by_speed[-1] <= 1


def test_quality_says_which_strategies_have_no_perplexity(full_report):
    full_report["strategies"][0]["strategies"][2]["perplexity"] = None
    (axes,) = figures.quality(full_report["strategies"]).axes
    assert len(axes.lines) == 3 and "(not scored: layers 1-2)" in axes.get_xlabel()


def test_early_exit_tradeoff_places_both_kinds_at_their_thresholds(full_report):
    section = full_report["early_exit"]
    layers, speed, agreement, perplexity = figures.early_exit_tradeoff(section).axes
    held = section["held_out"]
    assert _lines(layers) == {"held-out text": held["mean_layers"], "decoding": [1.92, 2.71]}
    assert [line.get_xdata().tolist() for line in layers.lines] == [[0, 1, 2], [0, 1]]
    _, *rows = section["decoding"]["strategies"]
    assert _lines(speed)["decoding"] == [row["speed_up"] for row in rows]
    assert _lines(speed)["full model (plain decoding)"] == [1.0, 1.0]
    whiskers = [collection.get_segments()[0][:, 1].tolist() for collection in speed.collections]
    assert whiskers == [list(row["speed_up_quartiles"]) for row in rows]
    assert _lines(agreement)["held-out text"] == pytest.approx([84.2, 97.3, 100])
    assert _lines(perplexity) == {"held-out text": held["perplexity"]}
    *_, with_all = figures.early_exit_tradeoff(section, full=7.5).axes
    assert _lines(with_all)["full model (plain decoding)"] == [7.5, 7.5]
    assert _ticks(perplexity.xaxis) == ["0.5", "0.9", "1"]


def test_sampled_text_tells_nothing_of_agreement(full_report):
    full_report["early_exit"]["decoding"]["temperature"] = 0.8
    _, _, agreement, _ = figures.early_exit_tradeoff(full_report["early_exit"]).axes
    assert list(_lines(agreement)) == ["held-out text"]


def test_early_exit_tradeoff_of_held_out_text_alone(full_report):
    del full_report["early_exit"]["decoding"]
    layers, speed, *_ = figures.early_exit_tradeoff(full_report["early_exit"]).axes
    assert list(_lines(layers)) == ["held-out text"]
    assert not speed.lines and _texts(speed) == ["not measured"]


def test_confidence_by_layer_leaves_a_gap_where_there_is_none(full_report):
    axes = figures.confidence_by_layer(full_report["early_exit"]["held_out"]).axes[0]
    mean = _lines(axes)["mean"]
    assert mean[:2] == [0.412, 0.538] and math.isnan(mean[2])
    whiskers = axes.collections[1].get_segments()
    assert whiskers[0].tolist() == [[1, 0.121], [1, 0.634]]


def test_confidence_by_layer_fills_its_axes_and_shows_the_thresholds_in_reach():
    quartiles = {"confidence_mean": [0.08, 0.09], "confidence_low": [0.01, 0.01], "confidence_high": [0.1, 0.106]}
    axes = figures.confidence_by_layer({"thresholds": [0.05, 0.1, 0.5], **quartiles}).axes[0]
    low, high = axes.get_ylim()
    assert low == 0 and 0.106 < high < 0.13
    assert [line.get_ydata()[0] for line in axes.lines[1:]] == [0.05, 0.1]
    assert _texts(axes) == ["threshold 0.05", "threshold 0.1"]


def test_exit_shares_are_per_row(full_report):
    held_out = full_report["early_exit"]["held_out"]
    axes = figures.exit_histogram(held_out).axes[0]
    shares = axes.images[0].get_array()
    assert shares.sum(axis=1).tolist() == pytest.approx([100] * 3)
    assert shares[0].tolist() == pytest.approx([100 * n / 32768 for n in held_out["exits"][0]])
    assert _ticks(axes.yaxis) == ["0.5", "0.9", "1"] and _ticks(axes.xaxis) == ["1", "2", "3"]

    axes = figures.exits_by_prompt(full_report["early_exit"]["by_prompt"]).axes[0]
    assert axes.images[0].get_array()[1].tolist() == pytest.approx([100 * n / 128 for n in (11, 22, 95)])
    assert _ticks(axes.yaxis) == ["1", "2"] and "0.9" in axes.get_title()


def test_a_share_that_rounds_to_nothing_is_not_written_as_nothing():
    axes = figures.exit_histogram({"thresholds": [0.5], "exits": [[0, 4, 6, 990]]}).axes[0]
    assert _texts(axes) == ["0", "<1", "1", "99"]


def test_a_prompt_without_new_tokens_is_an_empty_row():
    axes = figures.exits_by_prompt({"threshold": 0.5, "exits": [[0, 0], [1, 3]]}).axes[0]
    assert axes.images[0].get_array().tolist() == [[None, None], [25, 75]]
    assert _texts(axes) == ["25", "75"]


def test_the_last_of_many_layers_is_named():
    axes = figures.exits_by_prompt({"threshold": 0.5, "exits": [[1] * 64] * 60}).axes[0]
    across, down = _ticks(axes.xaxis), _ticks(axes.yaxis)
    assert across[-1] == "64" and 8 <= len(across) <= 16
    assert down[-1] == "60" and 12 <= len(down) <= 24
    assert _texts(axes) == []  # no room


def test_layer_dropout_schedule_over_depth_and_time():
    rates = [[0.0, 0.0], [0.0, 0.05], [0.0, 0.1]]
    left, right, _ = figures.layer_dropout_schedule(rates, [0, 10, 40]).axes
    assert _mesh(left).tolist() == [[0, 0, 0], [0, 5, 10]]  # layers x steps
    assert left.collections[0].get_coordinates()[0, :, 0].tolist() == [-5, 5, 25, 55]
    assert _lines(right) == {"step 0": [0, 0], "step 10": [0, 5], "step 40": [0, 10]}


def test_exit_curriculum_shows_weights_of_supervised_exits_only():
    active = [[True, False, True], [False, True, True]]
    weights = [[0.25, 0.0, 0.75], [0.0, 0.5, 0.5]]
    axes = figures.exit_curriculum(active, weights, [4, 5]).axes[0]
    assert np.ma.filled(_mesh(axes), -1).tolist() == [[25, -1], [-1, 50], [75, 50]]
    weights[1] = [0.0, 0.0, 1.0]  # active, and of no weight
    axes = figures.exit_curriculum(active, weights, [4, 5]).axes[0]
    assert np.ma.filled(_mesh(axes), -1).tolist() == [[25, -1], [-1, -1], [75, 100]]
    axes = figures.exit_curriculum(active).axes[0]
    assert np.ma.filled(_mesh(axes), -1).tolist() == [[1, -1], [-1, 1], [1, 1]]
    assert axes.get_xlim() == (-0.5, 1.5)


def test_balance_over_training_is_that_of_each_records_load(train_records):
    train_records[2]["load"]["2"] = [0, 0, 0, 0]
    validation = {"split": "validation", "step": 24, "perplexity": [4.0]}
    max_violation, entropy, dead = figures.balance_over_training([*train_records, validation]).axes
    assert _lines(max_violation)["layer 1"] == pytest.approx([0.3, 0.6, 0.0])
    assert _lines(entropy)["layer 1"][2] == pytest.approx(1.0)
    assert _lines(dead)["layer 1"] == [0, 0, 0]
    assert max_violation.lines[0].get_xdata().tolist() == [9, 19, 24]
    idle = _lines(max_violation)["layer 2"]
    assert idle[:2] == [0, 0] and math.isnan(idle[2])


def test_balance_legend_of_many_layers_names_both_ends():
    record = {"split": "train", "step": 3, "load": {str(layer): [1, 2] for layer in range(32)}}
    figure = figures.balance_over_training([record])
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(figure.axes[0].lines) == 32
    assert len(names) == 8 and names[0] == "layer 0" and names[-1] == "layer 31"


def test_expert_tokens_stand_beside_chance(full_report):
    axes = figures.expert_tokens(full_report["expert_choice"]).axes[0]
    by_token, chance = ([bar.get_height() for bar in container] for container in axes.containers)
    assert by_token == pytest.approx([71.3, 56.1]) and chance == pytest.approx([54.2, 58.3])
    assert _ticks(axes.xaxis) == ["1", "2"]


def test_step_parts_are_stacked_over_the_steps_they_are_means_of(train_records):
    del train_records[1]["seconds"]
    figure = figures.step_parts(train_records)
    axes = figure.axes[0]
    values, borders, baseline = axes.patches[2].get_data()  # backward, on batches and forward
    assert borders.tolist() == [0, 10, 20, 25]
    assert baseline[[0, 2]].tolist() == pytest.approx([0.301, 0.101])
    assert values[[0, 2]].tolist() == pytest.approx([0.901, 0.301]) and math.isnan(values[1])
    # 10 steps of 0.3 s and 5 of 0.1 s forward, twice that backward, 0.001 s of batches in each.
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["backward (67%)", "forward (33%)", "batches (0%)"]


def test_comparison_draws_both_runs_in_each_panel(full_report):
    section = full_report["comparison"]
    perplexity, balance, speed = figures.comparison(section).axes
    assert _lines(perplexity) == {run["name"]: run["perplexity"] for run in section["runs"]}
    assert [line.get_ydata().tolist() for line in balance.lines] == [[0.3, 1.0], [0.4, 0.7]]
    (plain,) = speed.lines
    assert set(plain.get_ydata()) == {1.0}
    # A bar for each run and way of decoding, its fastest setting written on it.
    fastest = [
        max((row for row in entry["strategies"] if row["exit_layer"]), key=lambda row: row["speed_up"])
        for run in section["runs"]
        for entry in run["decoding"]
    ]
    assert [bar.get_height() for bar in speed.patches] == [row["speed_up"] for row in fastest]
    assert _texts(speed) == [f"exit {row['exit_layer']}\ndraft {row['draft_length']}" for row in fastest]
    whiskers = [collection.get_segments()[0][:, 1].tolist() for collection in speed.collections]
    assert whiskers == [list(row["speed_up_quartiles"]) for row in fastest]


def test_comparison_leaves_out_panels_without_values(full_report):
    for run in full_report["comparison"]["runs"]:
        run.update(experts={}, decoding=[])
    (axes,) = figures.comparison(full_report["comparison"]).axes
    assert "perplexity" in axes.get_title()
