"""Every picture, whatever it shows: not blank, nothing on top of anything else, and no crash on little data."""

import json
import math
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerskip_moe.analysis import figures
from layerskip_moe.analysis.figures.drawing import new_panels, scale_for_ratios

ROW = {
    "name": "plain", "exit_layer": None, "draft_length": None, "tokens_per_second": 70.0, "speed_up": 1.0,
    "speed_up_quartiles": [1.0, 1.0], "acceptance_rate": None, "identical": 1, "perplexity": 3.0, "agreement": None,
}  # fmt: skip
DRAFTED = {
    **ROW, "exit_layer": 1, "draft_length": 1, "drafted_by_position": [4], "accepted_by_position": [0],
    "perplexity": None,
}  # fmt: skip
SETTING = {"temperature": 0, "top_p": None, "prompts": 1}
ONE = {**SETTING, "strategies": [ROW, DRAFTED]}
HELD_OUT = {
    "thresholds": [0.9], "mean_layers": [1.0], "perplexity": [None], "agreement": [1.0], "exits": [[5]],
    "confidence_mean": [0.5], "confidence_low": [0.2], "confidence_high": [0.6],
}  # fmt: skip
RECORD = {"split": "train", "step": 0, "exit_losses": {"1": 3.0}, "load": {"0": [4]}, "seconds": {"forward": 0.1}}
RUN = {"name": "a run", "perplexity": [None], "experts": {"0": {"max_violation": None}}, "decoding": [ONE]}
VARIANTS = [
    {
        "variant": name,
        "mean": {
            "perplexity": 40.0 + place, "tokens_per_second_0": 500.0 + 12 * place,
            "tokens_per_second_0.8": 450.0 + 10 * place, "plain_tokens_per_second_0": 480.0,
            "plain_tokens_per_second_0.8": 470.0, "union_2": 1.6,
            "union_4": 2.4 - place / 50, "union_8": 3.1 - place / 40,
        },
    }
    for place, name in enumerate(["base", *(f"changed-{n}+and-again" for n in range(18))])
]  # fmt: skip

