"""SelfSpeculative: the first layers draft, the remaining layers verify all drafts in one pass
(LayerSkip, arXiv 2404.16710, section 4.3).

The draft's keys, values and exit states are kept, so verification runs only the layers the draft left out,
and the early ones for the newest draft, which the draft had no need to run. What is rejected is forgotten
by not counting it.

A active rows, T = draft length + 1 positions per verification, V vocabulary.
Knows nothing of how a session stores its rows. Next: `session.py`, `sampling.py`.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from layerskip_moe.generation.sampling import log_probabilities
from layerskip_moe.generation.session import Session
from layerskip_moe.nn import ModelConfig
from layerskip_moe.nn.noise import hash_uniform

# Independent streams of noise for coupling="rejection"; stream 0 is the shared one.
_DRAFT, _ACCEPT, _REPLACE = 1, 2, 3


@dataclass(frozen=True)
class SelfSpeculative:
    """Draft with the first `exit_layer` layers, verify with the rest.

    exit_layer:   n in 1..L; L drafts with the whole model
    draft_length: tokens drafted per round, 1 or more
    coupling:     "shared": draft and full model choose with the same noise, and the full model's choice is
                  the output, so the text equals plain decoding's token for token at any temperature.
                  "rejection": accept a draft x with probability min(1, p(x) / q(x)), else draw from
                  max(p - q, 0) normalised (arXiv 2211.17192); keeps the distribution, not the text, and
                  accepts somewhat more. Greedy decoding is the same under both.
    """

    exit_layer: int
    draft_length: int = 4
    coupling: Literal["shared", "rejection"] = "shared"

    def __post_init__(self) -> None:
        if self.draft_length < 1:
            raise ValueError(f"draft_length={self.draft_length} must be 1 or more; plain decoding is Autoregressive().")
        if self.coupling not in ("shared", "rejection"):
            raise ValueError(f"coupling={self.coupling!r} is unknown; it is 'shared' or 'rejection'.")

    def check(self, config: ModelConfig) -> None:
        """Raise ValueError where the model has no such exit layer."""
        if not 1 <= self.exit_layer <= config.n_layers:
            raise ValueError(
                f"exit_layer={self.exit_layer} must be between 1 and n_layers={config.n_layers}: "
                "it counts the layers that draft."
            )

    def step(self, session: Session) -> None:
        """One round: draft, verify, append what the full model chose."""
        model = session.model
        remaining = session.remaining
        # The full model adds a token of its own, so a row that may get r more has use for r - 1 drafts.
        length = min(self.draft_length, max(remaining) - 1)
        drafted = [min(length, left - 1) for left in remaining]
        rejection = self.coupling == "rejection" and not session.sampling.greedy
        noise = session.noise(length + 1, stream=_DRAFT if rejection else 0)

        positions = session.positions(length + 1)
        early, late = range(self.exit_layer), range(self.exit_layer, model.config.n_layers)
        token, drafts, states, draft_logits = session.newest, [], [], []
        for place in range(length + 1):
            states.append(session.run(model.embed(token), early, positions[:, place : place + 1]))
            if place < length:
                draft_logits.append(model.unembed(states[-1]))
                token = session.choose(draft_logits[-1], None if noise is None else noise[:, place : place + 1])
                drafts.append(token)

        hidden = session.run(torch.cat(states, dim=1), late, positions)
        logits = model.unembed(hidden)
        limits = torch.tensor(drafted, device=logits.device)
        if rejection and length:
            tokens, accepted = _reject(session, torch.cat(drafts, 1), torch.cat(draft_logits, 1), logits, limits)
        else:
            tokens = session.choose(logits, noise)
            proposed = torch.cat([*drafts, tokens[:, :0]], dim=1)  # [A, length]
            accepted = torch.minimum(_leading_true(proposed == tokens[:, :length]), limits)
        session.append(tokens, accepted + 1, drafted=drafted)


def _leading_true(mask: Tensor) -> Tensor:
    """[A, T] bool -> [A]: how many are True before the first False."""
    return mask.long().cumprod(dim=1).sum(dim=1)


def _reject(
    session: Session, drafts: Tensor, draft_logits: Tensor, logits: Tensor, limits: Tensor
) -> tuple[Tensor, Tensor]:
    """Accept or reject drafts [A, T-1] of q (draft_logits [A, T-1, V]) against p (logits [A, T, V]).

    Returns tokens [A, T], of which accepted + 1 count, and accepted [A] <= limits. The acceptance tests, the
    drafts and the replacements have independent noise, as the proof in arXiv 2211.17192 needs. Noise met
    again at a later round belongs to a place whose earlier outcome was thrown away unseen.
    """
    length = drafts.shape[1]
    sampling = session.sampling
    p, q = log_probabilities(logits, sampling).exp(), log_probabilities(draft_logits, sampling).exp()
    p_of_draft = p[:, :length].gather(-1, drafts[..., None])[..., 0]
    q_of_draft = q.gather(-1, drafts[..., None])[..., 0]
    places = session.cache.lengths[:, None] + torch.arange(1, length + 1, device=drafts.device)
    coin = hash_uniform(sampling.seed, _ACCEPT, session.rows[:, None], places)
    accepted = torch.minimum(_leading_true(coin * q_of_draft < p_of_draft), limits)

    residual = (p[:, :length] - q).clamp(min=0)
    total = residual.sum(-1, keepdim=True)
    # p == q leaves nothing over; rounding may still have called it a rejection: then p itself is right.
    replacement = torch.where(total > 0, residual, p[:, :length])
    # A row whose every counted draft was accepted draws its extra token from p.
    place = torch.arange(length, device=drafts.device)
    from_p = (place == limits[:, None])[..., None]
    replacement = torch.cat([torch.where(from_p, p[:, :length], replacement), p[:, length:]], dim=1)
    noise = session.noise(length + 1, stream=_REPLACE)
    assert noise is not None
    replaced = (replacement.log() + noise).argmax(dim=-1)
    kept = torch.cat([place < accepted[:, None], torch.zeros_like(replaced[:, :1], dtype=torch.bool)], dim=1)
    padded = torch.cat([drafts, replaced[:, :1]], dim=1)
    return torch.where(kept, padded, replaced), accepted
