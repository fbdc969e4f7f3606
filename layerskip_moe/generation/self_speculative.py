"""SelfSpeculative: the first layers draft, the remaining layers verify all drafts in one pass
(LayerSkip, arXiv 2404.16710, section 4.3).

The draft's keys, values and exit states are kept, so verification runs only the layers the draft left out,
and the early ones for the newest draft, which the draft had no need to run. What is rejected is forgotten
by not counting it.

Knows nothing of how a session stores its rows. Next: `verification.py`, `session.py`.
"""

from dataclasses import dataclass

import torch

from layerskip_moe.generation.autoregressive import check_exit_layer
from layerskip_moe.generation.session import Session
from layerskip_moe.generation.verification import Coupling, Round, check_drafting
from layerskip_moe.nn import ModelConfig


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
    """

    exit_layer: int
    draft_length: int = 4
    coupling: Coupling = "shared"

    def __post_init__(self) -> None:
        check_drafting(self.draft_length, self.coupling)

    def check(self, config: ModelConfig) -> None:
        """Raise ValueError where the model has no such exit layer."""
        check_exit_layer(self.exit_layer, config)

    def start(self, session: Session) -> None:
        """Run the prompts."""
        session.prefill()

    def step(self, session: Session) -> None:
        """One round: draft, verify, append what the full model chose."""
        model = session.model
        round_ = Round.begin(session, self.draft_length, self.coupling)
        positions = session.positions(round_.length + 1)
        early, late = range(self.exit_layer), range(self.exit_layer, model.config.n_layers)
        token, states = session.newest, []
        for place in range(round_.length + 1):
            states.append(session.run(model.embed(token), early, positions[:, place : place + 1]))
            if place < round_.length:
                token = round_.draft(model.unembed(states[-1]))
        hidden = session.run(torch.cat(states, dim=1), late, positions)
        round_.verify(model.unembed(hidden))
