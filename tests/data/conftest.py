"""Every test here has a cache of its own, and small texts to fill it with."""

import random

import pytest


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """The folder that stands in for the user's cache."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("LAYERSKIP_MOE_CACHE", str(folder))
    return folder


@pytest.fixture
def prose():
    """prose(n, seed=0) -> n words of made-up text, lines of ten."""

    def write(n, seed=0):
        draw = random.Random(seed)
        words = [draw.choice(["river", "stone", "walks", "under", "bright", "the", "a", "sings"]) for _ in range(n)]
        return "\n".join(" ".join(words[i : i + 10]) for i in range(0, n, 10)) + "\n"

    return write
