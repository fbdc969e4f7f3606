"""SelfSpeculative: the first layers draft, the remaining layers verify all drafts in one pass
(LayerSkip, arXiv 2404.16710, section 4.3).

The draft's keys, values and exit states are kept, so verification runs only the layers the draft left out,
and the early ones for the newest draft, which the draft had no need to run. What is rejected is forgotten
by not counting it.

The early layers of another model may draft instead, such as a quantised copy. Its keys, values and states are not the
model's, so then every layer verifies: that is `speculative.py`'s way, and is left to it.

Knows nothing of how a session stores its rows. Next: `verification.py`, `session.py`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from layerskip_moe.generation.autoregressive import check_exit_layer
from layerskip_moe.generation.session import Session
from layerskip_moe.generation.speculative import Speculative
from layerskip_moe.generation.verification import Coupling, Round, check_drafting
from layerskip_moe.nn import ModelConfig, MoEDecoder


@dataclass(frozen=True)
class SelfSpeculative:
    """Draft with the first `exit_layer` layers, verify with the rest.

    Attributes:
        exit_layer: n in 1..L; L drafts with the whole model
        draft_length: tokens drafted per round, 1 or more
        coupling: "shared": draft and full model choose with the same noise, and the full model's choice is
            the output, so the text equals plain decoding's token for token at any temperature.
            "rejection": accept a draft x with probability min(1, p(x) / q(x)), else draw from
            max(p - q, 0) normalised (arXiv 2211.17192); keeps the distribution, not the text, and
            accepts somewhat more. Greedy decoding is the same under both.
        draft_model: another decoder whose first `exit_layer` layers and head draft, such as
            `quantize(model, "int8")`, as in `Speculative`; None: the model itself. It is as lossless: what the draft
            computed is used at verification only where its embedding and those layers are the model's own.
    """

    exit_layer: int
    draft_length: int = 4
    coupling: Coupling = "shared"
    draft_model: MoEDecoder | None = None

    def __post_init__(self) -> None:
        check_drafting(self.draft_length, self.coupling)

    def check(self, config: ModelConfig) -> None:
        """Raise ValueError where the model, or the draft model, has no such exit layer, and where the two do not share
        a vocabulary."""
        if self.draft_model is None:
            check_exit_layer(self.exit_layer, config)
        else:
            self._speculative(self.draft_model).check(config)

    def start(self, session: Session) -> None:
        """Run the prompts, through both models where they differ; then raises ValueError as `Speculative.start`."""
        if self.draft_model is None or _begin_alike(session.model, self.draft_model, self.exit_layer):
            session.prefill()
        else:
            self._speculative(self.draft_model).start(session)

    def step(self, session: Session) -> None:
        """One round: draft, verify, append what the full model chose."""
        model, draft = session.model, self.draft_model or session.model
        if session.state is not None:  # the cache of a draft model that differs, which `start` made
            self._speculative(draft).step(session)
            return
        round_ = Round.begin(session, self.draft_length, self.coupling)
        positions = session.positions(round_.length + 1)
        early, late = range(self.exit_layer), range(self.exit_layer, model.config.n_layers)
        if draft is model and not (round_.rejection or session.sampling.filters):
            noise = None if round_.noise is None else round_.noise[:, :-1]
            drafts, states = session.draft(early, positions, noise)
            round_.drafts = list(drafts.split(1, dim=1))
        else:
            states = self._draft_one_by_one(session, round_, early, positions)
        _, logits = session.decode(states, late, positions)
        round_.verify(logits)

    def _draft_one_by_one(self, session: Session, round_: Round, early: range, positions: Tensor) -> Tensor:
        """Draft by what the round makes of the logits, which may be another head's: states [A, T, D]."""
        model, draft = session.model, self.draft_model or session.model
        token, states = session.newest, []
        for place in range(round_.length):
            states.append(session.run(model.embed(token), early, positions[:, place : place + 1]))
            token = round_.draft(draft.unembed(states[-1]))
        states.append(session.run(model.embed(token), early, positions[:, -1:]))
        return torch.cat(states, dim=1)

    def _speculative(self, draft: MoEDecoder) -> Speculative:
        return Speculative(draft, self.draft_length, self.coupling, self.exit_layer)


def _begin_alike(model: MoEDecoder, draft: MoEDecoder, exit_layer: int) -> bool:
    """Whether the draft's embedding and first layers are the model's own, run in the same way."""
    return (
        type(draft) is type(model)
        and draft.config == model.config
        and draft.embedding is model.embedding
        and all(draft.blocks[layer] is model.blocks[layer] for layer in range(exit_layer))
    )
