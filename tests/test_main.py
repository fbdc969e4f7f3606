"""main.py from end to end, as a script and pasted into a cell, at the smallest size that says something."""

import json
import math
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

MAIN = Path(__file__).parents[1] / "main.py"
TINY = {
    "vocab_size": 300,
    "seq_len": 16,
    "n_layers": 3,
    "n_heads": 2,
    "d_model": 16,
    "d_ff": 16,
    "num_experts": 4,
    "max_steps": 4,
    "batch_size": 4,
    "num_prompts": 2,
    "max_new_tokens": 6,
    "device": "cpu",
}


@pytest.fixture
def text(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for index in range(4):
        (folder / f"{index}.txt").write_text(f"The {index} brown foxes jump over the lazy dogs, again.\n" * 60)
    return folder


@pytest.fixture(autouse=True)
def surroundings(tmp_path, monkeypatch, cache_with_kernels):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # main.py replaces it
    monkeypatch.chdir(tmp_path)


def command(**given):
    return [f"--{name}={value}" for name, value in (TINY | given).items()]


def test_one_line_gives_a_model_and_a_report(text, tmp_path):
    out = tmp_path / "out"
    line = [sys.executable, str(MAIN), *command(dataset=text, out_dir=out)]
    done = subprocess.run(line, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr

    report = json.loads((out / "report.json").read_text())
    assert report["constants"]["n_layers"] == 3 and report["constants"]["exit_layer"] is None
    assert len(report["exits"]["perplexity"]) == 3
    greedy, sampled = report["decoding"]
    assert (greedy["temperature"], sampled["temperature"]) == (0.0, 0.8)
    for comparison in (greedy, sampled):
        assert comparison["prompts"] == 2
        assert [row["identical"] for row in comparison["strategies"]] == [2] * len(comparison["strategies"])
    assert (out / "model" / "model.safetensors").exists()
    assert all((out / path).stat().st_size > 10_000 for path in report["figures"].values())
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert max(steps) == 3
    assert all(perplexity > 1 and math.isfinite(perplexity) for perplexity in report["exits"]["perplexity"])


def test_compare_trains_the_same_network_without_the_recipe(text, tmp_path, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setattr(
        sys, "argv", [str(MAIN), *command(dataset=text, out_dir=out), "--compare", "--exit_weights", "drafting"]
    )
    runpy.run_path(str(MAIN), run_name="__main__")
    report = json.loads((out / "report.json").read_text())
    first, second = report["comparison"]["runs"]
    assert report["comparison"]["steps"] == 4 and first["perplexity"] != second["perplexity"]
    told = json.loads((out / "without_layerskip" / "recipe.json").read_text())["train_config"]
    assert (told["layer_dropout_max"], told["exit_curriculum"], told["max_steps"]) == (0.0, "none", 4)
    assert "With and without LayerSkip" in (out / "report.md").read_text()
    assert (out / report["figures"]["comparison"]).exists()


def test_it_runs_pasted_into_a_cell(text, tmp_path, monkeypatch, capsys):
    """A cell has no __file__ and somebody else's command line; its user has edited the constants."""
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    lines = MAIN.read_text().splitlines()
    for name, value in (TINY | {"dataset": str(text), "out_dir": "cell", "layer_dropout_max": 0.0}).items():
        place = next(i for i, line in enumerate(lines) if line.startswith(f"{name}: "))
        lines[place] = f"{lines[place].split(' = ')[0]} = {value!r}"
    cell = {"__name__": "__main__"}
    exec(compile("\n".join(lines), "cell", "exec"), cell)
    assert "In short" in capsys.readouterr().out
    assert (tmp_path / "cell" / "report.md").exists()
    assert cell["model"].config.n_layers == 3  # what it made stays, for the next cell


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"n_layer": 4}, "--n_layer is not one of the constants"),
        ({"n_layers": "four"}, "n_layers is a whole number"),
        ({"k": 9}, "top_k=9 experts cannot be chosen"),
        ({"exit_layer": 4}, "exit_layer=4 must be between 1 and n_layers=3"),
        ({"exit_layer": 0}, "exit_layer=0 must be between 1 and n_layers=3"),
        ({"n_kv_heads": 0}, "n_kv_heads=0"),
        ({"max_seq_len": 0}, "max_seq_len=0"),
        ({"max_seq_len": 37}, "past max_seq_len=37"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"temperature": -1}, "temperature=-1"),
        ({"temperature": 0}, "temperature=0"),
        ({"draft_length": 0}, "draft_length=0"),
        ({"num_prompts": 5000}, "5000"),
        ({"seq_len": 5000}, "too few for two windows of seq_len=5000"),
        ({"device": "banana"}, "device='banana'"),
        ({"dataset": "nowhere.txt"}, "nowhere.txt"),
    ],
)
def test_a_mistake_is_found_before_any_training(text, tmp_path, monkeypatch, arguments, sentence):
    monkeypatch.setattr(
        sys, "argv", [str(MAIN), *command(**{"dataset": text, "out_dir": tmp_path / "out"} | arguments)]
    )
    with pytest.raises(ValueError, match=sentence):
        runpy.run_path(str(MAIN), run_name="__main__")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [["foo"], ["--n_layers"], ["--n_layers", "four"]])
