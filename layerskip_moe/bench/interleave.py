"""Timing several runs side by side: warm-up, turns that rotate, medians, ratios within a repeat.

Knows nothing of what runs. Next: `decode.py`, `prefill.py`, `train.py`, which give it runs.
"""

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from layerskip_moe.generation.generate import now


def interleave(
    runs: Mapping[str, Callable[[], Any]], repeats: int, *, warm_up: int = 1, describe: str = "timing"
) -> dict[str, list[Any]]:
    """What each run returned, repeat by repeat.

    Every run first goes warm_up times unheard. Then in each repeat all go once, the order rotated from repeat to
    repeat so that each stands as often early as late: drift of the machine hits all about alike, and a ratio compares
    runs of one repeat. Raises ValueError for repeats below 1.
    """
    if repeats < 1:
        raise ValueError(f"repeats={repeats} must be 1 or more.")
    names = list(runs)
    results: dict[str, list[Any]] = {name: [] for name in names}
    with tqdm(total=(warm_up + repeats) * len(names), desc=describe, leave=False) as bar:
        for name in names * warm_up:
            runs[name]()
            bar.update()
        for repeat in range(repeats):
            for name in in_turn(names, repeat, repeats):
                results[name].append(runs[name]())
                bar.update()
    return results


def in_turn(names: Sequence[str], repeat: int, repeats: int) -> list[str]:
    """The names in the order of one of the repeats, rotated from one to the next so that over all of them each stands
    as often early as late, as far as there are repeats enough."""
    turn = repeat * max(1, len(names) // repeats) % len(names)
    return [*names[turn:], *names[:turn]]


def seconds_of(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call, until the device has finished it."""
    start = now(device)
    work()
    return now(device) - start


def summary(samples: Sequence[float]) -> dict[str, Any]:
    """{"median", "quartiles": [first, third], "samples"}, ready for JSON."""
    return {
        "median": median(samples),
        "quartiles": np.quantile(samples, [0.25, 0.75]).tolist(),
        "samples": list(samples),
    }


def ratio(samples: Sequence[float], others: Sequence[float]) -> dict[str, Any]:
    """The summary of samples / others, repeat by repeat."""
    return summary([one / other for one, other in zip(samples, others, strict=True)])
