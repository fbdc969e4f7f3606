"""`layerskip-moe train` and `evaluate`: what they write and print, and what they refuse before they work."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from layerskip_moe import MoEDecoder
from layerskip_moe.analysis import ExitEvaluation, evaluate_exits
from layerskip_moe.cli import evaluate as evaluate_command
from layerskip_moe.cli import train as train_command
from layerskip_moe.data import load_corpus

TINY = "--vocab-size 300 --n-layers 3 --d-model 16 --n-heads 2 --num-experts 2 --top-k 1 --seq-len 16 --batch-size 4"


def test_training_leaves_a_model_that_can_be_evaluated(shell, text):
    code, out, err = shell("train", "--dataset", text, "--out-dir", "run", *TINY.split(), "--max-steps", 4)
    assert code == 0, err
    assert out.startswith("4 steps in ") and out.endswith("; the model is in run/model\n")
    steps = [json.loads(line)["step"] for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert max(steps) == 3

    evaluate = ["evaluate", "--checkpoint", "run/model", "--dataset", text, "--seq-len", 16]
    code, out, err = shell(*evaluate, "--json")
    assert code == 0, err
    told = json.loads(out)
    model = MoEDecoder.from_pretrained("run/model")
    corpus = load_corpus(text, tokenizer="run/model/tokenizer.json", progress=False)
    expected = evaluate_exits(model, corpus.validation, seq_len=16, batch_size=8, progress=False)
    assert told["perplexity"] == pytest.approx(expected.perplexity)
    assert told["agreement"] == pytest.approx(expected.agreement)
    assert (told["tokens"], told["corpus"], told["split"]) == (expected.tokens, "text", "validation")

    code, out, err = shell(*evaluate)
    header, *rows, where = out.splitlines()
    assert header.split() == ["exit", "layer", "perplexity", "agreement"]
    assert [float(row.split()[1]) for row in rows] == pytest.approx(expected.perplexity, abs=0.01)
    assert rows[-1].split()[2] == "100.0%"
    assert where == f"over {expected.tokens} tokens of the validation split of text"

    code, out, err = shell(*evaluate, "--split", "train", "--max-windows", 2, "--json")
    assert json.loads(out)["tokens"] == 32 and math.isfinite(json.loads(out)["perplexity"][0])


def test_a_perplexity_past_all_numbers_is_null(shell, text, checkpoint, monkeypatch):
    found = ExitEvaluation([math.inf, 3.0], [0.5, 1.0], 7)
    monkeypatch.setattr(evaluate_command, "evaluate_exits", lambda *args, **settings: found)
    code, out, _ = shell("evaluate", "--checkpoint", checkpoint, "--dataset", text, "--json")
    assert code == 0 and json.loads(out, parse_constant=pytest.fail)["perplexity"] == [None, 3.0]


def test_a_run_of_ones_own_is_not_main_pys(shell, text):
    assert shell("train", "--dataset", text, *TINY.split(), "--max-steps", 1)[0] == 0
    assert sorted(path.name for path in Path("runs").iterdir()) == ["train"]


def test_a_stopped_run_is_resumed_from_the_shell(shell, text, monkeypatch):
    command = ["train", "--dataset", text, "--out-dir", "run", *TINY.split(), "--max-steps", 4]
    assert shell(*command)[0] == 0
    whole = MoEDecoder.from_pretrained("run/model").state_dict()

    def stops(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train_command.MoEDecoder, "save_pretrained", stops)
        code, _, err = shell(*command, "--out-dir", "again")
    assert (code, err.rstrip().splitlines()[-1]) == (130, "interrupted")
    code, _, err = shell(*command, "--out-dir", "again")
    assert code == 1 and err.count("\n") == 1  # before any text is read
    assert err.startswith("error: again holds a run that stopped after step 4 of 4; go on with resume=True (--resume ")
    code, out, err = shell(*command, "--out-dir", "again", "--resume")
    assert code == 0 and "again/model" in out
    assert all(
        bool((tensor == whole[name]).all())
        for name, tensor in MoEDecoder.from_pretrained("again/model").state_dict().items()
    )
    assert shell(*command, "--out-dir", "again")[0] == 0  # as main.py has it: a finished run is replaced


def test_sigterm_saves_and_says_how_to_go_on(text):
    """The command as a scheduler ends it: a process of its own, in the middle of a run."""
    command = ["train", "--dataset", str(text), "--out-dir", "run", *TINY.split(), "--max-steps", "100000"]
    line = [sys.executable, "-m", "layerskip_moe", *command, "--log-every", "1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(line, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as process:
        metrics = Path("run/metrics.jsonl")
        while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=300)
    assert (process.returncode, out) == (143, "")
    last = err.rstrip().splitlines()[-1]
    assert re.fullmatch(r"stopped after step \d+ of 100000, and saved in run: .*--resume.* goes on from there\.", last)
    assert "Traceback" not in err
    [saved] = Path("run/checkpoints").iterdir()
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert saved.name == f"step-{max(steps) + 1:08}"


def test_one_seed_is_for_weights_and_batches(shell, text, monkeypatch):
    seen = {}

    def train(model, corpus, recipe, out_dir, *, resume, finish):
        seen.update(model=model, recipe=recipe, resume=resume)
        raise FloatingPointError("enough")

    monkeypatch.setattr(train_command, "train", train)
    assert shell("train", "--dataset", text, *TINY.split(), "--seed", 7, "--moe-layers", 0, 2)[0] == 1
    config, weights = seen["model"].config, seen["model"].state_dict()
    assert (config.n_layers, config.moe_layers, seen["recipe"].seed, seen["resume"]) == (3, (0, 2), 7, False)
    assert config.vocab_size <= 300 and config.d_ff == 32  # what was not given follows from what was
    again = MoEDecoder(config, seed=7).state_dict()
    assert all(bool((again[name] == tensor).all()) for name, tensor in weights.items())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("train --n-layer 4", "--n-layer is no option of layerskip-moe train; did you mean --n-layers?"),
        ("train --d-model 33", "d_model=33 is not a multiple of n_heads=4"),
        ("train --learning-rate -1", "learning_rate=-1.0 must be"),
        ("train --device banana", "device='banana'"),
        ("train --dataset nowhere.txt", "nowhere.txt"),
        ("train --vocab-size 20", "vocab_size=20 is too small"),
        ("train --tokenizer nowhere.json", "There is no tokenizer 'nowhere.json'"),
        ("evaluate", "layerskip-moe evaluate needs --checkpoint"),
        ("evaluate --checkpoint nowhere", "nowhere does not exist"),
        ("evaluate --checkpoint {checkpoint} --dataset nowhere.txt", "nowhere.txt"),
        ("evaluate --checkpoint {checkpoint} --dataset {text} --seq-len 100", "max_seq_len is 64"),
        ("evaluate --checkpoint {checkpoint} --dataset {text} --seq-len 0", "seq_len=0"),
        ("evaluate --checkpoint {checkpoint} --dataset {text} --batch-size 0", "batch_size=0"),
        ("evaluate --checkpoint {checkpoint} --dataset {text} --max-windows 0", "cannot be 0"),
    ],
)
def test_a_mistake_is_one_sentence_and_writes_nothing(shell, text, checkpoint, tmp_path, arguments, sentence):
    code, out, err = shell(*arguments.format(checkpoint=checkpoint, text=text).split())
    assert (code, out) == (1, "")
    last = err.splitlines()[-1]  # progress bars come before it
    assert last.startswith("error: ") and sentence in last
    assert not (tmp_path / "runs").exists()
