"""Where a training step's time goes: seconds for each part of it.

Knows nothing of what the parts do. Next: `run.py` and `losses.py`, which say where a part begins and ends;
`metrics.py`, which writes the seconds down.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Literal, get_args

import torch

Part = Literal["batches", "forward", "exit loss", "backward", "optimizer"]
PARTS: tuple[Part, ...] = get_args(Part)  # in the order of a step


class StepTimer:
    """Adds up the time between the beginning and the end of each `with timer.part("forward"):`.

    A GPU works on while Python runs ahead, so on CUDA a part lasts from one event to another in the device's
    own queue; a step waits for none of them, `mean_seconds` does. Elsewhere it is the clock, which on a
    device that also works on (mps) charges a part's work to the part that first waits for it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._seconds: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        self._events: list[tuple[Part, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def part(self, name: Part) -> Iterator[None]:
        """Count the time of what is inside as this part's. Parts must not lie within each other."""
        if self.device.type == "cuda":
            begin = self._event()
            yield
            self._events.append((name, begin, self._event()))
        else:
            started = perf_counter()
            yield
            self._seconds[name] += perf_counter() - started

    def mean_seconds(self, steps: int) -> dict[str, float]:
        """Seconds per step of every part, 0 for one that did not occur, over the `steps` steps since the last
        call. Counts from nought afterwards."""
        for name, begin, end in self._events:
            end.synchronize()
            self._seconds[name] += begin.elapsed_time(end) / 1000  # it gives milliseconds
        means = {name: seconds / steps for name, seconds in self._seconds.items()}
        self._seconds, self._events = dict.fromkeys(PARTS, 0.0), []
        return means

    def _event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))  # which need not be the current device's
        return event