# The figure of a full report (with its train records), and the same of a single entry, or of gaps alone.
WHOLE = {
    "loss": lambda report, train: figures.loss_curves(train, [{"step": 24, "perplexity": [9.0, 8.0, 7.0]}]),
    "perplexity_by_exit": lambda report, _: figures.perplexity_by_exit(
        report["exits"]["perplexity"], report["exits"]["agreement"]
    ),
    "expert_load": lambda report, _: figures.expert_heat_map(report["experts"]["load"]),
    "speed_up_contour": lambda report, _: figures.speed_up_contour(report["sweep"]),
    "acceptance_by_position": lambda report, _: figures.acceptance_by_position(report["decoding"]),
    "early_exit": lambda report, _: figures.early_exit_tradeoff(report["early_exit"]),
    "confidence_by_layer": lambda report, _: figures.confidence_by_layer(report["early_exit"]["held_out"]),
    "exit_histogram": lambda report, _: figures.exit_histogram(report["early_exit"]["held_out"]),
    "exits_by_prompt": lambda report, _: figures.exits_by_prompt(report["early_exit"]["by_prompt"]),
    "layer_dropout": lambda *_: figures.layer_dropout_schedule([[0.0, 0.0], [0.0, 0.1]], [0, 9]),
    "exit_curriculum": lambda *_: figures.exit_curriculum([[True, True], [False, True]], [[0.3, 0.7], [0, 1]], [0, 1]),
    "exit_curriculum on and off": lambda *_: figures.exit_curriculum([[True, True], [False, True]]),
    "balance_over_training": lambda _, train: figures.balance_over_training(train),
    "expert_tokens": lambda report, _: figures.expert_tokens(report["expert_choice"]),
    "step_parts": lambda _, train: figures.step_parts(train),
    "quality": lambda report, _: figures.quality(report["strategies"] * 2),
    "comparison": lambda report, _: figures.comparison(report["comparison"]),
    "ablation_tradeoff": lambda *_: figures.ablation_tradeoff(VARIANTS, tolerated=0.02),
    "ablation_unions": lambda *_: figures.ablation_unions(VARIANTS, {2: 1.75, 4: 2.73, 8: 3.6}),
}
LITTLE = {
    "loss": lambda: figures.loss_curves([RECORD]),
    "speed_up_contour": lambda: figures.speed_up_contour(
        {**SETTING, "exit_layers": [2], "draft_lengths": [4], "speed_up": [[1.5]]}
    ),
    "speed_up_contour with gaps": lambda: figures.speed_up_contour(
        {**SETTING, "exit_layers": [2, 3], "draft_lengths": [4, 6], "speed_up": [[None, 1.5], [None, None]]}
    ),
    "speed_up_contour of equals": lambda: figures.speed_up_contour(
        {**SETTING, "exit_layers": [2, 3], "draft_lengths": [4, 6], "speed_up": [[1.0, 1.0], [1.0, 1.0]]}
    ),
    "acceptance_by_position": lambda: figures.acceptance_by_position([ONE]),
    "early_exit": lambda: figures.early_exit_tradeoff({"held_out": HELD_OUT}),
    "early_exit decoded": lambda: figures.early_exit_tradeoff(
        {"decoding": {"strategies": [ROW, {**ROW, "threshold": 0.5}]}}
    ),
    "confidence_by_layer": lambda: figures.confidence_by_layer(HELD_OUT),
    "exit_histogram": lambda: figures.exit_histogram(HELD_OUT),
    "exits_by_prompt": lambda: figures.exits_by_prompt({"threshold": 1.0, "exits": [[0, 0]]}),
    "layer_dropout": lambda: figures.layer_dropout_schedule([[0.0]], [0]),
    "exit_curriculum": lambda: figures.exit_curriculum([[True]], [[1.0]], [0]),
    "balance_over_training": lambda: figures.balance_over_training([RECORD]),
    "expert_tokens": lambda: figures.expert_tokens({"layers": {"0": {"token_dependence": None, "chance": 1.0}}}),
    "step_parts": lambda: figures.step_parts([RECORD]),
    "quality": lambda: figures.quality([ONE]),
    "comparison": lambda: figures.comparison({"steps": 1, "runs": [RUN]}),
    "ablation_tradeoff": lambda: figures.ablation_tradeoff(VARIANTS[:1], tolerated=0.02),
    "ablation_tradeoff with gaps": lambda: figures.ablation_tradeoff(
        [VARIANTS[0], {"variant": "untimed", "mean": {"perplexity": 20.0, "tokens_per_second_0": None}}], tolerated=0.02
    ),
    "ablation_unions": lambda: figures.ablation_unions([*VARIANTS[:1], {"variant": "dense", "mean": {}}], {2: 1.75}),
}
EMPTY = {
    "speed_up_contour": lambda: figures.speed_up_contour(
        {"exit_layers": [2], "draft_lengths": [4], "speed_up": [[None]]}
    ),
    "speed_up_contour, no exits": lambda: figures.speed_up_contour(
        {"exit_layers": [], "draft_lengths": [4], "speed_up": []}
    ),
    "acceptance_by_position": lambda: figures.acceptance_by_position([{**ONE, "strategies": [ROW]}]),
    "early_exit": lambda: figures.early_exit_tradeoff({"decoding": None}),
    "confidence_by_layer": lambda: figures.confidence_by_layer({**HELD_OUT, "confidence_mean": [None]}),
    "exit_histogram": lambda: figures.exit_histogram({"thresholds": [], "exits": []}),
    "exits_by_prompt": lambda: figures.exits_by_prompt({"threshold": 0.9, "exits": []}),
    "layer_dropout": lambda: figures.layer_dropout_schedule([], []),
    "layer_dropout, steps of another run": lambda: figures.layer_dropout_schedule([[0.1]], [0, 1]),
    "exit_curriculum": lambda: figures.exit_curriculum([]),
    "exit_curriculum, fewer weights": lambda: figures.exit_curriculum([[True], [True]], [[1.0]]),
    "balance_over_training": lambda: figures.balance_over_training([{**RECORD, "load": {}}]),
    "expert_tokens": lambda: figures.expert_tokens({"layers": {}}),
    "step_parts": lambda: figures.step_parts([{**RECORD, "seconds": None}]),
    "quality": lambda: figures.quality([{**ONE, "strategies": [DRAFTED]}]),
    "comparison": lambda: figures.comparison({"steps": 1, "runs": []}),
    "ablation_tradeoff": lambda: figures.ablation_tradeoff([{"variant": "base", "mean": {}}], tolerated=0.02),
    "ablation_unions": lambda: figures.ablation_unions([{"variant": "base", "mean": {}}], {2: 1.75}),
}


