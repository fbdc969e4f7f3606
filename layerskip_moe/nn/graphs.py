"""A step of few rows captured once as a CUDA graph, and launched as one: what `replay.py` is to a CPU.

A token passes hundreds of small kernels, and launching each from Python takes longer than computing it. The step is
made as always first, so that what compiles has compiled, then once more to see that it never waits for the device, and
then captured: a list of kernels with the addresses they read and write. New inputs are copied to where the captured
ones lay.

What a graph does besides is as it was captured: the same buffers, the same sizes, the same slots of the cache. A step
that makes the host wait (a router of one's own that calls `.item()`, quantised experts) is made as always every time.

Knows nothing of layers. Next: `steps.py`, which decides.
"""

import functools
import threading
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_capturing = threading.Lock()  # one capture at a time: they share a stream


class Graph:
    """One step, captured when it is made for the first time."""

    def __init__(
        self,
        run: Callable[[list[Tensor]], list[Tensor]],
        inputs: list[Tensor],
        *,
        pool: Any = None,
        held: tuple[Any, ...] = (),
    ) -> None:
        """run: from inputs to outputs, the same for the same inputs however often it is made.

        pool: the memory of another graph, to be shared; the two must not be launched at the same time
        held: what must live as long as the graph, because it reads it. (Not `run`, which holds the cache, and the
            cache this.)
        """
        self._first: list[Tensor] | None = run(inputs)
        self._inputs = [tensor.clone() for tensor in inputs]
        self._held = held
        self._captured: tuple[torch.cuda.CUDAGraph, list[Tensor]] | None = None
        try:
            self._captured = _capture(run, self._inputs, pool)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # CUDA's own errors are of this kind, too
            _say_once(str(error).partition("\n")[0])

    @property
    def complete(self) -> bool:
        """Whether the step could be captured."""
        return self._captured is not None

    @property
    def pool(self) -> Any:
        """The memory of a complete graph, for others to share."""
        assert self._captured is not None
        return self._captured[0].pool()

    def take_first(self) -> list[Tensor]:
        """The outputs of the step that was made first; once."""
        assert self._first is not None, "they were taken"
        outputs, self._first = self._first, None
        return outputs

    def __call__(self, inputs: list[Tensor]) -> list[Tensor]:
        """The outputs for other inputs of the same sizes."""
        assert self._captured is not None
        graph, outputs = self._captured
        for own, new in zip(self._inputs, inputs, strict=True):
            own.copy_(new)
        graph.replay()
        return [output.clone() for output in outputs]  # the next launch writes there


def _capture(
    run: Callable[[list[Tensor]], list[Tensor]], inputs: list[Tensor], pool: Any
) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """The run as a graph, and where that leaves its outputs."""
    graph, device = torch.cuda.CUDAGraph(), inputs[0].device
    with _capturing, torch.cuda.device(device):
        current, stream = torch.cuda.current_stream(), _stream(device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):  # libraries set up what they need for each stream, which no capture may see
            _check_never_waits(run, inputs)
        current.wait_stream(stream)
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            return graph, run(inputs)


def _check_never_waits(run: Callable[[list[Tensor]], list[Tensor]], inputs: list[Tensor]) -> None:
    """Make the run; RuntimeError if the host waited for the device. A capture would fail on it, and PyTorch's allocator
    would go on as if it were under way."""
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        # Not "error": the mode is the whole process's, and another thread may wait; at worst that counts as this run's.
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run(inputs)
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    if any("called a synchronizing" in str(warning.message) for warning in told):
        raise RuntimeError("an operation waits for the GPU")


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of a GPU's captures: always the same, since some libraries keep memory for each."""
    return torch.cuda.Stream(device)


@functools.cache
def _say_once(reason: str) -> None:
    warnings.warn(
        f"decoding on the GPU will be slower than it could be: a step could not be captured as a CUDA graph: {reason}",
        stacklevel=2,
    )
