"""What the decoding tests share: small models, a model made of two tables, and the proof that a difference is a tie."""

import copy
import functools
import random
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from layerskip_moe.generation.sampling import Sampling, gumbel_noise, log_probabilities
from layerskip_moe.nn import ModelConfig, MoEDecoder, RunOutput
from layerskip_moe.nn.ragged import MarginRule

# What float32 may move a logit by, against float64, in the models below (measured: 1e-5; tested in test_ties.py).
ROUNDING = 5e-5


def _tiny_model(seed=0, **overrides):
    sizes = dict(vocab_size=29, n_layers=3, d_model=16, n_heads=4, n_kv_heads=2, d_ff=12, num_experts=5, top_k=2)
    return MoEDecoder(ModelConfig(**{**sizes, "max_seq_len": 20, "init_std": 0.3, **overrides}), seed=seed).eval()


@functools.cache
@torch.enable_grad()
def _trained_model(**overrides):
    """Taught that token x is followed by 2 x + 3: its greedy text visits many tokens, where that of random
    weights repeats one or two. Stopped early, so that early layers still disagree with the last one. In
    float64, so that it is the same model on every machine."""
    model = _tiny_model(**overrides).double()
    text = torch.arange(29)[:, None]
    for _ in range(8):
        text = torch.cat([text, (2 * text[:, -1:] + 3) % 29], dim=1)
    for _ in range(30):
        logits = model(text[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten())
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter -= 0.04 * parameter.norm() * gradient / (gradient.norm() + 1e-9)
    return model.float().requires_grad_(False)


@functools.cache
def _exact_model(**overrides):
    return copy.deepcopy(_trained_model(**overrides)).double()


def _byte_level_tokenizer(pieces):
    """Token i says pieces[i], bytes, and no text is split into them: only decoding is asked for."""
    tokenizers = pytest.importorskip("tokenizers")
    # GPT-2's table: a printable byte is its own character, the others are those from 256 on, in order.
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
    vocabulary = {"".join(characters[byte] for byte in piece): token for token, piece in enumerate(pieces)}
    assert len(vocabulary) == len(pieces), "two tokens say the same"
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return tokenizer


@pytest.fixture(scope="session")
def byte_level_tokenizer():
    """byte_level_tokenizer(pieces) -> a tokenizer whose token i is the bytes pieces[i]."""
    return _byte_level_tokenizer


@pytest.fixture(scope="session")
def exact_model():
    """exact_model(**ModelConfig fields) -> trained_model's in float64, for texts that no reference proves a tie in:
    lossy ones. The same object for the same fields."""
    return _exact_model


@pytest.fixture(scope="session")
def tiny_model():
    """tiny_model(seed=0, **ModelConfig fields) -> a new model with random weights, in float32 and eval mode."""
    return _tiny_model


@pytest.fixture(scope="session")
def trained_model():
    """trained_model(**ModelConfig fields) -> a model trained a little; the same object for the same fields."""
    return _trained_model


class _TableModel(torch.nn.Module):
    """Stands in for MoEDecoder where the test says what each depth predicts: no weights, no attention.

    full, draft: functions of (tokens, positions), both int64 [B, T], to logits [B, T, V] for the token after;
    `full` speaks at the last layer, `draft` at every layer before it.
    calls:       the (first layer, end layer, B, T) of each run, in order
    """

    device, dtype, compiled = torch.device("cpu"), torch.float32, False

    def __init__(self, vocab_size, full, draft, n_layers=4):
        super().__init__()
        self.config = ModelConfig(vocab_size, n_layers=n_layers, d_model=2, n_heads=1, num_experts=0, max_seq_len=64)
        self._full, self._draft, self.calls = full, draft, []

    def embed(self, tokens):
        nothing = torch.zeros_like(tokens)
        return torch.stack([tokens, nothing, nothing], dim=-1)  # token, position, layers run

    def run(self, hidden, layers, *, positions, cache, collect=(), choices=False, top_k=None):
        token, _, depth = hidden.unbind(-1)
        if layers:
            assert bool((depth == layers[0]).all()), "layers were skipped or run twice"
            self.calls.append((layers[0], layers[-1] + 1, *positions.shape))

        def after(layers):
            return torch.stack([token, positions, torch.full_like(depth, layers)], dim=-1)

        collected = {layer: after(layer + 1) for layer in collect}
        return RunOutput(after(layers[-1] + 1) if layers else hidden, collected)

    def decode(self, start, layers, *, positions, cache, collect=(), choices=False, top_k=None):
        hidden = start if start.is_floating_point() or start.dim() == 3 else self.embed(start)
        output = self.run(hidden, layers, positions=positions, cache=cache, collect=collect)
        return output, self.unembed(output.hidden)

    def unembed(self, hidden):
        token, position, depth = hidden.unbind(-1)
        whole = (depth == self.config.n_layers)[..., None]
        return torch.where(whole, self._full(token, position), self._draft(token, position))

    def _repeats(self, *_):
        return False

    draft = MoEDecoder.draft


@pytest.fixture(scope="session")
def table_model():
    """table_model(vocab_size, full, draft, n_layers=4) -> a stub whose answers are known."""
    return _TableModel


class _RandomPolicy:
    """Plans any legal thing for each row, stops at random or where a margin is small, and looks at random at what
    costs: lossless all the same."""

    def __init__(self, seed=0, longest=4, by_margin=True):
        self._draw_int8 = random.Random(-1 - seed)
        self._draw, self._longest, self._by_margin, self.rounds = random.Random(seed), longest, by_margin, []

    def plan(self, session):
        layers = session.model.config.n_layers
        self.shadow, self.experts = (self._draw.random() < 0.3 for _ in range(2))
        self.should_stop = self._stop if self._draw.random() < 0.5 else None
        halves = [self._draw.uniform(0.01, 2.0) for _ in session.row_numbers]
        ruled = self._by_margin and self._draw.random() < 0.6
        self.margin_rule = MarginRule(halves, self._draw.random()) if ruled else None
        self.int8_drafts = self._draw_int8.random() < 0.4
        pairs = [(self._draw.randint(1, layers), self._draw.randint(0, self._longest)) for _ in session.row_numbers]
        pairs = pairs if self._draw.random() < 0.5 else [(pairs[0][0], length) for _, length in pairs]
        return pairs if self._draw.random() < 0.7 else pairs[:1] * len(pairs)

    def _stop(self, confidence, position):
        assert bool(((confidence >= 0) & (confidence <= 1.0001)).all())
        stops = [self._draw.random() < 0.3 for _ in confidence]
        return torch.tensor(stops) if self._draw.random() < 0.8 else stops[0]

    def observe(self, round):
        self.rounds.append(round)


@pytest.fixture(scope="session")
def random_policy():
    """random_policy(seed=0, longest=4, by_margin=True) -> a policy without sense; `rounds` are those it observed."""
    return _RandomPolicy


def _find_tie(model, text, row, sampling, between, tolerance=ROUNDING):
    """Why rounding may choose either token of `between` after `text`, in one line; None when it may not.

    The whole model runs over the text without a cache, in float64 (its routers are float32 always).
    """
    exact = copy.deepcopy(model).double()
    tokens = torch.tensor([text])
    positions = torch.arange(len(text))[None]
    with torch.no_grad():
        output = exact.run(exact.embed(tokens), range(exact.config.n_layers), positions=positions)
        logits = exact.unembed(output.hidden[:, -1:])
    for layer, routing in output.routing.items():
        if routing.logits.shape[-1] > exact.config.top_k:
            ordered = routing.logits.sort(dim=-1, descending=True).values
            gap, position = (ordered[:, exact.config.top_k - 1] - ordered[:, exact.config.top_k]).min(dim=0)
            if gap <= tolerance:
                return f"layer {layer}'s router has a gap of {float(gap):.1e} at position {int(position)}"
    scores = logits[0, 0]
    if sampling.repetition_penalty != 1:
        seen, penalty = sorted(set(text)), sampling.repetition_penalty
        scores[seen] = torch.minimum(scores[seen] / penalty, scores[seen] * penalty)
        tolerance = tolerance * penalty
        assert penalty > 1, "a reward would take the larger of the two"
    if not sampling.greedy:
        tolerance = tolerance / sampling.temperature
        ordered = scores.div(sampling.temperature).sort(descending=True).values
        if sampling.top_k is not None and sampling.top_k < len(ordered):
            if ordered[sampling.top_k - 1] - ordered[sampling.top_k] <= tolerance:
                return "two logits tie for the last place among the top k"
            ordered = ordered[: sampling.top_k]
        if sampling.top_p is not None and (ordered.softmax(-1).cumsum(-1) - sampling.top_p).abs().min() <= tolerance:
            return "a token stands on the edge of top_p"
        noise = gumbel_noise(sampling.seed, torch.tensor([row]), torch.tensor([[len(text)]]), logits.shape[-1])
        scores = log_probabilities(scores, sampling) + noise[0, 0]
    if scores.max() - scores[list(between)].min() <= tolerance:
        return f"tokens {between[0]} and {between[1]} tie"
    return None


def _assert_same_text(model, prompts, expected, got, sampling, first_row=0):
    """Equal token for token, or the first difference of each row is shown to be a tie within rounding."""
    assert len(expected) == len(got) == len(prompts)
    for row, (prompt, one, other) in enumerate(zip(prompts, expected, got, strict=True), first_row):
        assert len(one) == len(other), f"row {row}: {len(one)} tokens against {len(other)}"
        for place, (a, b) in enumerate(zip(one, other, strict=True)):
            if a != b:
                tie = _find_tie(model, [*prompt, *one[:place]], row, sampling, (a, b))
                assert tie is not None, f"row {row}: token {place} is {a} in one text, {b} in the other: no tie"
                break


def _reference_probabilities(logits, sampling):
    """Probabilities [V] that a token follows after logits [V], written anew in numpy: temperature, top-k, top-p."""
    scores = np.asarray(logits, dtype=np.float64)
    if sampling.greedy:
        return np.eye(len(scores))[scores.argmax()]
    order = np.argsort(-scores)[: sampling.top_k]
    weights = np.exp((scores[order] - scores.max()) / sampling.temperature)
    probabilities = np.zeros(len(scores))
    reached = 0.0
    for token, share in zip(order, weights / weights.sum(), strict=True):
        if sampling.top_p is None or reached < sampling.top_p:
            probabilities[token] = share
        reached += share
    return probabilities / probabilities.sum()


@pytest.fixture(scope="session")
def reference_probabilities():
    """reference_probabilities(logits, sampling): what `log_probabilities` must agree with."""
    return _reference_probabilities


@pytest.fixture(scope="session")
def find_tie():
    """find_tie(model, text, row, sampling, between) -> a reason, or None."""
    return _find_tie


@pytest.fixture(scope="session")
def assert_same_text():
    """assert_same_text(model, prompts, expected, got, sampling, first_row=0)."""
    return _assert_same_text


@dataclass(eq=False)
class OneText:
    """As much of a session as a policy asks."""

    model: MoEDecoder
    sampling: Sampling = field(default_factory=Sampling)
    row_numbers: list[int] = field(default_factory=lambda: [0])
    one_call: bool = True

    @property
    def stats(self):
        return [None] * len(self.row_numbers)

    @property
    def remaining(self):
        return [1000] * len(self.row_numbers)

    @property
    def new_tokens(self):
        return [[] for _ in self.row_numbers]

    def texts(self):
        return [[0] for _ in self.row_numbers]

    def prompt_agreement(self, exits):
        return []


@pytest.fixture
def one_text():
    """`OneText`: what policies are asked with where nothing is decoded."""
    return OneText
