"""Which command runs, what it imports, and what becomes of its errors."""

import errno
import io
import os
import subprocess
import sys

import pytest
import torch

import layerskip_moe
from layerskip_moe.cli import train as train_command
from layerskip_moe.constants import user_error

ALONE = "import sys; from layerskip_moe.cli import main; print(main(['--help']), *sorted(sys.modules))"


def test_help_lists_the_commands_and_imports_only_the_library():
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, check=True)
    told, _, modules = done.stdout.rpartition("\n0 ")
    for command in ("train", "generate", "evaluate", "report", "ablate", "plan", "bench"):
        assert f"layerskip-moe {command} " in told
    heavy = {"tyro", "torchtune", "torchao", "datasets", "transformers", "matplotlib", "tokenizers"}
    assert "layerskip_moe.cli.dispatch" in modules.split()
    assert not heavy & set(modules.split())
    assert done.stderr == ""


def test_a_closed_pipe_is_no_error():
    """As in `layerskip-moe train --help | head -0`: nobody reads what is printed."""
    process = subprocess.Popen(
        [sys.executable, "-m", "layerskip_moe", "train", "--help"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 141


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            [],
            "there is no command; give one of train, generate, evaluate, report, export, calibrate, trace, ablate,",
        ),
        (["trian"], "'trian' is no command of layerskip-moe; did you mean train?"),
        (["--checkpoint", "x"], "'--checkpoint' is no command of layerskip-moe; give one of"),
    ],
)
def test_a_wrong_command_is_one_sentence(shell, arguments, sentence):
    code, out, err = shell(*arguments)
    assert (code, out) == (1, "")
    assert err.startswith(f"error: {sentence}") and err.count("\n") == 1


def test_version_and_a_commands_help_are_no_errors(shell):
    assert shell("--version") == (0, f"{layerskip_moe.__version__}\n", "")
    code, out, err = shell("train", "--help")
    assert (code, err) == (0, "")
    assert "--max-steps" in out and "optimizer steps; when set it wins" in out.replace("\n", " ")


def raising(error):
    def run(arguments):
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ValueError("Two lines\nof it."), 1, "error: Two lines of it.\n"),
        (FloatingPointError("The loss is not finite."), 1, "error: The loss is not finite.\n"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 1, "error: /x: Permission denied.\n"),
        (OSError("no network"), 1, "error: no network.\n"),
        (torch.OutOfMemoryError("CUDA: 2 GiB"), 1, f"error: {user_error(MemoryError())}\n"),
        (KeyboardInterrupt(), 130, "\ninterrupted\n"),
    ],
)
def test_errors_inside_a_command(shell, monkeypatch, error, code, said):
    monkeypatch.setattr(train_command, "run", raising(error))
    assert shell("train") == (code, "", said)


def test_of_several_interrupted_processes_the_first_one_says_so(shell, monkeypatch):
    monkeypatch.setattr(train_command, "run", raising(KeyboardInterrupt()))
    for rank, said in (("0", "\ninterrupted\n"), ("1", "\n")):
        monkeypatch.setenv("RANK", rank)
        assert shell("train") == (130, "", said)


@pytest.mark.parametrize("error", [KeyError("x"), RuntimeError("x"), UnicodeDecodeError("utf-8", b"\xff", 0, 1, "x")])
def test_our_own_mistakes_keep_their_traceback(shell, monkeypatch, error):
    monkeypatch.setattr(train_command, "run", raising(error))
    with pytest.raises(type(error)):
        shell("train")


def test_an_end_that_is_no_success_is_none(shell, monkeypatch):
    monkeypatch.setattr(train_command, "run", raising(SystemExit(3)))
    with pytest.raises(SystemExit) as end:
        shell("train")
    assert end.value.code == 3
    monkeypatch.setattr(train_command, "run", raising(SystemExit(0)))
    assert shell("train") == (0, "", "")


def test_every_command_prints_what_a_terminal_lacks(monkeypatch):
    screen = io.TextIOWrapper(io.BytesIO(), encoding="ascii", newline="\n")
    monkeypatch.setattr(train_command, "run", lambda arguments: print("on été"))
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", screen)
        assert layerskip_moe.cli.main(["train"]) == 0
    assert screen.buffer.getvalue() == b"on \\xe9t\\xe9\n"
