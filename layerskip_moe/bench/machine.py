"""The machine a figure came from, in words: what a measured speed means nothing without.

Imports none of the packages whose versions it states. Next: `decoding.py`, which measures.
"""

import os
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "layerskip-moe",
    "torch",
    "torchtune",
    "torchao",
    "tokenizers",
    "datasets",
    "numpy",
    "safetensors",
)


def describe_machine(device: torch.device | str, also: Sequence[str] = ()) -> dict[str, Any]:
    """Plain values, ready for JSON. What the system does not tell is None.

    cpu: model name; cores: logical cores this process may use; torch_threads; memory_gib: of the machine;
    device: as given; accelerator: its name, None on a CPU; accelerator_memory_gib; platform: operating
    system and architecture; versions: package -> version, Python's included, of those installed, and of the packages
    in `also`.
    """
    device = torch.device(device)
    accelerator, accelerator_memory = _accelerator(device)
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "memory_gib": _memory_gib(),
        "device": str(device),
        "accelerator": accelerator,
        "accelerator_memory_gib": accelerator_memory,
        "platform": platform.platform(),
        "versions": _versions((*PACKAGES, *also)),
    }


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":  # ARM kernels do not state one
                return value.strip()
    if platform.system() == "Darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        told = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        if told:
            return told
    return platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return None


def _accelerator(device: torch.device) -> tuple[str | None, float | None]:
    if device.type == "cpu":
        return None, None
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        return torch.cuda.get_device_name(device), round(memory / 2**30, 1)
    return device.type, None


def _versions(packages: Sequence[str]) -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue  # optional, or the library runs from a checkout that is not installed
    return versions
