"""What the tests of replays share: a tiny decoder, texts that were never written, and a cost model of three numbers."""

import functools

import numpy as np
import pytest

from layerskip_moe.analysis.trace import TracedText
from layerskip_moe.nn import ModelConfig, MoEDecoder


@functools.cache
def _small_model(**fields):
    sizes = dict(vocab_size=23, n_layers=4, d_model=16, n_heads=2, d_ff=16, num_experts=6, top_k=2, max_seq_len=64)
    return MoEDecoder(ModelConfig(**{**sizes, "init_std": 0.35, **fields}), seed=3).eval()


@pytest.fixture(scope="session")
def small_model():
    """small_model(**ModelConfig fields) -> random weights whose layers agree now and then; the same for the same."""
    return _small_model


@pytest.fixture(scope="session")
def invented_text():
    """invented_text(config, right, seed=0, int8_drafts=0) -> a text of len(right[0]) tokens after a prompt of 2; layer
    i + 1 is right where right[i] says so, the last layer everywhere. Of so many int8 drafts some are right."""

    def build(config, right, seed=0, int8_drafts=0):
        draws = np.random.default_rng(seed)
        right = np.array([*right, [True] * len(right[0])], dtype=bool)
        states = right.shape[1] + 1
        tokens = draws.integers(config.vocab_size, size=states + 1)
        if seed % 2:  # a text that mostly repeats itself
            tokens = np.where(draws.random(states + 1) < 0.9, np.resize(tokens[: 1 + seed % 3], states + 1), tokens)
        said = np.repeat(tokens[None, 1:], len(right), axis=0)
        said[:, 1:] = np.where(right, said[:, 1:], (said[:, 1:] + 1) % config.vocab_size)
        moe_layers = sum(map(config.is_moe, range(config.n_layers)))
        experts = draws.random((moe_layers, states, config.num_experts)).argsort(axis=-1)[..., : config.top_k]
        second = (said + draws.integers(1, config.vocab_size, size=said.shape)) % config.vocab_size
        confidence = draws.random(said.shape).astype(np.float32)
        margin = draws.exponential(size=said.shape).astype(np.float32)
        drafts = len(right), states - 1, int8_drafts
        places = np.arange(drafts[1])[:, None] + np.arange(int8_drafts)
        int8_right = (draws.random(drafts) < 0.8) & (places < drafts[1])
        int8_margin = (draws.exponential(size=drafts) * (places < drafts[1])).astype(np.float32)
        return TracedText(tokens, 2, 0.0, seed, said, second, confidence, margin, experts, int8_right, int8_margin)

    return build


class _Cost:
    """1 for each layer a draft or a place runs through, 0.5 for each pass of the head, 0.1 for each expert read. One
    that is let go takes a pass of the head. int8: what a layer and the head take of drafts by copies, where it is of
    them; then all layers verify."""

    def __init__(self, n_layers, int8=None):
        self.n_layers, self.int8 = n_layers, int8

    def round_seconds(self, exit_layers, drafted, experts=None, made=None, staged=None):
        [exit_layer], [drafts], [chosen] = exit_layers, drafted, made or drafted
        if self.int8 is not None:
            drafting = chosen * (exit_layer + 0.5)
            if staged is not None:  # further places of a run take half as much
                runs = staged.exit_layer * staged.proposing + (exit_layer - staged.exit_layer) * staged.choosing
                drafting = 0.5 * (runs + exit_layer * staged.places + staged.heads)
            return self.int8 * drafting + self.n_layers + 0.5 + 0.1 * sum(experts or [])
        drafting = (drafts + 1) * exit_layer + 0.5 * chosen
        return drafting + self.n_layers - exit_layer + 0.5 + 0.1 * sum(experts or [])

    def asking_seconds(self, *, stops, made, shadow):
        return 0.0


@pytest.fixture(scope="session")
def cost_of():
    """cost_of(n_layers, int8=None) -> a cost model."""
    return _Cost
