"""`layerskip-moe report`: a saved model measured and written down, in one command."""

import json
import shutil
from pathlib import Path

import pytest

from layerskip_moe.cli import report as report_command
from layerskip_moe.training.config import TrainConfig
from layerskip_moe.training.metrics import write_recipe

TINY = "--seq-len 16 --max-windows 4 --num-prompts 2 --prompt-length 8 --max-new-tokens 4 --draft-lengths 2"


def test_a_report_is_written_and_its_path_printed(shell, text, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("layerskip_moe.analysis.report.draw_figures", lambda *measured: {})  # seconds, tested elsewhere
    given = ["--checkpoint", checkpoint, "--dataset", text, "--out-dir", "told here", *TINY.split()]
    code, out, err = shell("report", *given, "--thresholds", 0.2, 0.8)
    assert (code, out) == (0, "told here/report.md\n"), err
    report = json.loads((tmp_path / "told here" / "report.json").read_text())
    assert report["command"].startswith("layerskip-moe report --checkpoint ")
    assert "--out-dir 'told here'" in report["command"]
    assert report["model"]["config"]["n_layers"] == 5 == len(report["exits"]["perplexity"])
    assert report["corpus"]["name"] == "text" and report["machine"]["device"] == "cpu"
    assert report["early_exit"]["held_out"]["thresholds"] == [0.2, 0.8]
    assert [comparison["prompts"] for comparison in report["decoding"]] == [2, 2]
    assert "layerskip-moe report" in (tmp_path / "told here" / "report.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--temperature", "0"], "temperature=0 is greedy"),
        (["--seq-len", "100000"], "too few for two windows of seq_len=100000"),
        (["--max-new-tokens", "500"], "past max_seq_len=64"),
        (["--thresholds", "a"], "--thresholds a does not fit: it is any number of values, each a number."),
        (["--out_dirs", "x"], "did you mean --out-dir?"),
    ],
)
def test_a_mistake_is_one_sentence_and_writes_nothing(shell, text, checkpoint, tmp_path, arguments, sentence):
    code, out, err = shell("report", "--checkpoint", checkpoint, "--dataset", text, *TINY.split(), *arguments)
    assert (code, out) == (1, "")
    last = err.splitlines()[-1]  # progress bars come before it
    assert last.startswith("error: ") and sentence in last
    assert not (tmp_path / "runs").exists()


@pytest.fixture
def report(shell, text, monkeypatch):
    """report(checkpoint, out_dir) -> report.json, nothing measured and nothing drawn but listed."""
    monkeypatch.setattr(report_command, "study", lambda *args, **settings: {})
    monkeypatch.setattr("layerskip_moe.analysis.figures.save_figure", lambda figure, path: None)

    def run(checkpoint, out_dir):
        given = ["--checkpoint", checkpoint, "--dataset", text, "--out-dir", out_dir]
        code, _, err = shell("report", *given)
        assert code == 0, err
        return json.loads((Path(out_dir) / "report.json").read_text())

    return run


def leave_a_run(folder, n_layers):
    """What training leaves in the folder of a run."""
    folder.mkdir(exist_ok=True)
    write_recipe(folder, 20, n_layers, TrainConfig())
    loads = ([3, 1], [2, 2])
    records = [
        {"split": "train", "step": step, "exit_losses": {"1": 3.0}, "load": {"1": load}, "seconds": {"forward": 0.5}}
        for step, load in zip((9, 19), loads, strict=True)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def test_the_run_that_the_checkpoint_lies_in_is_told(report, checkpoint):
    leave_a_run(Path("run"), 5)
    shutil.copytree(checkpoint, "run/model")
    Path("link").symlink_to("run/model")
    for place in ("run/model", "link"):
        told = report(place, "told")
        drawn = {"loss", "step_parts", "layer_dropout", "exit_curriculum", "balance_over_training"}
        assert drawn <= set(told["figures"]) and told["recipe"]["steps"] == 20
        assert told["training"] == {"seconds_by_part": {"forward": 0.5}}
        words = Path("told/report.md").read_text()
        assert "| forward | 500.0 |" in words and "Layer dropout" in words


def test_nothing_is_told_of_a_run_that_is_another_models(report, checkpoint):
    leave_a_run(Path("told"), 5)  # a run of another model, in the folder of the report
    Path("alone").mkdir()
    shutil.copytree(checkpoint, "alone/model")
    told = report("alone/model", "told")
    assert not {"recipe", "training"} & set(told) and told["figures"] == {}
    leave_a_run(Path("alone"), 4)
    with pytest.warns(UserWarning, match="'.*alone' was of a network of 4 layers, and this model has 5"):
        told = report("alone/model", "told")
    assert not {"recipe", "training"} & set(told) and told["figures"] == {}
