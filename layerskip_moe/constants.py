"""Hyperparameter constants at the top of a script, each of which the command line can override.

    n_layers: int = 8                       # a constant: an annotated name of the script
    override_constants(globals())           # now `--n_layers 4` or `--n_layers=4` wins

In a notebook cell there is no command line of ours, and the constants are what they say.
Knows nothing of what the constants mean. Next: `main.py`.
"""

import difflib
import sys
import types
import typing
from collections.abc import MutableMapping, Sequence
from typing import Any

import torch

from layerskip_moe.interrupts import Interrupted, is_first_process
from layerskip_moe.refusals import shown

_MOST_LETTERS = 1000  # of a sentence


def command_line(namespace: MutableMapping[str, Any]) -> list[str]:
    """The arguments of the script that `namespace` (its globals()) belongs to; none in a notebook cell, whose
    process has a command line, but not for us.

    From here on, and only in a script, a ValueError (or another error of ours that is one sentence) that nobody
    catches ends the process with that sentence and exit code 1, and Ctrl-C or SIGTERM with one and 130 or 143; --help
    prints the script's docstring.
    """
    if "__file__" not in namespace:
        return []
    sys.excepthook = _one_sentence
    if "--help" in sys.argv[1:]:
        print(namespace.get("__doc__"))
        sys.exit(0)
    return sys.argv[1:]


def given_constants(namespace: MutableMapping[str, Any]) -> set[str]:
    """The names that the command line gives a value, for constants that follow from others."""
    return {name for name, _ in _pairs(command_line(namespace))}


def default_device(namespace: MutableMapping[str, Any]) -> str:
    """The device the constants below it may depend on: --device where it is given, else a GPU where there is
    one, else the CPU. Raises ValueError for a device that is not there."""
    given = (value for name, value in _pairs(command_line(namespace)) if name == "device" and value is not None)
    return pick_device(next(given, None))


def pick_device(device: str | None) -> str:
    """The device that was asked for; None: a GPU where there is one, else the CPU.

    Raises ValueError unless it is a CPU or CUDA device that is there. Others can hold tensors too, but not all that
    is computed: mps has no float64, meta no values.
    """
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.empty(0, device=device).device.type
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"device={shown(device)} is not to be had here; 'cpu' always is, 'cuda' with a GPU."
        ) from error
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"device={shown(device)} is not supported; 'cpu' always is, 'cuda' with a GPU.")
    return device


def user_error(error: BaseException) -> str | None:
    """The sentence for what a user can mend: a ValueError, a run that diverged, memory or a disk that ran out, a file
    or a package that is missing. None for anything else, which is a fault of ours and keeps its traceback."""
    if _is_out_of_memory(error):
        return "out of memory; lower batch_size, seq_len or d_model, or take a smaller checkpoint or dtype."
    if isinstance(error, ImportError) and "pip install" in str(
        error
    ):  # a package that is not there is no fault of ours
        return str(error)
    if isinstance(error, OSError):  # a file that is not there, a full disk
        where = "" if error.filename is None else f"{error.filename}: "
        return _readable(f"{where}{error.strerror or error}.")
    # A UnicodeError is a ValueError too, but no sentence of ours.
    if isinstance(error, ValueError | FloatingPointError) and not isinstance(error, UnicodeError):
        return _readable(str(error))
    return None


def _readable(sentence: str) -> str:
    """The sentence; of one that repeats what is longer than anyone reads, a path without end, both ends."""
    return sentence if len(sentence) <= _MOST_LETTERS else f"{sentence[:600]} ... {sentence[-400:]}"


def _is_out_of_memory(error: BaseException) -> bool:
    """On the CPU torch raises a RuntimeError like any other, told apart by its words."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    words = ("DefaultCPUAllocator", "can't allocate memory")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def override_constants(namespace: MutableMapping[str, Any], arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Give the annotated names of `namespace` the values the command line has for them.

    arguments: instead of the command line's, as for it: `--name value`, `--name=value`, or `--name` alone for
    True.
    Returns all constants, name to value, in the order in which they were written. Raises ValueError for an
    unknown name, a missing value, or one that is not of the constant's type.
    """
    kinds = typing.get_type_hints(types.SimpleNamespace(__annotations__=namespace.get("__annotations__", {})))
    # In a notebook other cells may have annotated names of their own, or deleted some.
    kinds = {name: kind for name, kind in kinds.items() if name in namespace and _is_plain(kind)}
    for name, text in _pairs(command_line(namespace) if arguments is None else arguments):
        if name not in kinds:
            close = difflib.get_close_matches(name, kinds, n=1)
            advice = f"did you mean --{close[0]}?" if close else f"they are {', '.join(kinds)}."
            raise ValueError(f"--{name} is not one of the constants; {advice}")
        if text is None and kinds[name] is not bool:
            raise ValueError(f"--{name} has no value; constants are given as --name value.")
        namespace[name] = True if text is None else _parse(name, text, kinds[name])
    return {name: namespace[name] for name in kinds}


def _choices(kind: Any) -> tuple[Any, ...]:
    return typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)


def _is_plain(kind: Any) -> bool:
    plain = (int, float, bool, str, type(None))
    return all(choice in plain or typing.get_origin(choice) is typing.Literal for choice in _choices(kind))


def _pairs(arguments: Sequence[str]) -> list[tuple[str, str | None]]:
    """(name, value) of each argument; the value is None for a name alone."""
    pairs: list[tuple[str, str | None]] = []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise ValueError(f"{shown(word)} is not understood; constants are given as --name value.")
        name, equals, value = word[2:].partition("=")
        if equals:
            pairs.append((name, value))
        elif rest and not rest[0].startswith("--"):
            pairs.append((name, rest.pop(0)))
        else:
            pairs.append((name, None))
    return pairs


def _parse(name: str, text: str, kind: Any) -> Any:
    choices = _choices(kind)
    if text == "None" and type(None) in choices:
        return None
    words = {"True": True, "False": False, "true": True, "false": False}
    for choice in choices:
        if choice is bool and text in words:
            return words[text]
        if choice is str:
            return text
        if typing.get_origin(choice) is typing.Literal and text in typing.get_args(choice):
            return text
        if choice in (int, float):
            try:
                return choice(text)
            except ValueError:
                continue
    raise ValueError(f"--{name} {text} does not fit: {name} is {' or '.join(map(_describe, choices))}.")


def _describe(kind: Any) -> str:
    if typing.get_origin(kind) is typing.Literal:
        return " or ".join(map(repr, typing.get_args(kind)))
    return {bool: "True or False", int: "a whole number", float: "a number", type(None): "None"}.get(kind, str(kind))


def _one_sentence(kind: type[BaseException], error: BaseException, trace: types.TracebackType | None) -> None:
    if isinstance(error, KeyboardInterrupt):
        if is_first_process():
            # Not to sys.stderr, which torch.distributed's hook, around this one, keeps in memory until it is too late.
            print(f"\n{str(error) or 'interrupted'}", file=sys.__stderr__, flush=True)
        sys.exit(error.exit_status if isinstance(error, Interrupted) else 130)
    told = user_error(error)
    if told is None:
        sys.__excepthook__(kind, error, trace)
    else:
        print(f"error: {told}", file=sys.stderr)