def test_a_mistake_is_one_sentence_and_exit_code_1(arguments):
    done = subprocess.run([sys.executable, str(MAIN), *arguments], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_a_stopped_run_is_resumed(text, tmp_path, monkeypatch):
    """Stopped by hand in mid-training, as in a tab that is closed; --resume goes on to the same weights."""
    from layerskip_moe.training import run as run_module

    def run(*more):
        line = command(dataset=text, layer_dropout_max=0.0, **more[0]) + list(more[1:])
        monkeypatch.setattr(sys, "argv", [str(MAIN), *line])
        return runpy.run_path(str(MAIN), run_name="__main__")

    def stop_at_the_third(model, inputs, labels, sample_ids, config, *, step, **others):
        if step == 2:
            raise KeyboardInterrupt
        return losses(model, inputs, labels, sample_ids, config, step=step, **others)

    losses = run_module.training_losses
    unbroken = run({"out_dir": tmp_path / "unbroken"})["model"].state_dict()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run_module, "training_losses", stop_at_the_third)
        run({"out_dir": tmp_path / "broken"})
    resumed = run({"out_dir": tmp_path / "broken"}, "--resume")
    assert resumed["result"].steps == 4
    for name, weight in resumed["model"].state_dict().items():
        assert bool((weight == unbroken[name]).all()), name
    assert (tmp_path / "broken" / "report.md").exists()


def test_ctrl_c_in_training_saves_and_is_one_sentence(text, tmp_path):
    out = tmp_path / "out"
    line = [sys.executable, str(MAIN), *command(dataset=text, out_dir=out, max_steps=100_000)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(line, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as process:
        metrics = out / "metrics.jsonl"
        while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=300)
    assert process.returncode == 130 and "Traceback" not in err
    assert re.match(r"stopped after step \d+ of 100000, and saved in .*--resume", err.rstrip().splitlines()[-1])
    [saved] = (out / "checkpoints").iterdir()
    assert saved.name.startswith("step-") and not (out / "model").exists()
    again = subprocess.run(line, capture_output=True, text=True, env=environment)
    assert again.returncode == 1 and again.stderr.rstrip().splitlines()[-1].startswith(
        f"error: {out} holds a run that stopped after step {int(saved.name[5:])} of 100000; go on with resume=True"
    )


def test_a_new_run_clears_an_older_comparison(text, tmp_path, monkeypatch):
    """Else a --resume, after a stop before its own comparison began, would go on with that one."""
    from layerskip_moe.training import run as run_module

    def stop(*arguments, **others):
        raise KeyboardInterrupt

    out, beside = tmp_path / "out", tmp_path / "out" / "without_layerskip" / "checkpoints" / "step-00000004"
    beside.mkdir(parents=True)
    (beside / "state.json").write_text('{"step": 4, "max_steps": 4}')
    monkeypatch.setattr(sys, "argv", [str(MAIN), *command(dataset=text, out_dir=out), "--compare"])
    monkeypatch.setattr(
        "layerskip_moe.training.run_folder.steps_done", lambda folder: None
    )  # all that is there is over
    monkeypatch.setattr(run_module, "training_losses", stop)
    with pytest.raises(KeyboardInterrupt):
        runpy.run_path(str(MAIN), run_name="__main__")
    assert (out / "recipe.json").exists() and not beside.exists()


def test_a_comparison_that_was_stopped_is_found_before_training(text, tmp_path, monkeypatch):
    beside = tmp_path / "out" / "without_layerskip" / "checkpoints" / "step-00000003"
    beside.mkdir(parents=True)
    line = [str(MAIN), *command(dataset=text, out_dir=tmp_path / "out"), "--compare"]
    monkeypatch.setattr(sys, "argv", line)
    with pytest.raises(ValueError, match="without_layerskip holds a run that stopped after step 3"):
        runpy.run_path(str(MAIN), run_name="__main__")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["without_layerskip"]
