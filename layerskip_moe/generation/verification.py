"""The second half of a speculative round, whoever drafted: the full model's choices at every drafted place, and
how many drafts they bear out.

A active rows, T = draft length + 1 places per verification, V vocabulary.
Knows nothing of where drafts and logits came from. Next: `self_speculative.py`, `speculative.py`.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from layerskip_moe.generation.sampling import log_probabilities
from layerskip_moe.generation.session import Session
from layerskip_moe.nn.noise import hash_uniform

# "shared": draft and full model choose with the same noise, and the full model's choice is the output, so the text
# equals plain decoding's token for token. "rejection": accept a draft x with probability min(1, p(x) / q(x)), else
# draw from max(p - q, 0) normalised (arXiv 2211.17192): the distribution is kept, not the text.
Coupling = Literal["shared", "rejection"]

# Independent streams of noise for coupling="rejection"; stream 0 is the shared one.
_DRAFT, _ACCEPT, _REPLACE = 1, 2, 3


def check_drafting(draft_length: int, coupling: Coupling) -> None:
    """Raise ValueError for a draft length below 1 and for an unknown coupling."""
    if draft_length < 1:
        raise ValueError(f"draft_length={draft_length} must be 1 or more; plain decoding is Autoregressive().")
    if coupling not in ("shared", "rejection"):
        raise ValueError(f"coupling={coupling!r} is unknown; it is 'shared' or 'rejection'.")


@dataclass
class Round:
    """One round of drafting and verifying.

    length:  tokens to draft; limits: how many of them each row has use for
    noise:   [A, length + 1, V] for the drafts, and for the full model's choices if shared; None when greedy
    drafts:  tokens drafted so far, each [A, 1]; scores: what they were chosen by, each [A, 1, V]
    """

    session: Session
    rejection: bool
    length: int
    limits: list[int]
    noise: Tensor | None
    drafts: list[Tensor] = field(default_factory=list)
    scores: list[Tensor] = field(default_factory=list)

    @classmethod
    def begin(cls, session: Session, draft_length: int, coupling: Coupling) -> "Round":
        """Settle how much to draft: the full model adds a token of its own, so a row that may get r more has use
        for r - 1 drafts."""
        remaining = session.remaining
        length = min(draft_length, max(remaining) - 1)
        rejection = coupling == "rejection" and not session.sampling.greedy
        noise = session.noise(length + 1, stream=_DRAFT if rejection else 0)
        return cls(session, rejection, length, [min(length, left - 1) for left in remaining], noise)

    def draft(self, logits: Tensor) -> Tensor:
        """Choose the next draft [A, 1] from the drafter's logits [A, 1, V]."""
        place = len(self.drafts)
        self.scores.append(self.session.scores(logits, self.drafts))
        noise = None if self.noise is None else self.noise[:, place : place + 1]
        self.drafts.append(self.session.choose(self.scores[-1], noise))
        return self.drafts[-1]

    def verify(self, logits: Tensor) -> None:
        """End the round with the full model's logits [A, T, V] after the newest token and after every draft."""
        session = self.session
        scores = session.scores(logits, self.drafts)
        limits = torch.tensor(self.limits, device=logits.device)
        if self.rejection and self.drafts:
            tokens, accepted = _reject(session, torch.cat(self.drafts, 1), torch.cat(self.scores, 1), scores, limits)
        else:
            tokens = session.choose(scores, self.noise)
            proposed = torch.cat([*self.drafts, tokens[:, :0]], dim=1)  # [A, length]
            accepted = torch.minimum(_leading_true(proposed == tokens[:, :-1]), limits)
        session.append(tokens, accepted + 1, drafted=self.limits)


def _leading_true(mask: Tensor) -> Tensor:
    """[A, T] bool -> [A]: how many are True before the first False."""
    return mask.long().cumprod(dim=1).sum(dim=1)


def _reject(
    session: Session, drafts: Tensor, draft_scores: Tensor, scores: Tensor, limits: Tensor
) -> tuple[Tensor, Tensor]:
    """Accept or reject drafts [A, T-1] of q (draft_scores [A, T-1, V]) against p (scores [A, T, V]).

    Returns tokens [A, T], of which accepted + 1 count, and accepted [A] <= limits. The acceptance tests, the
    drafts and the replacements have independent noise, as the proof in arXiv 2211.17192 needs. Noise met
    again at a later round belongs to a place whose earlier outcome was thrown away unseen.
    """
    length = drafts.shape[1]
    sampling = session.sampling
    p, q = log_probabilities(scores, sampling).exp(), log_probabilities(draft_scores, sampling).exp()
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
