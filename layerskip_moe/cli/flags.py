"""Dataclasses to flags: `n_layers: int = 8` of a dataclass is `--n-layers 4` in the shell, its docstring the help.

tyro does the work; this file asks it for flat names and turns what it refuses into one sentence.
Knows nothing of what the options mean. Next: `train.py`, which uses all of it.
"""

import contextlib
import dataclasses
import difflib
import io
import re
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import tyro

_FRAME = re.compile("[\u2500-\u257f]+")  # box-drawing characters


def fields_of(kind: type, *, without: Sequence[str] = (), **changed: tuple[Any, Any]) -> type:
    """A dataclass with the fields that `kind` is built from, their defaults and help, but none of its checks.

    without: fields that no word can say; they keep their default. changed: field name -> (type, default), where the
    shell's differ. Without checks, because a value may depend on
    what is known only later (a vocabulary, a number of layers), and because what `kind` itself refuses, when it is
    built from these, then reaches the user in its own words.
    """
    hints = typing.get_type_hints(kind)
    columns = []
    for field in dataclasses.fields(kind):
        if field.name in without or not field.init:
            continue
        hint, default = changed.get(field.name, (hints[field.name], field.default))
        columns.append((field.name, hint, dataclasses.field(default=default, default_factory=field.default_factory)))
    return dataclasses.make_dataclass(kind.__name__, columns, kw_only=True, namespace={"__doc__": kind.__doc__})


def parse(command: str, description: str | None, groups: Mapping[str, type], arguments: Sequence[str]) -> list[Any]:
    """One instance of every group's dataclass, in order, from the arguments of the shell.

    groups: title in the help -> dataclass; all their fields are flags side by side, so no name may be in two.
    Raises ValueError, in one sentence, for a flag that does not exist, one that is missing, and a value that does
    not fit. --help (or -h) prints the help and raises SystemExit(0).
    """
    hints = {_flag(name): hint for kind in groups.values() for name, hint in typing.get_type_hints(kind).items()}
    if not {"--help", "-h"} & set(arguments):
        _check_names(command, groups, hints, arguments)
    together: Any = dataclasses.make_dataclass("Options", [(title, kind) for title, kind in groups.items()])
    refusal = io.StringIO()
    try:
        with contextlib.redirect_stderr(refusal):
            options, unknown = tyro.cli(
                together,
                args=list(arguments),
                prog=command,
                description=description,
                config=(tyro.conf.OmitArgPrefixes,),
                return_unknown_args=True,
            )
    except SystemExit as end:
        if not end.code:
            raise
        raise ValueError(_refused(refusal.getvalue(), hints, arguments)) from None
    if unknown:
        raise ValueError(f"{unknown[0]!r} belongs to no option; options are given as --name value.")
    return [getattr(options, title) for title in groups]


def value_of(flag: str, arguments: Sequence[str]) -> str | None:
    """What the arguments give one flag (the last where there are several), before anything is parsed; None where it
    is not given, or has no value."""
    given = [_values(place, arguments) for place, word in enumerate(arguments) if _flag_in(word) == flag]
    return " ".join(given[-1]) if given and given[-1] else None


def _flag(name: str) -> str:
    """n_layers, --n_layers or --n-layers -> --n-layers."""
    return "--" + name.removeprefix("--").replace("_", "-")


def _flag_in(word: str) -> str | None:
    """--n_layers=4 -> --n-layers; None for a word that is no flag."""
    return _flag(word.partition("=")[0]) if word.startswith("--") else None


def _values(place: int, arguments: Sequence[str]) -> list[str]:
    """The words after the flag at arguments[place] that are its values."""
    _, equals, value = arguments[place].partition("=")
    if equals:
        return [value]
    rest = arguments[place + 1 :]
    end = next((i for i, word in enumerate(rest) if word.startswith("--")), len(rest))
    return list(rest[:end])


def _check_names(command: str, groups: Mapping[str, type], hints: Mapping[str, Any], arguments: Sequence[str]) -> None:
    """Raise ValueError for a flag that does not exist, and for one that has no default and is not given."""
    known = {*hints, *(f"--no-{flag[2:]}" for flag, hint in hints.items() if hint is bool)}
    given = [flag for flag in map(_flag_in, arguments) if flag is not None]
    for flag in given:
        if flag not in known:
            close = difflib.get_close_matches(flag, known, n=1, cutoff=0.7)
            advice = f"did you mean {close[0]}?" if close else f"`{command} --help` lists those there are."
            raise ValueError(f"{flag} is no option of {command}; {advice}")
    for kind in groups.values():
        for field in dataclasses.fields(kind):
            required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
            if required and _flag(field.name) not in given:
                raise ValueError(f"{command} needs {_flag(field.name)}; `{command} --help` says what it is.")


def _refused(box: str, hints: Mapping[str, Any], arguments: Sequence[str]) -> str:
    """One sentence for what tyro printed in a box: it names the flag; what was given, and what fits, are known."""
    named = re.search(r"(?<!-)--[a-z][\w-]*", box)
    if named is None or named[0] not in hints:
        return " ".join(_FRAME.sub(" ", box).split())  # in tyro's own words, whatever it was
    given = value_of(named[0], arguments)
    if given is None:
        return f"{named[0]} has no value; it is {_describe(hints[named[0]])}."
    return f"{named[0]} {given} does not fit: it is {_describe(hints[named[0]])}."


def _describe(hint: Any) -> str:
    """int | None -> 'a whole number or None'."""
    arguments = typing.get_args(hint)
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        return " or ".join(map(repr, arguments))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_describe, arguments))
    if origin is tuple:
        return f"any number of values, each {_describe(arguments[0])}"
    names = {bool: "True or False", int: "a whole number", float: "a number", type(None): "None", str: "text"}
    return names.get(hint, str(hint))
