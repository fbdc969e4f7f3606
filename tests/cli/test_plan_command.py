"""layerskip-moe plan: its table and verdict, the files it reads, what it measures, and what it refuses."""

import json

import pytest

from layerskip_moe import MoEDecoder
from layerskip_moe.bench.plan import measured_peaks
from layerskip_moe.cli import plan as command
from layerskip_moe.pretrained.families import FAMILIES

QUICK = ["--layer-dropout-max", 0]  # whose schedules take seconds to import
FITS = ["--memory-gib", 10]


def test_a_plan_is_a_table_and_a_verdict(shell, checkpoint):
    code, out, err = shell("plan", "--checkpoint", checkpoint, *FITS, "--batch-size", 4, *QUICK)
    assert code == 0, err
    total, active = MoEDecoder.from_pretrained(checkpoint).parameter_counts()
    first, second, training, decoding = out.splitlines()[:4]
    assert first == f"{total} parameters, {active} of them used per token"
    assert second.endswith("in decoding") and "operations per token" in second
    assert training.startswith("training 4 x 64 tokens at a time, bfloat16, adamw, on one GPU;")
    assert decoding == "decoding 1 text of 32 + 32 tokens, bfloat16"
    rows = [line.split("  ")[0] for line in out.splitlines()[5:14]]
    assert rows[0] == "GiB" and rows[-1] == "together" and "cache" in rows and "activations" in rows
    assert "training fits: 0.00" in out and "decoding fits: 0.00" in out and "of 9.00 GiB, which is 90% of 10.0" in out


def test_what_does_not_fit_is_told_with_what_would(shell, checkpoint):
    code, out, err = shell("plan", "--checkpoint", checkpoint, "--memory-gib", 0.004, "--batch-size", 16, *QUICK)
    assert code == 0, err
    told = out[out.index("training does not fit") :]
    assert "it would with: " in told and "--activation-checkpointing (0.00" in told and "--optimizer adamw8bit" in told
    assert "decoding fits" in told


def test_without_a_gpu_the_memory_is_asked_for(shell, checkpoint, monkeypatch):
    monkeypatch.setattr(command.torch.cuda, "is_available", lambda: False)
    code, out, err = shell("plan", "--checkpoint", checkpoint, *QUICK)
    assert code == 0 and out.count("there is no GPU here to compare with: give --memory-gib.") == 2, err
    code, out, err = shell("plan", "--checkpoint", checkpoint, "--gpus", 0, *QUICK)
    assert code == 0 and "on this machine's processor" in out and "training fits" in out, err


@pytest.mark.parametrize("family", FAMILIES)
def test_the_config_of_every_family_is_read(shell, tmp_path, family):
    path = tmp_path / "other name.json"
    path.write_text(json.dumps({"model_type": family, "vocab_size": 1000, "num_hidden_layers": 2}))
    arguments = ["--config", path, "--gpus", 8, *FITS, "--batch-size", 8, "--seq-len", 16, *QUICK, "--json"]
    code, out, err = shell("plan", *arguments)
    assert code == 0, err
    told = json.loads(out)
    assert told["parameters"]["embedding"] % 1000 == 0 and len(told["parameters"]["blocks"]) == 2
    assert told["training"]["weights"] > 0 and told["measured"] is None


def test_a_check_measures_here(shell, checkpoint, monkeypatch):
    asked = []

    def in_this_process(function, arguments, environment):
        asked.append(function)
        return function(**json.loads(json.dumps(arguments)))

    monkeypatch.setattr(command, "in_fresh_process", in_this_process)
    arguments = ["--gpus", 0, "--check", "--precision", "float32", "--dtype", "float32", "--batch-size", 2, "--json"]
    code, out, err = shell("plan", "--checkpoint", checkpoint, *arguments, *QUICK)
    assert code == 0 and asked == [measured_peaks], err
    measured = json.loads(out)["measured"]
    for planned, allocated in zip(measured["planned"], measured["allocated"], strict=True):
        assert planned == pytest.approx(allocated, rel=0.1)
    monkeypatch.setattr(command, "in_fresh_process", lambda *_: [2 * 10**6, 10**6])
    arguments.remove("--json")
    code, out, err = shell("plan", "--checkpoint", checkpoint, *arguments, *QUICK)
    assert code == 0 and "planned over allocated" in out and "three steps, and one generation, on" in out, err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "layerskip-moe plan needs one of --config (a file) and --checkpoint (a folder, or id)."),
        (["--config", "a.json", "--checkpoint", "b"], "layerskip-moe plan needs one of --config"),
        (["--config", "a.json"], "a.json: No such file or directory."),
        (["--config", "bad.json"], "bad.json: model_type='gpt2' cannot be loaded; the architectures that can are"),
        (["--config", "good.json", "--gpus", -1], "gpus=-1 must be a whole number: 0 for the CPU, or how many"),
        (["--config", "good.json", "--gpus", 3], "batch_size=16 is shared by 3 processes, which does not divide it"),
        (["--config", "good.json", "--memory-gib", -1], "memory_gib=-1.0 must be a number of GiB above 0."),
        (["--config", "good.json", "--gpus", 2, "--check"], "--check is of one process; give --gpus 1, or 0"),
        (["--config", "good.json", "--rows", 0], "rows=0 must be a whole number, 1 or more."),
        (["--config", "good.json", "--seq-len", 99999], "seq_len=99999 is longer than the model's max_seq_len=2048."),
        (["--config", "good.json", "--learning-rate", 1], "--learning-rate is no option of layerskip-moe plan;"),
    ],
)
def test_mistakes_are_one_sentence(shell, tmp_path, arguments, sentence):
    (tmp_path / "bad.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "good.json").write_text('{"model_type": "llama", "num_hidden_layers": 1, "vocab_size": 10}')
    code, out, err = shell("plan", *arguments, *QUICK)
    assert (code, out) == (1, "") and err.startswith(f"error: {sentence}") and err.count("\n") == 1
