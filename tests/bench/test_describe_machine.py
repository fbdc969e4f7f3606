"""describe_machine says what there is, and None for what it cannot know."""

import json
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError

import pytest
import torch

from layerskip_moe.bench import describe_machine, machine


def test_says_what_this_process_has():
    told = describe_machine("cpu")
    assert json.loads(json.dumps(told)) == told
    assert told["versions"]["python"] == platform.python_version()
    assert told["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert 1 <= told["cores"] <= os.cpu_count() and told["torch_threads"] == torch.get_num_threads()
    assert told["cpu"] and told["device"] == "cpu"
    assert told["accelerator"] is None and told["accelerator_memory_gib"] is None


@pytest.mark.skipif(sys.platform != "linux", reason="compares with /proc")
def test_memory_is_the_kernels():
    with open("/proc/meminfo") as lines:
        kib = int(next(line for line in lines if line.startswith("MemTotal")).split()[1])
    assert describe_machine("cpu")["memory_gib"] == pytest.approx(kib / 2**20, rel=0.05, abs=0.1)


def test_a_system_without_sysconf_or_affinity(monkeypatch):
    monkeypatch.delattr(os, "sysconf", raising=False)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    told = describe_machine(torch.device("cpu"))
    assert told["memory_gib"] is None and told["cores"] == os.cpu_count()


def test_packages_that_are_not_installed_are_left_out(monkeypatch):
    def version(package):
        if package != "torch":
            raise PackageNotFoundError(package)
        return "2.99"

    monkeypatch.setattr(machine, "version", version)
    assert describe_machine("cpu")["versions"] == {"python": platform.python_version(), "torch": "2.99"}


def test_a_gpu_is_named(monkeypatch):
    class Properties:
        total_memory = 15 * 2**30

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    told = describe_machine("cuda")
    assert (told["device"], told["accelerator"], told["accelerator_memory_gib"]) == ("cuda", "Tesla T4", 15.0)
