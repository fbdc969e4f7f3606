"""The command line's help is made of class docstrings: each field of a configuration has a text of its own there."""

import dataclasses
import typing

import docstring_parser  # what tyro reads docstrings with
import pytest

from layerskip_moe.ablation import DecodingConfig, MeasureConfig, Variant
from layerskip_moe.analysis.plan import Decoding
from layerskip_moe.bench.communication import CommunicationSettings
from layerskip_moe.bench.networks import Network
from layerskip_moe.cli import (
    ablate,
    bench,
    bench_communication,
    bench_policies,
    bench_speculation,
    calibrate,
    evaluate,
    generate,
    options,
    plan,
    report,
    trace,
    train,
)
from layerskip_moe.cli.flags import fields_of, parse
from layerskip_moe.cli.strategies import StrategyName, strategy_flags
from layerskip_moe.generation import (
    Autoregressive,
    EarlyExit,
    LayerSkipping,
    LookupSpeculative,
    PromptLookup,
    SelfSpeculative,
    SparseSpeculative,
    Speculative,
)
from layerskip_moe.generation.sampling import Sampling
from layerskip_moe.nn import ModelConfig
from layerskip_moe.study import StudyConfig
from layerskip_moe.training import TrainConfig

COMMANDS = [
    options.Text,
    ablate.Options,
    calibrate.Options,
    train.Options,
    generate.Options,
    evaluate.Options,
    plan.Options,
    report.Options,
    bench.Options,
    bench_policies.Options,
    bench_communication.Options,
    CommunicationSettings,
    bench_speculation.Options,
    trace.Options,
]
CONFIGS = [
    ModelConfig,
    TrainConfig,
    Sampling,
    StudyConfig,
    MeasureConfig,
    DecodingConfig,
    Network,
    Decoding,
    *bench.SETTINGS.values(),
    *COMMANDS,
]
STRATEGIES = [
    Autoregressive,
    EarlyExit,
    LayerSkipping,
    LookupSpeculative,
    PromptLookup,
    SelfSpeculative,
    SparseSpeculative,
    Speculative,
]
FLAGS = {name: strategy_flags(name) for name in typing.get_args(StrategyName)}


def texts_of(config):
    return {entry.arg_name: entry.description for entry in docstring_parser.parse(config.__doc__).params}


def words(text):
    """Without the frame and the line breaks of a help page."""
    return " ".join(text.replace("│", " ").split())


def help_of(config, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as left:
        parse("prog", None, {"options": config}, ["--help"])
    assert left.value.code == 0
    return words(capsys.readouterr().out)


@pytest.mark.parametrize("config", [*CONFIGS, Variant, *STRATEGIES, FLAGS["speculative"]])
def test_every_field_has_a_help_text(config):
    texts = texts_of(config)
    assert list(texts) == [field.name for field in dataclasses.fields(config)]
    assert [name for name, text in texts.items() if not text] == []


@pytest.mark.parametrize("config", CONFIGS)
def test_help_shows_every_fields_text(config, capsys, monkeypatch):
    shown = help_of(fields_of(config), capsys, monkeypatch)
    assert [name for name, text in texts_of(config).items() if words(text) not in shown] == []


@pytest.mark.parametrize("name", FLAGS)
def test_help_of_a_strategy_shows_every_flags_text(name, capsys, monkeypatch):
    """A flag's own text, where the shell takes something else than Python does."""
    flags = FLAGS[name]
    texts = texts_of(flags)
    hints = typing.get_type_hints(flags, include_extras=True)
    for field, hint in hints.items():
        texts[field] = hint.__metadata__[0].help if typing.get_origin(hint) is typing.Annotated else texts[field]
    shown = help_of(flags, capsys, monkeypatch)
    assert [field for field in hints if words(texts[field]) not in shown] == []
    assert "a function of" not in shown  # which a shell cannot say
