"""Which layers draft: drawn at random, searched as SWIFT does, or found anew as CLaSp does.

A set is a rising list of layer indices. None of it can change a text: the model verifies what any set drafts.

A active rows, W places, L layers, M layers left out, D width, V vocabulary.
Knows nothing of rounds. Next: `sparse_speculative.py`, which drafts with these.
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from layerskip_moe.generation.autoregressive import Autoregressive
from layerskip_moe.generation.generate import check_prompts
from layerskip_moe.generation.sampling import Sampling, gumbel_noise
from layerskip_moe.generation.session import Session
from layerskip_moe.nn import KVCache, MoEDecoder
from layerskip_moe.nn.compiling import compiling
from layerskip_moe.nn.modes import evaluating
from layerskip_moe.refusals import shown

WINDOW = 32  # tokens that a set is judged by
ENOUGH = 0.95  # agreement above which no better set is looked for
TRIES = 100  # sets after which none is looked for any more


def layer_indices(name: str, layers: Iterable[int]) -> tuple[int, ...]:
    """The indices in order, each once; ValueError, naming the argument, for what is no list of whole numbers."""
    if not isinstance(layers, Iterable) or not all(hasattr(layer, "__index__") for layer in layers):
        raise ValueError(f"{name}={shown(layers)} is no list of layers' indices.")
    return tuple(sorted(set(layers)))


def count_skipped(skip: float, n_layers: int) -> int:
    """How many of L layers a share `skip` is, where the first and the last always run."""
    return min(round(skip * n_layers), max(n_layers - 2, 0))


def random_layers(n_layers: int, skipped: int, draw: random.Random) -> list[int]:
    """All but `skipped` layers, the first and the last among them."""
    out = draw.sample(range(1, n_layers - 1), skipped)
    return [layer for layer in range(n_layers) if layer not in out]


def every_other_layer(n_layers: int, skipped: int) -> list[int]:
    """All but `skipped` layers: odd ones are left out first, from below, then even ones; the ends always stay."""
    out = [*range(1, n_layers - 1, 2), *range(2, n_layers - 1, 2)][:skipped]
    return [layer for layer in range(n_layers) if layer not in out]


@dataclass
class LayerSearch:
    """SWIFT's search (arXiv 2410.06916), kept from one try to the next: each scores one more set, the best one stays.

    Every other try changes one layer of the best set, the others are drawn at random. (SWIFT draws all, but every 25th,
    which Bayesian optimisation proposes; and leaves out attention and MLP apart, for us a layer is one.)

    Attributes:
        layers: the best set so far
        draw: where chance comes from
        top_k: experts that these layers run with, None: as the model does
        score: the best set's `agreement`; None before the first try
        tries: how many sets were scored
    """

    layers: list[int]
    draw: random.Random
    top_k: int | None = None
    score: float | None = None
    tries: int = 0

    def select(self, rows: Tensor) -> None:
        """All rows draft with the same layers."""

    def improve(self, session: Session) -> None:
        """Score another set on the newest W tokens of the session, once it has written so many."""
        written = session.max_new_tokens - max(session.remaining)
        if written < WINDOW or self.tries >= TRIES or (self.score is not None and self.score > ENOUGH):
            return
        layers = self.layers if self.score is None else self._another(session.model.config.n_layers)
        score = agreement(session, layers, WINDOW, top_k=self.top_k)
        if self.score is None or score > self.score:
            self.layers, self.score = layers, score
        self.tries += 1

    def _another(self, n_layers: int) -> list[int]:
        out = [layer for layer in range(n_layers) if layer not in self.layers]
        inner = self.layers[1:-1]
        if self.tries % 2 and out and inner:
            swapped = {self.draw.choice(out)} | set(self.layers) - {self.draw.choice(inner)}
            return sorted(swapped)
        return random_layers(n_layers, len(out), self.draw)


def agreement(session: Session, layers: Sequence[int], window: int, *, top_k: int | None = None) -> float:
    """The share of the newest `window` tokens that each active row has written which these layers would have chosen,
    with the same noise and after the same text; in one parallel pass."""
    model, cache, sampling = session.model, session.cache, session.sampling
    positions = cache.lengths[:, None] - window + torch.arange(window, device=cache.lengths.device)
    rows = cache.rows[:, None]
    where, remembered = (slice(None), rows, slice(None), positions), (slice(None), rows, positions)
    # The full model's, of places that are settled.
    kept = cache.keys[where], cache.values[where]
    kept_router_logits = None if cache.router_logits is None else cache.router_logits[remembered]
    with compiling(model, False):  # nothing is repeated that is tried once
        hidden = model.embed(session.tokens.gather(1, positions))
        hidden = model.run(hidden, layers, positions=positions, cache=cache, top_k=top_k).hidden
        logits = model.unembed(hidden)
    cache.keys[where], cache.values[where] = kept
    if cache.router_logits is not None and kept_router_logits is not None:
        cache.router_logits[remembered] = kept_router_logits
    after = positions + 1
    noise = None
    if not sampling.greedy:
        noise = gumbel_noise(sampling.seed, session.rows, after, model.config.vocab_size)
    return float((session.choose(logits, noise) == session.tokens.gather(1, after)).float().mean())


def search_layers(
    model: MoEDecoder,
    prompts: Sequence[Sequence[int]],
    *,
    skip: float = 0.45,
    top_k: int | None = None,
    seed: int = 0,
) -> LayerSearch:
    """SWIFT's search before there is a text to write: on W tokens that the model writes after each of some prompts,
    greedily. What it finds is `LayerSearch.layers`, for `SparseSpeculative(draft_layers=...)`.

    skip: the share of layers left out; top_k: experts that they draft with. Raises ValueError for prompts that
    `generate` refuses, with W + 1 new tokens.
    """
    n_layers = model.config.n_layers
    check_prompts(prompts, model.config, WINDOW + 1)
    with evaluating(model):
        session = Session(model, prompts, Sampling(), max_new_tokens=WINDOW + 1)
        session.prefill()
        plain = Autoregressive()
        for _ in range(WINDOW):
            plain.step(session)
        search = LayerSearch(every_other_layer(n_layers, count_skipped(skip, n_layers)), random.Random(seed), top_k)
        for _ in range(TRIES):
            search.improve(session)
        session.close()
    return search


def clasp_layers(session: Session, skipped: int, *, top_k: int | None = None) -> list[int]:
    """CLaSp's set for the next round (arXiv 2505.24196): all but M layers, chosen so that the newest token's state
    stays near the full model's. In a batch the first active row's decides for all.

    With h_i the full model's state after i layers, g(i, j) is the state after i layers of which j were left out: of
    f_i(g(i-1, j)) and g(i-1, j-1) the one of larger cosine with h_i. Followed back from g(L, M).
    """
    model, cache, n_layers = session.model, session.cache, session.model.config.n_layers
    at, row, length = cache.lengths[:1, None], cache.rows[0], int(cache.lengths[0])
    start = model.embed(session.newest[:1])
    first_row = cache.subset(torch.zeros_like(cache.lengths[:1]))
    wanted = model.run(start, range(n_layers), positions=at, cache=first_row, collect=range(n_layers)).collected
    # Each g(., j) writes a key and a value of its own at the newest token's place, so each is a row of its own.
    rows = KVCache(model.config, skipped + 1, length + 1, dtype=model.dtype, device=model.device)
    rows.keys[..., :length, :] = cache.keys[:, row, None, :, :length]
    rows.values[..., :length, :] = cache.values[:, row, None, :, :length]
    if rows.router_logits is not None and cache.router_logits is not None:
        rows.router_logits[..., :length, :] = cache.router_logits[:, row, None, :length]
    states, positions = start.expand(skipped + 1, 1, -1), at.expand(skipped + 1, 1)
    numbers = torch.arange(1, skipped + 1, device=model.device)
    leaves: list[list[bool]] = []  # by layer and j, whether g(layer, j) leaves the layer out
    with compiling(model, False):  # on a cache that serves once
        for layer in range(n_layers):
            ran = model.run(states, [layer], positions=positions, cache=rows, top_k=top_k).hidden
            near, stayed = (F.cosine_similarity(some, wanted[layer], dim=-1)[:, 0] for some in (ran, states))
            better = (stayed[:-1] > near[1:]) | (numbers > layer)  # (of i layers, i are left out by running none)
            states = torch.cat([ran[:1], torch.where(better[:, None, None], states[:-1], ran[1:])])
            leaves.append([False, *better.tolist()])
    layers = []
    for layer in reversed(range(n_layers)):
        if leaves[layer][skipped]:
            skipped -= 1
        else:
            layers.append(layer)
    return layers[::-1]
