"""Constants of a script and the command line that overrides them."""

import os
import subprocess
import sys
from typing import Literal

import pytest
import torch

from layerskip_moe.constants import default_device, given_constants, override_constants, pick_device, user_error


def script_globals():
    return {
        "__file__": "script.py",
        "__annotations__": {
            "layers": int,
            "rate": float,
            "steps": int | None,
            "name": str,
            "resume": bool,
            "kind": Literal["a", "b"],
        },
        "layers": 8,
        "rate": 0.5,
        "steps": None,
        "name": "x",
        "resume": False,
        "kind": "a",
        "gpu": False,
    }


@pytest.fixture(autouse=True)
def excepthook(monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # override_constants replaces it


@pytest.mark.parametrize(
    ("arguments", "name", "value"),
    [
        (["--layers", "4"], "layers", 4),
        (["--layers=4"], "layers", 4),
        (["--rate", "1"], "rate", 1.0),
        (["--rate", "-1e-3"], "rate", -0.001),
        (["--steps", "10"], "steps", 10),
        (["--steps", "10", "--steps", "None"], "steps", None),
        (["--name", "12"], "name", "12"),
        (["--name", "a=b"], "name", "a=b"),
        (["--resume", "true"], "resume", True),
        (["--resume"], "resume", True),
        (["--resume", "--layers", "8"], "resume", True),
        (["--kind", "b"], "kind", "b"),
    ],
)
def test_a_constant_takes_the_value_given_in_its_own_type(arguments, name, value):
    namespace = script_globals()
    constants = override_constants(namespace, arguments)
    assert namespace[name] == constants[name] == value
    assert type(namespace[name]) is type(value)
    assert list(constants) == list(namespace["__annotations__"])  # "gpu" is no constant
    untouched = set(constants) - {name}
    assert all(constants[other] == script_globals()[other] for other in untouched)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--layer", "4"], "--layer is not one of the constants"),
        (["--gpu", "True"], "--gpu is not one of the constants"),
        (["--layers", "4.5"], "layers is a whole number"),
        (["--layers", "True"], "layers is a whole number"),
        (["--rate", "fast"], "rate is a number"),
        (["--steps", "many"], "steps is a whole number or None"),
        (["--resume", "1"], "resume is True or False"),
        (["--kind", "c"], "kind is 'a' or 'b'"),
        (["--layers"], "--layers has no value"),
        (["--layers", "--rate", "1"], "--layers has no value"),
        (["layers", "4"], "'layers' is not understood"),
        (["-layers", "4"], "'-layers' is not understood"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(arguments, sentence):
    namespace = script_globals()
    with pytest.raises(ValueError, match=sentence):
        override_constants(namespace, arguments)
    assert {name: namespace[name] for name in script_globals()} == script_globals()


def test_a_notebook_has_no_command_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json", "--layers", "2"])
    namespace = script_globals()
    del namespace["__file__"]
    hook = sys.excepthook
    assert override_constants(namespace)["layers"] == 8
    assert sys.excepthook is hook


def test_the_device_is_known_before_the_constants_that_depend_on_it(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script.py", "--layers", "2", "--device", "cpu:0"])
    assert default_device(script_globals()) == "cpu:0"
    assert given_constants(script_globals()) == {"layers", "device"}


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    for device in ("banana", "cuda:99", "mps", "meta"):
        monkeypatch.setattr(sys, "argv", ["script.py", "--device", device])
        with pytest.raises(ValueError, match=f"device='{device}'"):
            default_device(script_globals())
        with pytest.raises(ValueError, match=f"device='{device}'"):
            pick_device(device)


@pytest.mark.parametrize(("there_is_a_gpu", "device"), [(True, "cuda"), (False, "cpu")])
def test_without_a_wish_a_gpu_is_taken_where_there_is_one(monkeypatch, there_is_a_gpu, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there_is_a_gpu)
    monkeypatch.setattr(sys, "argv", ["script.py", "--layers", "2"])
    assert pick_device(None) == default_device(script_globals()) == device
    assert pick_device("cpu") == "cpu"


def test_a_second_run_of_a_cell_sees_only_its_constants():
    namespace = script_globals()
    del namespace["__file__"]
    namespace["__annotations__"] = namespace["__annotations__"] | {"seconds": dict[str, float], "gone": int}
    namespace["seconds"] = {"text": 1.0}
    assert list(override_constants(namespace)) == list(script_globals()["__annotations__"])


OUT_OF_MEMORY = "out of memory; lower batch_size, seq_len or d_model, or take a smaller checkpoint or dtype."


def test_a_script_ends_with_one_sentence_and_exit_code_1(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from layerskip_moe.constants import override_constants\n"
        "layers: int = 8\n"
        "override_constants(globals())\n"
        "if layers == 3: raise ValueError('layers=3 is odd.')\n"
        "if layers == 5: raise RuntimeError('ours')\n"
        "if layers == 7: raise MemoryError\n"
        "if layers == 9: open('nowhere/x')\n"
        "if layers == 2: raise KeyboardInterrupt\n"
        "if layers == 15:\n"
        "    from layerskip_moe.interrupts import Interrupted\n"
        "    import torch.distributed as dist\n"
        "    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)  # has a hook of its own\n"
        "    raise Interrupted('saved, go on with --resume.', 15)\n"
        "print(layers)\n"
    )

    def run(*arguments, **environment):
        line = [sys.executable, script, *arguments]
        return subprocess.run(line, capture_output=True, text=True, env=os.environ | environment)

    done = run("--layers", "3")
    assert (done.returncode, done.stderr) == (1, "error: layers=3 is odd.\n")
    full = run("--layers", "7")
    assert (full.returncode, full.stderr) == (1, f"error: {OUT_OF_MEMORY}\n")
    missing = run("--layers", "9")
    assert (missing.returncode, missing.stderr) == (1, "error: nowhere/x: No such file or directory.\n")
    for layers, status, said in ((2, 130, "interrupted"), (15, 143, "saved, go on with --resume.")):
        stopped = run("--layers", str(layers))
        assert (stopped.returncode, stopped.stderr) == (status, f"\n{said}\n")
    another = run("--layers", "15", RANK="1")  # of several that are all told to stop
    assert (another.returncode, another.stderr) == (143, "")
    ours = run("--layers=5")
    assert ours.returncode == 1 and "Traceback" in ours.stderr  # a fault of ours is not dressed up as the user's


def test_memory_that_ran_out_is_told_as_such():
    with pytest.raises(RuntimeError) as refused:
        torch.empty(2**46)  # 256 TiB, more than an address can name
    for error in (refused.value, torch.OutOfMemoryError("CUDA out of memory."), MemoryError()):
        assert user_error(error) == OUT_OF_MEMORY
    for error in (RuntimeError("x"), KeyError("x"), UnicodeDecodeError("utf-8", b"\xff", 0, 1, "x")):
        assert user_error(error) is None
