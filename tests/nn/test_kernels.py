"""Kernels are compiled once for a source, a compiler and a machine; where that fails it is said, once, and done
without."""

import subprocess
import warnings

import pytest
import torch

from layerskip_moe.nn import kernels
from layerskip_moe.nn.few_rows import linear


@pytest.fixture
def unloaded(tmp_path, monkeypatch):
    """As in a process that has not asked for kernels yet, with an empty cache; the cache's folder."""
    monkeypatch.setattr(kernels, "_loaded", None)
    monkeypatch.setenv("LAYERSKIP_MOE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kernels"


@pytest.fixture
def compilations(monkeypatch, tmp_path):
    """The compilers that were started, in a list; what they make is a text, which is not loaded."""
    started = []

    def compile_(compiler, target):
        started.append(compiler)
        target.write_text("compiled")

    compiler = tmp_path / "a-compiler"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setattr(kernels, "_compile", compile_)
    return started


def a_compiler(tmp_path, monkeypatch, script):
    compiler = tmp_path / "broken-compiler"
    compiler.write_text("#!/bin/sh\n" + script)
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))


def test_compiled_once_and_kept(unloaded, compilations, capsys):
    library = kernels._library()
    assert library.parent == unloaded and library.read_text() == "compiled"
    assert "compiling kernels for this machine" in capsys.readouterr().err
    assert kernels._library() == library and len(compilations) == 1
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("changed", ["source", "flags", "torch", "processor", "compiler"])
def test_compiled_again_for_anything_that_matters(unloaded, compilations, monkeypatch, tmp_path, changed):
    sources = tmp_path / "cpp"
    sources.mkdir()
    (sources / "few_rows.cpp").write_text("one")
    monkeypatch.setattr(kernels, "_SOURCES", sources)
    first = kernels._library()
    if changed == "source":
        (sources / "few_rows.cpp").write_text("two")
    elif changed == "flags":
        monkeypatch.setattr(kernels, "_FLAGS", (*kernels._FLAGS, "-g"))
    elif changed == "torch":
        monkeypatch.setattr(torch, "__version__", "2.99.0")
    elif changed == "processor":
        monkeypatch.setattr(kernels, "_processor", lambda: "another")
    else:
        a_compiler(tmp_path, monkeypatch, "exit 0\n")
    assert kernels._library() != first and len(compilations) == 2
    assert first.is_file()


def test_a_compilation_cut_short_leaves_nothing_that_looks_done(unloaded, compilations, monkeypatch):
    def interrupted(compiler, target):
        target.write_text("half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(kernels, "_compile", interrupted)
        with pytest.raises(KeyboardInterrupt):
            kernels._library()
    assert not [path for path in unloaded.iterdir() if path.suffix != ".lock"]
    assert kernels._library().read_text() == "compiled"


def failing(name, tmp_path, monkeypatch, cache):
    """What goes wrong, and what is said about it."""
    if name == "an error":
        a_compiler(tmp_path, monkeypatch, "echo 'a header is missing' >&2\nexit 1\n")
        return "a header is missing"
    if name == "nothing comes out":
        a_compiler(tmp_path, monkeypatch, "exit 0\n")
        return "No such file"
    if name == "no library comes out":
        a_compiler(tmp_path, monkeypatch, 'while [ "$1" != -o ]; do shift; done\necho hello > "$2"\n')
        return "few_rows"
    if name == "no compiler":
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.delenv("CXX", raising=False)
        return "no C\\+\\+ compiler was found"
    cache.parent.mkdir()
    cache.write_text("a file where the folder belongs")
    a_compiler(tmp_path, monkeypatch, "exit 1\n")
    return "exists|Not a directory"


@pytest.mark.parametrize(
    "name", ["an error", "nothing comes out", "no library comes out", "no compiler", "the cache cannot be written"]
)
@torch.no_grad()
def test_a_failure_is_said_once_and_the_plain_operations_serve(name, unloaded, tmp_path, monkeypatch):
    told = failing(name, tmp_path, monkeypatch, unloaded)
    x, weight = torch.randn(3, 5), torch.randn(4, 5)
    with pytest.warns(UserWarning, match=f"(?s)slower than it could be.*need g.. 11 or clang.*{told}"):
        assert not kernels.has_kernels()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not kernels.has_kernels()
        torch.testing.assert_close(linear(x, weight), x @ weight.T)


def test_those_who_do_without_compile_nothing(unloaded, compilations):
    with kernels.using_kernels(False):
        assert not kernels.has_kernels()
    assert compilations == [] and kernels._loaded is None and not unloaded.exists()


@pytest.mark.parametrize("inner", [True, False])
def test_wishes_nest_and_end(monkeypatch, inner):
    monkeypatch.setattr(kernels, "_loaded", True)
    with kernels.using_kernels(not inner):
        with kernels.using_kernels(inner):
            assert kernels.has_kernels() == inner
        assert kernels.has_kernels() == (not inner)
    with pytest.raises(subprocess.SubprocessError), kernels.using_kernels(False):
        raise subprocess.SubprocessError
    assert kernels.has_kernels()
