"""Speculative: another decoder, or the first layers of one, drafts, the model verifies all drafts in one pass
(Leviathan et al., arXiv 2211.17192).

The draft model has a cache of its own. Next: `self_speculative.py`, which needs no second model;
`verification.py`.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from layerskip_moe.generation.autoregressive import check_exit_layer
from layerskip_moe.generation.session import Session
from layerskip_moe.generation.verification import Coupling, Round, check_drafting
from layerskip_moe.nn import KVCache, ModelConfig, MoEDecoder
from layerskip_moe.refusals import shown


@dataclass(frozen=True)
class Speculative:
    """Draft with another decoder of the same vocabulary.

    Attributes:
        draft_model: the decoder that drafts, on the same device; it is run in eval mode and left as it was
        draft_length: tokens drafted per round, 1 or more
        coupling: "shared" or "rejection", see `SelfSpeculative`
        exit_layer: draft with the first n layers of the draft model and its head; None: the whole of it
    """

    draft_model: MoEDecoder
    draft_length: int = 4
    coupling: Coupling = "shared"
    exit_layer: int | None = None

    def __post_init__(self) -> None:
        check_drafting(self.draft_length, self.coupling)

    def check(self, config: ModelConfig) -> None:
        """Raise ValueError where the two models do not share a vocabulary, or the draft has no such exit layer."""
        if isinstance(self.draft_model, str | Path):
            told = shown(self.draft_model)
            raise ValueError(f"draft_model={told} is no model; load it by MoEDecoder.from_pretrained.")
        own = self.draft_model.config
        if own.vocab_size != config.vocab_size:
            raise ValueError(
                f"the draft model has vocab_size={own.vocab_size} and the model {config.vocab_size}; "
                "they must share one tokenizer."
            )
        if self.exit_layer is not None:
            check_exit_layer(self.exit_layer, own)

    def start(self, session: Session) -> None:
        """Run the prompts through both models. Raises ValueError where the draft model is too short for them, or
        elsewhere."""
        draft = self.draft_model
        if draft.config.max_seq_len < session.capacity:
            raise ValueError(
                f"the draft model's max_seq_len={draft.config.max_seq_len} is less than prompt and new tokens, "
                f"{session.capacity}; ask for less, or build it with a larger max_seq_len."
            )
        if draft.device != session.model.device:
            raise ValueError(f"the draft model is on {draft.device} and the model on {session.model.device}; move one.")
        cache = session.new_cache(draft, n_layers=self.exit_layer)
        session.prefill(self._layers, model=draft, cache=cache)
        session.prefill()
        session.state = cache

    def step(self, session: Session) -> None:
        """One round: draft, verify, append what the full model chose."""
        model, draft = session.model, self.draft_model
        cache = session.state
        assert isinstance(cache, KVCache)
        round_ = Round.begin(session, [self.draft_length] * len(session.rows), self.coupling)
        positions = session.positions(round_.length + 1)
        # The draft model has not run the last draft of a round that was accepted whole: it runs the token before
        # the newest once more in either case, which writes what is there already or what is missing.
        first = torch.cat([(positions[:, :1] - 1).clamp(min=0), positions[:, :1]], dim=1)
        tokens, places = session.tokens.gather(1, first), first
        for place in range(round_.length):
            _, logits = draft.decode(tokens, self._layers, positions=places, cache=cache)
            tokens, places = round_.draft(logits[:, -1:]), positions[:, place + 1 : place + 2]
        text = torch.cat([session.newest, *round_.drafts], dim=1)
        logits = session.decode(text, range(model.config.n_layers), positions)
        round_.verify(logits)

    @property
    def _layers(self) -> range:
        return range(self.exit_layer or self.draft_model.config.n_layers)