def _pixels(figure):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[::-1, :, :3].astype(float)  # row 0 at the bottom, as in bounding boxes


def _is_blank(pixels, axes):
    """Whether all is of one colour within the axes' lines."""
    box = axes.get_window_extent().padded(-3)
    return np.ptp(pixels[math.ceil(box.y0) : math.floor(box.y1), math.ceil(box.x0) : math.floor(box.x1)]) == 0


@pytest.mark.parametrize("name", WHOLE)
def test_no_panel_is_blank_and_nothing_covers_anything(name, full_report, train_records):
    # As text and back, so that keys are what a report's JSON makes them.
    figure = WHOLE[name](json.loads(json.dumps(full_report)), train_records)
    pixels = _pixels(figure)
    assert not any(_is_blank(pixels, axes) for axes in figure.axes)
    assert not any(axes.get_legend() for axes in figure.axes)

    # Panels with their titles, labels and ticks, and the legend: each has its own place on the page.
    boxes = [axes.get_tightbbox() for axes in figure.axes] + [legend.get_window_extent() for legend in figure.legends]
    for i, box in enumerate(boxes):
        assert box.x0 > -1 and box.y0 > -1 and box.x1 < pixels.shape[1] + 1 and box.y1 < pixels.shape[0] + 1
        assert not any(box.padded(-1).overlaps(other) for other in boxes[:i])


@pytest.mark.parametrize("name", WHOLE)
def test_axes_have_names_and_enough_numbers(name, full_report, train_records):
    figure = WHOLE[name](json.loads(json.dumps(full_report)), train_records)
    _pixels(figure)
    bars = [axes for axes in figure.axes if axes.get_label() == "<colorbar>"]
    for axes in (axes for axes in figure.axes if axes not in bars):
        assert axes.get_xlabel() and axes.get_ylabel() and (axes.get_title() or figure.get_suptitle())
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            told = [label for label in axis.get_ticklabels() if label.get_text()]
            inside = [at for at in axis.get_ticklocs() if low <= at <= high]
            assert told and len(inside) >= (3 if axis.get_scale() == "log" else 1)


@settings(deadline=None, max_examples=30)
@given(st.floats(1.0, 1e4), st.floats(1.0, 1e6), st.sampled_from(["x", "y"]))
def test_any_perplexities_have_ticks_to_read_them_by(lowest, times, name):
    (axes,) = new_panels(1)[1]
    highest = lowest * times
    is_log = highest >= 3 * lowest
    scale_for_ratios(axes, name, [highest, math.nan, lowest], "perplexity")
    axis = axes.xaxis if name == "x" else axes.yaxis
    low, high = axis.get_view_interval()
    assert axis.get_scale() == ("log" if is_log else "linear")
    assert axis.label.get_text() == "perplexity" + " (log scale)" * is_log
    assert low < lowest <= highest < high <= 2 * highest
    ticks = axis.get_ticklocs()
    if is_log:
        assert 3 <= len(ticks) <= 8 and all(low <= tick <= high for tick in ticks)
        assert [float(text.get_text()) for text in axis.get_ticklabels()] == pytest.approx(ticks, rel=1e-5)


@pytest.mark.parametrize("name", LITTLE)
def test_single_entries_and_gaps_can_be_drawn(name):
    figure = LITTLE[name]()
    figure.set_layout_engine("none")  # it takes most of the time
    pixels = _pixels(figure)
    assert not all(_is_blank(pixels, axes) for axes in figure.axes)


@pytest.mark.parametrize("name", EMPTY)
def test_without_data_there_is_one_sentence(name):
    with pytest.raises(ValueError) as error:
        EMPTY[name]()
    assert str(error.value).endswith(".") and ". " not in str(error.value)
