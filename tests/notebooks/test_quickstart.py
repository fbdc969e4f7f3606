"""notebooks/quickstart.ipynb from its first cell to its last, small; what is stored of it; and its install cell."""

import ast
import base64
import importlib.metadata
import importlib.util
import io
import math
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "notebooks" / "quickstart.ipynb"
SMALL = """
dataset, vocab_size, seq_len = "text", 280, 16
n_layers, d_model, d_ff, num_experts = 3, 16, 16, 4
max_steps, batch_size = 10, 4
exit_layer, draft_length, left_out = 1, 2, (1,)
num_prompts, prompt_length, max_new_tokens = 2, 6, 8
max_windows, thresholds = 8, (0.1, 0.5)
device = "cpu"
"""


@pytest.fixture
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def code_of(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def cell_of(notebook, name):
    return next(cell for cell in notebook.cells if cell.id == name)


def shown(cell, kind):
    return [output.data[kind] for output in cell.outputs if kind in output.get("data", {})]


def names_in(cell):
    return [node for node in ast.walk(ast.parse(cell.source)) if isinstance(node, ast.Name)]


def repository():
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Repository"]


class TestExecuted:
    def test_every_cell_runs_and_every_picture_appears(self, notebook, tmp_path, monkeypatch, cache_with_kernels):
        from matplotlib.image import imread
        from nbclient import NotebookClient

        (tmp_path / "text").mkdir()
        for index in range(4):
            (tmp_path / "text" / f"{index}.txt").write_text(f"The {index} brown foxes jump over lazy dogs.\n" * 60)
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        monkeypatch.setenv("PYTHONPATH", str(ROOT))
        for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR"):  # no settings or kernels of the user's
            monkeypatch.setenv(name, str(tmp_path / name))
        cell_of(notebook, "parameters").source += SMALL

        NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()

        assert cell_of(notebook, "install").outputs == []
        for name in ("exits", "rules", "experts", "choice"):
            (picture,) = shown(cell_of(notebook, name), "image/png")
            pixels = imread(io.BytesIO(base64.b64decode(picture)))
            assert min(pixels.shape[:2]) > 200 and np.ptp(pixels[..., :3]) > 0.5, name
        (table,) = shown(cell_of(notebook, "decode"), "text/markdown")
        rows = [[field.strip() for field in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
        assert [row[0] for row in rows] == ["plain", "self-speculative", "dynamic early exit", "layer skipping"]
        assert [row[4] for row in rows[:2]] == ["2 of 2", "2 of 2"]
        assert [row[3] for row in (rows[0], rows[1], rows[3])] == ["3.0", "3.0", "2.0"]
        for name in ("text", "continuation", "rule", "typical"):
            assert any(output.get("name") == "stdout" for output in cell_of(notebook, name).outputs), name

    def test_the_rule_written_in_it_is_one_minus_the_normalised_entropy(self, notebook):
        names = {"math": math}
        exec(cell_of(notebook, "rule").source.split("\n\n\n")[0], names)
        logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [60.0, 0.0, 0.0, 0.0], [math.log(2), math.log(2), -1e4, -1e4]])
        found = names["certainty"](torch.zeros(3, 2), torch.zeros(3, 2), logits)
        torch.testing.assert_close(found, torch.tensor([0.0, 1.0, 0.5]))


class TestStored:
    def test_it_is_valid_and_without_noise(self, notebook):
        nbformat.validate(notebook)
        assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
        assert set(notebook.metadata) == {"kernelspec", "language_info"}
        assert (notebook.metadata.kernelspec.name, notebook.metadata.language_info) == ("python3", {"name": "python"})
        for cell in code_of(notebook):
            assert cell.outputs == [] and cell.execution_count is None
        assert {cell.id: cell.metadata for cell in notebook.cells if cell.metadata} == {
            "parameters": {"tags": ["parameters"]}
        }
        text = NOTEBOOK.read_text(encoding="utf-8")
        assert text == nbformat.writes(notebook).rstrip("\n") + "\n"

    def test_the_badge_opens_this_file_of_the_repository(self, notebook):
        first = notebook.cells[0]
        assert first.cell_type == "markdown"
        place = repository().removeprefix("https://github.com/")
        path = NOTEBOOK.relative_to(ROOT).as_posix()
        assert f"](https://colab.research.google.com/github/{place}/blob/main/{path})" in first.source
        assert set(re.findall(r"github\.com/([\w.-]+/[\w.-]+)", NOTEBOOK.read_text(encoding="utf-8"))) == {place}

    def test_every_parameter_is_read(self, notebook):
        """A constant that nothing reads would be turned in vain."""
        parameters = cell_of(notebook, "parameters")
        told = {node.id for node in names_in(parameters) if isinstance(node.ctx, ast.Store)}
        later = code_of(notebook)[code_of(notebook).index(parameters) + 1 :]
        read = {node.id for cell in later for node in names_in(cell) if isinstance(node.ctx, ast.Load)}
        assert {"dataset", "n_layers", "max_steps", "threshold"} <= told <= read


class TestInstallCell:
    @pytest.fixture
    def run_cell(self, notebook, monkeypatch):
        """Run it where only `present` can be imported; the commands it ran, and sys.path's first entry after."""

        def run(*present):
            commands = []
            monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name in present else None)
            monkeypatch.setattr(importlib.metadata, "version", {"torch": "2.11.0+cu128", "numpy": "2.1.3"}.__getitem__)
            monkeypatch.setattr(subprocess, "run", lambda command, check: commands.append((command, check)))
            monkeypatch.setattr(sys, "path", ["untouched"])
            exec(compile(code_of(notebook)[0].source, "install", "exec"), {})
            return commands, sys.path[0]

        return run

    def test_it_does_nothing_where_the_library_is_there(self, run_cell):
        assert run_cell("layerskip_moe", "torch", "numpy") == ([], "untouched")

    def test_elsewhere_it_installs_the_repository_and_keeps_the_torch_it_finds(self, run_cell, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        commands, path = run_cell("torch", "numpy")
        pip = [sys.executable, "-m", "pip", "install", "--quiet"]
        assert commands == [([*pip, f"git+{repository()}", "torch==2.11.0+cu128", "numpy==2.1.3"], True)]
        assert path == "untouched"

    def test_without_torch_there_is_nothing_to_keep(self, run_cell, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        ((command, _),), _ = run_cell()
        assert command[-1] == f"git+{repository()}"

    def test_in_a_clone_it_installs_that_clone(self, run_cell, tmp_path, monkeypatch):
        clone = tmp_path / "clone"
        (clone / "notebooks").mkdir(parents=True)
        (clone / "layerskip_moe").mkdir()
        (clone / "layerskip_moe" / "__init__.py").touch()
        monkeypatch.chdir(clone / "notebooks")
        ((command, _),), path = run_cell("torch")
        assert command[5:] == ["--editable", str(clone), "torch==2.11.0+cu128"]
        assert path == str(clone)
