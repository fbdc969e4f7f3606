"""The command line's help is made of class docstrings: each field of a configuration has a text of its own there."""

import dataclasses

import docstring_parser  # what tyro reads docstrings with
import pytest
import tyro

from layerskip_moe.generation.sampling import Sampling
from layerskip_moe.nn import ModelConfig
from layerskip_moe.training import TrainConfig


def words(text):
    """Without the frame and the line breaks of a help page."""
    return " ".join(text.replace("│", " ").split())


@pytest.mark.parametrize("config", [ModelConfig, TrainConfig, Sampling])
def test_every_field_has_a_help_text_that_help_shows(config, capsys, monkeypatch):
    texts = {entry.arg_name: entry.description for entry in docstring_parser.parse(config.__doc__).params}
    assert list(texts) == [field.name for field in dataclasses.fields(config)]
    assert [name for name, text in texts.items() if not text] == []
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as left:
        tyro.cli(config, args=["--help"])
    assert left.value.code == 0
    shown = words(capsys.readouterr().out)
    assert [name for name, text in texts.items() if words(text) not in shown] == []
