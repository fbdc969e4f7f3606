"""Figures named in a report are there and show something; what training left in the folder is told."""

import json

import pytest
from matplotlib.image import imread

from layerskip_moe.analysis import figures


@pytest.fixture
def saved(monkeypatch):
    """Every Figure written so far, by its file's name."""
    seen = {}
    save = figures.save_figure

    def keep(figure, path):
        save(figure, path)
        seen[path.name] = figure

    monkeypatch.setattr(figures, "save_figure", keep)
    return seen


def _write_metrics(folder, records):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def _assert_not_blank(figure, path):
    """Within the frame of every axes, the file's pixels are not all of the background's white."""
    pixels = imread(path)[..., :3]
    height, width = pixels.shape[:2]
    assert figure.axes
    for axes in figure.axes:
        box = axes.get_position()
        inside = pixels[
            round((1 - box.y1) * height) + 4 : round((1 - box.y0) * height) - 4,
            round(box.x0 * width) + 4 : round(box.x1 * width) - 4,
        ]
        assert inside.size > 1000 and inside.min() < 0.8, f"{path}: {axes.get_title()!r}"


def test_a_blank_panel_would_be_noticed(tmp_path):
    figure = figures.perplexity_by_exit([3.0, 2.0], [0.5, 1.0])
    figure.axes[1].cla()
    figures.save_figure(figure, tmp_path / "half.png")
    with pytest.raises(AssertionError, match="half"):
        _assert_not_blank(figure, tmp_path / "half.png")


def test_a_full_report_has_every_figure(written, full_report, train_records, saved, tmp_path):
    validation = {"split": "validation", "step": 24, "perplexity": [30.0, 25.0, 20.0]}
    _write_metrics(tmp_path, [*train_records, validation])
    text, held = written(full_report, draw=True)
    assert set(held["figures"]) == {
        "loss", "perplexity_by_exit", "expert_load", "speed_up_contour", "acceptance_by_position",
        "early_exit", "confidence_by_layer", "exit_histogram", "exits_by_prompt", "layer_dropout", "exit_curriculum",
        "balance_over_training", "expert_tokens", "step_parts", "quality", "comparison",
    }  # fmt: skip
    for name, path in held["figures"].items():
        assert path == f"figures/{name}.png" and text.count(f"]({path})") == 1
        _assert_not_blank(saved[f"{name}.png"], tmp_path / path)


def _minimal():
    """One layer, one step, one prompt, one setting, one threshold: the least that each section can hold."""
    plain = dict(
        name="plain", exit_layer=None, draft_length=None, threshold=None, tokens_per_second=50.0, prefill_seconds=0.01,
        speed_up=1.0, speed_up_quartiles=[1.0, 1.0], mean_layers=1.0, drafted=0, accepted=0, acceptance_rate=None,
        drafted_by_position=[], accepted_by_position=[], tokens_per_verification=1.0, perplexity=3.0, agreement=1.0,
        distinct_4grams=None, identical=1, first_differences={},
    )  # fmt: skip
    drafted = plain | dict(
        name="exit 1", exit_layer=1, draft_length=1, drafted=4, accepted=4, acceptance_rate=1.0,
        drafted_by_position=[4], accepted_by_position=[4],
    )  # fmt: skip
    setting = dict(temperature=0.0, top_p=None, max_new_tokens=4, prompts=1, seed=0)
    decoding = {**setting, "strategies": [plain, drafted]}
    dense = dict(name="one", perplexity=[9.0], agreement=[1.0], best_step=None, experts={}, decoding=[], seconds=1.0)
    config = dict(
        layer_dropout_max=0.0, layer_dropout_depth="exp", layer_dropout_time="exp", layer_dropout_part="block",
        exit_weights="equal", exit_loss_scale=1.0, exit_curriculum="all", exit_rotation=2,
    )  # fmt: skip
    return dict(
        training=dict(steps=1, seconds=1.0, tokens_per_second=9.0, final_losses={}, best_validation=None),
        recipe=dict(steps=1, n_layers=1, train_config=config),
        exits=dict(perplexity=[9.0], agreement=[1.0], tokens=4),
        decoding=[decoding],
        strategies=[decoding],
        sweep={
            **setting, "exit_layers": [1], "draft_lengths": [1], "speed_up": [[1.1]], "acceptance_rate": [[1.0]],
            "chosen": {"exit_layer": 1, "draft_length": 1},
        },
        early_exit=dict(
            confidence="softmax_diff", min_layer=1, cache="propagate", by_prompt=None,
            held_out=dict(
                thresholds=[1.0], mean_layers=[1.0], perplexity=[9.0], agreement=[1.0], exits=[[4]],
                confidence_mean=[None], confidence_low=[None], confidence_high=[None], tokens=4,
            ),
            decoding={**setting, "strategies": [plain, {**plain, "name": "threshold 1", "threshold": 1.0}]},
        ),
        experts=dict(load={}, metrics={}, tokens=4),
        expert_choice=dict(layers={}, tokens=4),
        comparison=dict(steps=1, seed=0, runs=[dense, {**dense, "name": "other"}]),
    )  # fmt: skip


def test_a_minimal_report_has_what_it_has_data_for(written, saved, tmp_path):
    _write_metrics(tmp_path, [{"split": "train", "step": 0, "exit_losses": {"1": 3.0}}])
    text, held = written(_minimal(), draw=True)
    assert set(held["figures"]) == {
        "loss", "perplexity_by_exit", "speed_up_contour", "acceptance_by_position", "early_exit",
        "exit_histogram", "exit_curriculum", "quality", "comparison",
    }  # fmt: skip
    for name, path in held["figures"].items():
        assert text.count(f"]({path})") == 1
        _assert_not_blank(saved[f"{name}.png"], tmp_path / path)
    assert "No layer was dropped" in text and "cannot be compared" in text and "nan" not in text
    assert held["training"]["seconds_by_part"] is None and "part of a step" not in text


def test_drafts_of_the_sweep_are_drawn_where_it_kept_them(written, full_report, saved):
    rows = [
        dict(exit_layer=n, draft_length=3, drafted_by_position=[9, 9, 9], accepted_by_position=[6, 4, n])
        for n in (1, 2)
    ]
    full_report["sweep"]["by_position"] = rows
    written({name: full_report[name] for name in ("sweep", "decoding")}, draw=True)
    names = [line.get_label() for line in saved["acceptance_by_position.png"].axes[0].lines]
    assert names == ["exit layer 1, temperature 0.8", "exit layer 2, temperature 0.8"]


def test_pictures_of_an_earlier_report_do_not_stay(written, tmp_path):
    folder = tmp_path / "figures"
    folder.mkdir()
    for name in ("quality.png", "perplexity_by_exit.png", "mine.png", "quality.svg"):
        (folder / name).write_bytes(b"earlier")
    written({"exits": {"perplexity": [9.0, 8.0], "agreement": [0.5, 1.0], "tokens": 4}}, draw=True)
    assert {path.name for path in folder.iterdir()} == {"perplexity_by_exit.png", "mine.png", "quality.svg"}
    assert (folder / "perplexity_by_exit.png").read_bytes() != b"earlier"


def test_an_empty_report_has_no_figures(written, tmp_path):
    assert written({}, draw=True)[1]["figures"] == {} and not (tmp_path / "figures").exists()
