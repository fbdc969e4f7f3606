"""Which processes train together, and what they tell each other: numbers of a batch that each saw a part of.

`torchrun` starts the processes, ranks 0 to R - 1, and tells them of each other; in a process that it did not start
there is one rank, and everything here gives back what it was given. The ranks stand in a mesh of R / e by e: all of
them have samples of their own, and the e of a row (`expert_parallel`) hold a layer's experts between them.

Knows nothing of networks. Next: `sharding.py` (a model divided over the mesh), `expert_parallel.py`; `loop.py`,
which joins.
"""

import atexit
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

TIMEOUT = timedelta(minutes=10)  # that a rank waits for another before it gives up, and all end
_PATIENCE = timedelta(days=1)  # ... while another reads a text, and trains a tokenizer on it, or writes a checkpoint


@dataclass(frozen=True)
class Ranks:
    """The processes that train together, as one of them sees it.

    Attributes:
        rank: this one, 0 to size - 1; 0 is the one that writes files and talks
        size: R, how many there are
        device: where this one computes
    """

    rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this one writes files and talks."""
        return self.rank == 0

    def meshes(self, experts: int) -> tuple[DeviceMesh, DeviceMesh]:
        """All ranks in a row, "world", and as R / experts rows of `experts`, which divides R, "data" and "expert"."""
        kind = self.device.type
        world = init_device_mesh(kind, (self.size,), mesh_dim_names=("world",))
        return world, init_device_mesh(kind, (self.size // experts, experts), mesh_dim_names=("data", "expert"))

    def total(self, numbers: Tensor) -> Tensor:
        """The sum of every rank's numbers, each of the same shape, without gradient."""
        if self.size == 1:
            return numbers.detach()
        numbers = numbers.detach().clone().to(self.device)
        dist.all_reduce(numbers)
        return numbers

    def mean(self, numbers: Tensor) -> Tensor:
        """The mean of every rank's numbers."""
        return self.total(numbers) / self.size

    def largest(self, number: int) -> int:
        """The largest of every rank's numbers."""
        if self.size == 1:
            return number
        numbers = torch.tensor(number, device=self.device)
        dist.all_reduce(numbers, dist.ReduceOp.MAX)
        return int(numbers)

    def raise_together(self, error: Exception | None) -> None:
        """Raise rank 0's error, if it has one, on every rank."""
        error = self.first_ones(error)
        if error is not None:
            raise error

    def first_ones(self, value: Any) -> Any:
        """What rank 0 has for this value."""
        told = [value]
        if self.size > 1:
            dist.broadcast_object_list(told)
        return told[0]

    def everyones(self, value: Any) -> list[Any]:
        """What each rank has for this value, a plain one."""
        told = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(told, value)
        return told

    def check_agree(self, facts: Any) -> None:
        """Raise ValueError on every rank unless all have the same facts, plain values."""
        told = self.everyones(facts)
        other = [rank for rank, theirs in enumerate(told) if theirs != told[0]]
        if other:
            raise ValueError(
                f"processes {other} were given another text, model or TrainConfig than process 0; start all with the "
                "same command and the same files."
            )

    @contextmanager
    def one_per_machine_first(self) -> Iterator[None]:
        """The block, done by one process of each machine, and by its others when that one is through: they find in the
        cache what it left there."""
        local = int(os.environ.get("LOCAL_RANK", "0"))
        with self._patiently() as wait:
            if local > 0:
                wait()
            yield
            if local == 0:
                wait()

    @contextmanager
    def awaiting_the_first(self) -> Iterator[None]:
        """The block, at whose end all wait for rank 0, which has most to do there: longer than for one that does not
        answer."""
        with self._patiently() as wait:
            yield
            wait()

    @contextmanager
    def _patiently(self) -> Iterator[Callable[[], Any]]:
        """A way to wait for all others."""
        if self.size == 1:
            yield lambda: None
            return
        patient = dist.new_group(backend="gloo", timeout=_PATIENCE)
        yield lambda: dist.barrier(patient)
        dist.destroy_process_group(patient)


def join(device: torch.device | str, *, timeout: timedelta = TIMEOUT) -> Ranks:
    """Find the others that torchrun started, by gloo for a CPU and NCCL for GPUs, of which each process takes its own;
    alone where it started none. To be called again is harmless, and gives the same.

    timeout: that a rank waits for one that does not answer
    """
    device = torch.device(device)
    if not dist.is_initialized():
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return Ranks(0, 1, device)
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
            dist.init_process_group("nccl", timeout=timeout, device_id=device)
        else:
            dist.init_process_group("gloo", timeout=timeout)
        atexit.register(leave)
    if dist.get_backend() == "nccl":
        device = torch.device("cuda", torch.cuda.current_device())
    return Ranks(dist.get_rank(), dist.get_world_size(), device)


def leave() -> None:
    """Part from the others; nothing where there are none."""
    if dist.is_initialized():
        dist.destroy_process_group()
