"""The pictures of loss, exits and load show the data they are given; what they look like is for eyes."""

import json
import math
import subprocess
import sys

import pytest

from layerskip_moe.analysis import figures
from layerskip_moe.analysis.findings import decoding_label


def _texts(axes):
    return [text.get_text() for text in axes.texts]


def _train(step, *losses):
    return {"split": "train", "step": step, "exit_losses": {str(n): loss for n, loss in losses}}


def test_loss_curves_show_the_last_exit_and_held_out_ones():
    # Exits take turns, and "10" sorts before "2" as text.
    train = [_train(0, (2, 9.0), (10, 7.0)), _train(1, (3, 8.0), (10, 6.0)), _train(2, (10, 5.5))]
    validation = [{"step": 2, "perplexity": [math.exp(10 - n) for n in range(10)]}]
    axes = figures.loss_curves(train, validation).axes[0]
    curves = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert curves.pop("training, whole model") == [[0, 7.0], [1, 6.0], [2, 5.5]]
    assert curves.pop("held out, exit layer 10\n(whole model)") == [[2, pytest.approx(1.0)]]
    assert curves.pop("held out, exit layer 1") == [[2, pytest.approx(10.0)]]
    assert len(curves) == 1 and all(label.startswith("held out") for label in curves)
    assert len({line.get_marker() for line in axes.lines[1:]}) == 3
    ends = {line.get_label(): line.get_ydata()[-1] for line in axes.lines}
    named = [text.get_text() for text in axes.figure.legends[0].get_texts()]
    assert named == sorted(ends, key=ends.get, reverse=True)  # as the curves end, from above


def test_loss_curves_smooth_long_runs_without_shifting_them():
    train = [_train(step, (1, float(step))) for step in range(240)]
    axes = figures.loss_curves(train).axes[0]
    raw, smooth = axes.lines
    assert raw.get_ydata().tolist() == list(map(float, range(240)))
    assert "mean of 7 records" in smooth.get_label()
    assert smooth.get_ydata()[10:-10].tolist() == pytest.approx(list(range(10, 230)))


def test_loss_curves_need_records():
    with pytest.raises(ValueError, match="no training records"):
        figures.loss_curves([])


def test_perplexity_and_agreement_by_exit():
    left, right = figures.perplexity_by_exit([96.0, 55.0, 43.25], [0.4, 0.755, 1.0]).axes
    assert left.lines[0].get_xydata().tolist() == [[1, 96.0], [2, 55.0], [3, 43.25]]
    assert right.lines[0].get_ydata().tolist() == pytest.approx([40, 75.5, 100])
    assert _texts(left) == ["96", "55", "43.2"] and _texts(right) == ["40%", "76%", "100%"]


@pytest.mark.parametrize("perplexity", [[43.0], [math.inf, None, 43.0], [math.nan]])
def test_one_layer_or_a_diverged_model_can_be_drawn(tmp_path, perplexity):
    figure = figures.perplexity_by_exit(perplexity, [1.0] * len(perplexity))
    figures.save_figure(figure, tmp_path / "exits.png")
    assert _texts(figure.axes[0]) == ["43"] * (43.0 in perplexity)


def test_many_exits_are_not_all_labelled():
    left, _ = figures.perplexity_by_exit([50.0] * 48, [1.0] * 48).axes
    assert 4 <= len(_texts(left)) <= 8


def test_expert_heat_map_is_centred_on_the_even_share():
    figure = figures.expert_heat_map({"1": [10, 30, 0, 0], "3": [5, 5, 5, 5]})
    axes = figure.axes[0]
    image = axes.images[0]
    assert image.get_array().tolist() == [[25, 75, 0, 0], [25, 25, 25, 25]]
    assert image.norm(25.0) == 0.5 and image.norm(0.0) == 0.0 and image.norm(75.0) == 1.0
    assert _texts(axes) == ["25", "75", "0", "0", "25", "25", "25", "25"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["1", "3"]


def test_expert_heat_map_of_a_layer_that_saw_no_token_or_has_one_expert(tmp_path):
    assert figures.expert_heat_map({0: [0, 0]}).axes[0].images[0].get_array().tolist() == [[0, 0]]
    figures.save_figure(figures.expert_heat_map({0: [4]}), tmp_path / "one.png")


def test_expert_heat_map_needs_experts():
    with pytest.raises(ValueError, match="no layer with experts"):
        figures.expert_heat_map({})


def test_labels_name_how_tokens_were_chosen():
    assert decoding_label({"temperature": 0.0, "top_p": 0.9}) == "greedy"
    assert decoding_label({"temperature": 0.8, "top_p": None}) == "temperature 0.8"
    assert decoding_label({"temperature": 1, "top_p": 0.95}) == "temperature 1, top-p 0.95"


def test_no_label_lies_on_another(full_report):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    for figure in (
        figures.quality(full_report["strategies"]),
        figures.perplexity_by_exit([96.0, 55.0, 44.0, 43.0], [0.4, 0.41, 0.42, 1.0]),
    ):
        FigureCanvasAgg(figure).draw()
        for axes in figure.axes:
            boxes = [text.get_window_extent() for text in axes.texts]
            assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_save_figure_writes_by_suffix_and_never_half(tmp_path, monkeypatch):
    figure = figures.expert_heat_map({0: [1, 2]})
    path = tmp_path / "new" / "load.png"
    figures.save_figure(figure, path)
    whole = path.read_bytes()
    assert whole.startswith(b"\x89PNG")
    figures.save_figure(figure, tmp_path / "load.svg")
    assert b"<svg" in (tmp_path / "load.svg").read_bytes()

    def full_disk(beside, **_):
        beside.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(figure, "savefig", full_disk)
    with pytest.raises(OSError, match="disk full"):
        figures.save_figure(figure, path)
    assert path.read_bytes() == whole and list(path.parent.iterdir()) == [path]


def test_matplotlib_comes_late_and_pyplot_never():
    script = """
import json, sys
import layerskip_moe.analysis, layerskip_moe.bench
from layerskip_moe.analysis import figures
early = "matplotlib" in sys.modules
figures.expert_heat_map({0: [1, 2]})
print(json.dumps([early, "matplotlib" in sys.modules, "matplotlib.pyplot" in sys.modules]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [False, True, False]
