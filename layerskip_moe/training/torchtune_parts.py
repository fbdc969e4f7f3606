"""The parts of torchtune that LayerSkip training uses: its schedule shapes.

The only file of the package that imports torchtune, and only when a function is called: torchtune pulls in
torchao and datasets, which takes seconds and prints import warnings that nobody can act on. Only
`torchtune.modules` is touched; `torchtune.training` no longer imports beside current versions of torchao.

Knows nothing of layers or steps. Next: `layer_dropout.py` turns these shapes into dropout rates.
"""

import functools
from collections.abc import Callable
from typing import Literal, get_args

from layerskip_moe.quiet_import import quiet_import

# torchtune's STEP is left out: it is declared there but has no formula, so it raises KeyError.
Scale = Literal["uniform", "exp", "linear", "log", "sin", "sigmoid"]
SCALES = get_args(Scale)


@functools.cache
def _get_scale() -> Callable[[Scale, int, int], float]:
    try:
        with quiet_import():
            from torchtune.modules.layer_dropout import ScaleType, get_scale
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"layer dropout takes its schedules from torchtune, which could not be imported ({error}); "
            "`pip install 'torchtune>=0.6.1' 'torchao>=0.15,<0.18'` gives versions that work together"
        ) from error
    return lambda kind, period, value: get_scale(ScaleType(kind), period, value)


def check_scale(kind: str) -> None:
    """Raise ValueError unless `kind` is one of SCALES; imports nothing."""
    if kind not in SCALES:
        raise ValueError(f"unknown schedule {kind!r}: choose one of {', '.join(SCALES)}")


def scale(kind: Scale, period: int, value: int) -> float:
    """A schedule's height at `value`, rising from 0 at value 0 to 1 at value `period`.

    kind, with x = value / period: "exp" 2^x - 1 (LayerSkip, arXiv 2404.16710), "linear" x,
    "log" ln(value + 1) / ln(period + 1), "sin" sin(pi x / 2), "sigmoid" 1 / (1 + e^(-10 (x - 0.5))), which
    starts at 0.0067 rather than 0, and "uniform", 1 everywhere.
    period: at least 1; value: 0 or more, and from `period` on the height is 1.
    Raises ValueError for an unknown kind or a number out of range, ImportError where torchtune is missing.
    """
    check_scale(kind)
    if period < 1 or value < 0:
        raise ValueError(f"a schedule needs period >= 1 and value >= 0, got period={period}, value={value}")
    return _get_scale()(kind, period, value)
