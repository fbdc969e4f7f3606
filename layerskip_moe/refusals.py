"""What refusals of a user's input share: values as a sentence shows them, and the checks that many of them begin with.

Knows nothing of what is refused, nor why. Used by every room that takes settings, or reads files of others.
"""

import reprlib


def shown(value: object) -> str:
    """A value as a sentence shows it: as `repr` does, the middle of what is long left out."""
    short = reprlib.Repr()
    short.maxlevel = 3
    short.maxlist = short.maxtuple = short.maxdict = short.maxset = 12
    short.maxstring = short.maxother = short.maxlong = 120
    told = short.repr(value)
    return told if len(told) <= 240 else f"{told[:160]}...{told[-60:]}"


def shortened(text: str) -> str:
    """A text that a file or a library gives, which may be of any letters and any length: as `shown`, without quotes."""
    return shown(text)[1:-1]


def require_whole(name: str, value: object, at_least: int, at_most: int | None = None) -> int:
    """The value, a whole number; ValueError, naming it, where it is not one, too small, or too large for a network."""
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise ValueError(f"{name}={shown(value)} must be a whole number, {at_least} or more.")
    if at_most is not None and value > at_most:
        raise ValueError(f"{name}={shown(value)} is more than any network has; it must be {at_most} or less.")
    return value


def require_index(name: str, value: object) -> None:
    """Raise ValueError, naming the argument, for what cannot count: fractions, truth values, texts, lists."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise ValueError(f"{name}={shown(value)} must be a whole number.")


def require_number(name: str, value: object) -> None:
    """Raise ValueError, naming the field, for what is no number, NaN, or too large for a float64."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not -1e308 < value < 1e308:  # NaN is not either
        raise ValueError(f"{name}={shown(value)} must be a finite number.")
