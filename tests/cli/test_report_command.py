"""`layerskip-moe report`: a saved model measured and written down, in one command."""

import json

import pytest

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
        (["--seq-len", "100000"], "too few for seq_len=100000"),
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
