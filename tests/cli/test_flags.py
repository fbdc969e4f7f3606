"""Dataclasses to flags: what is parsed, and the one sentence for what is not."""

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

import pytest
from tyro.conf import arg

from layerskip_moe import ModelConfig, TrainConfig
from layerskip_moe.cli import generate as generate_command
from layerskip_moe.cli.flags import _refused, fields_of, parse, value_of
from layerskip_moe.cli.strategies import StrategyName, strategy_flags
from layerskip_moe.cli.train import Options, Text
from layerskip_moe.generation import Autoregressive, EarlyExit, LayerSkipping, Sampling, SelfSpeculative, Speculative


@dataclass(frozen=True)
class Where:
    """Where it goes.

    Attributes:
        folder: which folder
        keep_going: whether to go on
    """

    folder: str
    keep_going: bool = False


@dataclass(frozen=True)
class How:
    """How it is done.

    Attributes:
        steps: how many
        shape: which shape
        layers: which layers, or all
    """

    steps: int | None = 3
    shape: Literal["round", "square"] = "round"
    layers: Literal["all"] | tuple[int, ...] = "all"

    def __post_init__(self):
        raise ValueError("How is never built by the parser.")


def parsed(*arguments):
    return parse("prog go", "What it does.", {"where": Where, "how": fields_of(How)}, arguments)


def test_fields_of_every_group_are_flags_side_by_side():
    where, how = parsed("--folder", "x y", "--steps=4", "--keep_going", "--layers", "0", "2")
    assert where == Where("x y", keep_going=True)
    assert vars(how) == {"steps": 4, "shape": "round", "layers": (0, 2)}
    assert vars(parsed("--folder", "x", "--steps", "None")[1])["steps"] is None


def test_a_changed_field_has_its_own_type_default_and_help(capsys):
    kind = fields_of(How, steps=(Annotated[float, arg(help="how long")], 0.5))
    assert vars(parse("prog", None, {"how": kind}, [])[0])["steps"] == 0.5
    with pytest.raises(SystemExit):
        parse("prog", None, {"how": kind}, ["--help"])
    shown = capsys.readouterr().out
    assert "how long" in shown and "how many" not in shown and "which shape" in shown


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "prog go needs --folder; `prog go --help` says what it is."),
        (["--folder"], "--folder has no value; it is text."),
        (["--folder", "x", "--stepps", "4"], "--stepps is no option of prog go; did you mean --steps?"),
        (["--floder", "x"], "--floder is no option of prog go; did you mean --folder?"),
        (["--folder", "x", "--quux=1"], "--quux is no option of prog go; `prog go --help` lists those there are."),
        (["--folder", "x", "--steps", "4.5"], "--steps 4.5 does not fit: it is a whole number or None."),
        (["--folder", "x", "--steps=many"], "--steps many does not fit: it is a whole number or None."),
        (["--folder", "x", "--shape", "oval"], "--shape oval does not fit: it is 'round' or 'square'."),
        (
            ["--folder", "x", "--layers", "0", "b"],
            "--layers 0 b does not fit: it is 'all' or any number of values, each a whole number.",
        ),
        (["--folder", "x", "y"], "'y' belongs to no option; options are given as --name value."),
        (["x", "--folder", "y"], "'x' belongs to no option; options are given as --name value."),
    ],
)
def test_a_mistake_is_one_sentence(capsys, arguments, sentence):
    with pytest.raises(ValueError) as error:
        parsed(*arguments)
    assert str(error.value) == sentence
    assert capsys.readouterr() == ("", "")


def test_what_tyro_refuses_without_a_flag_is_told_without_its_frame():
    box = "╭─ Value error ───╮\n│ Both of these │\n│ ───────────── │\n│ cannot be.    │\n╰───────────────╯\n"
    assert _refused(box, {}, []) == "Value error Both of these cannot be."


def test_the_value_of_a_flag_is_found_before_parsing():
    assert value_of("--strategy", ["--prompt", "strategy", "--strategy", "a"]) == "a"
    assert value_of("--strategy", ["--strategy=a", "--strategy=b"]) == "b"
    assert value_of("--strategy", ["--strategy"]) is None
    assert value_of("--strategy", ["a"]) is None


def names(*kinds):
    return [field.name for kind in kinds for field in dataclasses.fields(kind) if field.init]


def test_no_name_is_in_two_groups_of_a_command():
    groups = [(Options, Text, ModelConfig, TrainConfig)]
    groups += [(generate_command.Options, Sampling, strategy_flags(name)) for name in get_args(StrategyName)]
    for group in groups:
        assert len(set(names(*group))) == len(names(*group))


def test_strategies_have_all_their_fields_and_defaults_in_the_shell():
    kinds = (Autoregressive, SelfSpeculative, EarlyExit, LayerSkipping)
    shell_names = ("autoregressive", "self-speculative", "early-exit", "layer-skipping")
    for name, kind in zip(shell_names, kinds, strict=True):
        shell = [name.replace("draft_quantization", "draft_model") for name in names(strategy_flags(name))]
        assert shell == [name for name in names(kind) if name != "policy"]  # which is written in Python
    speculative = dataclasses.fields(Speculative)[1:], dataclasses.fields(strategy_flags("speculative"))[1:]
    assert [(f.name, f.default) for f in speculative[0]] == [(f.name, f.default) for f in speculative[1]]
