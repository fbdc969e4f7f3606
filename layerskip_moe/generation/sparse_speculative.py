"""SparseSpeculative: some of the model's layers draft, or all of them with fewer experts, and the whole of it verifies
(Draft & Verify, arXiv 2309.08168; SWIFT, arXiv 2410.06916; CLaSp, arXiv 2505.24196).

Drafts read the full model's keys and values of all that is settled and write their own after it, which verification
replaces before it reads them. What the draft computed is used at verification only as far as its layers ran as the
model's do: without a gap before them, and with as many experts.

Next: `layer_sets.py`, which finds layers; `self_speculative.py`, whose drafts leave out the last layers and lose
nothing.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Literal

import torch

from layerskip_moe.generation.layer_sets import (
    LayerSearch,
    clasp_layers,
    count_skipped,
    every_other_layer,
    layer_indices,
    random_layers,
)
from layerskip_moe.generation.proposals import draft
from layerskip_moe.generation.session import Session
from layerskip_moe.generation.verification import Round, check_drafting
from layerskip_moe.nn import ModelConfig
from layerskip_moe.refusals import require_index, shown

Search = Literal["random", "swift", "clasp"]


@dataclass(frozen=True)
class SparseSpeculative:
    """Draft with fewer layers, fewer experts, or both. The text is plain decoding's, token for token, at any
    temperature.

    Attributes:
        draft_layers: the layers that draft, indices 0..L-1; "random": one set, drawn by `layer_seed`; "swift": searched
            while decoding, a set more each round; "clasp": found anew each round; None: all
        draft_top_k: experts per token in drafting, 1 up to the model's top_k; None: the model's
        draft_length: tokens drafted per round, 1 or more
        skip: the share of layers left out where they are not given, above 0 and below 1; never all but two
        layer_seed: of the sets that "random" and "swift" draw
    """

    draft_layers: Sequence[int] | Search | None = None
    draft_top_k: int | None = None
    draft_length: int = 4
    skip: float = 0.45
    layer_seed: int = 0

    def __post_init__(self) -> None:
        check_drafting(self.draft_length, "shared")
        if self.draft_layers is None and self.draft_top_k is None:
            raise ValueError("SparseSpeculative takes draft_layers or draft_top_k: say what drafting leaves out.")
        if isinstance(self.draft_layers, int):
            raise ValueError(f"draft_layers={self.draft_layers} is one index; give a list, such as [0, 1, 5].")
        if isinstance(self.draft_layers, str):
            if self.draft_layers not in ("random", "swift", "clasp"):
                raise ValueError(
                    f"draft_layers={shown(self.draft_layers)} is unknown; it is a list, 'random', 'swift' or 'clasp'."
                )
        elif self.draft_layers is not None:
            object.__setattr__(self, "draft_layers", layer_indices("draft_layers", self.draft_layers))
        if self.draft_top_k is not None:
            require_index("draft_top_k", self.draft_top_k)
        if not isinstance(self.skip, Real) or not 0 < self.skip < 1:
            raise ValueError(f"skip={self.skip} must be above 0 and below 1: the share of layers left out.")

    def check(self, config: ModelConfig) -> None:
        """Raise ValueError where the model has no such layers, or not so many experts."""
        layers, top_k = self.draft_layers, self.draft_top_k
        if isinstance(layers, str):
            if count_skipped(self.skip, config.n_layers) < 1:
                raise ValueError(
                    f"skip={self.skip} of {config.n_layers} layers, of which the first and the last always run, leaves "
                    "out none; give a larger share, or draft_layers."
                )
        elif layers is not None:
            outside = [layer for layer in layers if not 0 <= layer < config.n_layers]
            if outside or not layers:
                named = f"names {outside[0]}" if outside else "is empty"
                raise ValueError(
                    f"draft_layers={shown(list(layers))} {named}; layers are 0 to {config.n_layers - 1}, give one "
                    "or more."
                )
        if top_k is not None and not 1 <= top_k <= (config.top_k if config.num_experts else 0):
            has = f"a token has {config.top_k}" if config.num_experts else "this model has none; leave it out"
            raise ValueError(f"draft_top_k={top_k} must be 1 or more and no more experts than there are: {has}.")

    def start(self, session: Session) -> None:
        """Run the prompts."""
        session.prefill()
        if self.draft_layers == "swift":
            n_layers = session.model.config.n_layers
            layers = every_other_layer(n_layers, count_skipped(self.skip, n_layers))
            session.state = LayerSearch(layers, random.Random(self.layer_seed), self.draft_top_k)

    def step(self, session: Session) -> None:
        """One round: draft, verify, append what the full model chose."""
        round_ = Round.begin(session, [self.draft_length] * len(session.row_numbers), "shared")
        start, done = session.newest, 0
        if round_.length:
            layers = self._layers(session)
            done = count_shared(layers, self.draft_top_k, session.model.config)
            drafts, states = draft(round_, layers, round_.length, top_k=self.draft_top_k, collect=layers[:done][-1:])
            round_.drafts = list(drafts.split(1, dim=1))
            start = states[1] if done else torch.cat([start, drafts], dim=1)
        layers_left = range(done, session.model.config.n_layers)
        round_.verify(session.decode(start, layers_left, session.positions(round_.length + 1)))

    def _layers(self, session: Session) -> Sequence[int]:
        """The layers that draft in this round."""
        n_layers = session.model.config.n_layers
        skipped = count_skipped(self.skip, n_layers)
        match self.draft_layers:
            case None:
                return range(n_layers)
            case "random":
                return random_layers(n_layers, skipped, random.Random(self.layer_seed))
            case "swift":
                session.state.improve(session)
                return session.state.layers
            case "clasp":
                return clasp_layers(session, skipped, top_k=self.draft_top_k)
        return self.draft_layers


def count_shared(layers: Sequence[int], top_k: int | None, config: ModelConfig) -> int:
    """How many layers from the first on a draft runs as the model does: none left out before them, and no experts."""
    shared = 0
    while shared < len(layers) and layers[shared] == shared:
        if config.is_moe(shared) and top_k not in (None, config.top_k):
            break
        shared += 1
    return shared
