"""One thread, a cache folder that is not the user's, and kernels that are compiled once for all tests.

Tiny models are no faster on more threads, and test processes side by side would fight over the cores.
"""

import os
from pathlib import Path

import pytest
import torch

from layerskip_moe.nn.kernels import has_kernels

torch.set_num_threads(1)


def pytest_configure(config):
    # In pytest's own cache: the next run, and all processes of this one, find the compiled kernels there.
    os.environ["LAYERSKIP_MOE_CACHE"] = str(config.cache.mkdir("layerskip_moe"))


@pytest.fixture(scope="session", autouse=True)
def kernels_folder():
    """Where compiled kernels are. They are made and loaded before the first test, in case that one has another cache:
    compiling takes ten seconds."""
    folder = Path(os.environ["LAYERSKIP_MOE_CACHE"]) / "kernels"
    has_kernels()
    return folder


@pytest.fixture
def cache_with_kernels(tmp_path, monkeypatch, kernels_folder):
    """A cache folder of this test's own, which holds nothing but the kernels, for the processes that it starts too."""
    cache = tmp_path / "cache"
    cache.mkdir()
    if kernels_folder.is_dir():
        (cache / "kernels").symlink_to(kernels_folder)
    monkeypatch.setenv("LAYERSKIP_MOE_CACHE", str(cache))
    return cache
