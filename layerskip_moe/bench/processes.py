"""Several processes of this machine that know of each other, without torchrun: for counting what they exchange.

Knows nothing of what they do. Next: `communication.py`; `training/parallel.py`.
"""

import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing

from layerskip_moe.training.parallel import TIMEOUT, leave


def in_processes(count: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """function(*arguments), both picklable, in each of so many new processes, joined by gloo on the CPU, with one
    thread each; what each returned, in order of ranks. An error in one of them is raised here, and ends the others."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_run, (count, folder, function, arguments), nprocs=count)
        return [pickle.loads((Path(folder) / str(rank)).read_bytes()) for rank in range(count)]


def _run(rank: int, count: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=count, timeout=TIMEOUT)
    try:
        (Path(folder) / str(rank)).write_bytes(pickle.dumps(function(*arguments)))
    finally:
        leave()
