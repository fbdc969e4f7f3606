"""The second half of a speculative round, whoever drafted: the full model's choices at every drafted place, and
how many drafts they bear out.

A active rows, T = draft length + 1 places per verification, V vocabulary.
Knows nothing of where drafts and logits came from. Next: `self_speculative.py`, `speculative.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from layerskip_moe.generation.sampling import choose_with_confidence, log_probabilities
from layerskip_moe.generation.session import Session
from layerskip_moe.nn.noise import hash_uniform
from layerskip_moe.nn.ragged import before_the_first_wrong
from layerskip_moe.refusals import require_index, shown

# "shared": draft and full model choose with the same noise, and the full model's choice is the output, so the text
# equals plain decoding's token for token. "rejection": accept a draft x with probability min(1, p(x) / q(x)), else
# draw from max(p - q, 0) normalised (arXiv 2211.17192): the distribution is kept, not the text.
Coupling = Literal["shared", "rejection"]

# Independent streams of noise for coupling="rejection"; stream 0 is the shared one.
_DRAFT, _ACCEPT, _REPLACE = 1, 2, 3


def check_drafting(draft_length: int, coupling: Coupling) -> None:
    """Raise ValueError for a draft length below 1 and for an unknown coupling."""
    require_index("draft_length", draft_length)
    if draft_length < 1:
        raise ValueError(f"draft_length={draft_length} must be 1 or more; plain decoding is Autoregressive().")
    if coupling not in ("shared", "rejection"):
        raise ValueError(f"coupling={shown(coupling)} is unknown; it is 'shared' or 'rejection'.")


@dataclass
class Round:
    """One round of drafting and verifying.

    limits:     how many drafts each row gets; who drafts lowers it where a row is to draft no more
    confident:  whether `confidence` is wanted
    noise:      [A, most drafts planned + 1, V] for the drafts, and for the full model's choices if shared; None when
                greedy
    drafts:     tokens drafted so far, each [A, 1], of no meaning in rows beyond their limit; none where a round is one
                call
    scores:     what they were chosen by, each [A, 1, V]; kept for rejection alone
    confidence: [R], how probable the newest draft of each row that has one was to who drafted it
    """

    session: Session
    rejection: bool
    limits: list[int]
    confident: bool
    noise: Tensor | None
    drafts: list[Tensor] = field(default_factory=list)
    scores: list[Tensor] = field(default_factory=list)
    confidence: Tensor | None = None

    @classmethod
    def begin(cls, session: Session, lengths: Sequence[int], coupling: Coupling, *, confident: bool = False) -> "Round":
        """Settle how much to draft, at most lengths[r] in row r: the full model adds a token of its own, so a row
        that may get r more has use for r - 1 drafts."""
        limits = [min(length, left - 1) for length, left in zip(lengths, session.remaining, strict=True)]
        rejection = coupling == "rejection" and not session.sampling.greedy
        noise = session.noise(max(limits) + 1, stream=_DRAFT if rejection else 0)
        return cls(session, rejection, limits, confident, noise)

    @property
    def length(self) -> int:
        """Drafts of the row that gets most."""
        return max(self.limits)

    def draft(self, logits: Tensor, rows: Tensor | None = None) -> Tensor:
        """Choose the next draft of each row, [A, 1], from the drafter's logits [A, 1, V]; or of some rows [R] from
        logits [R, 1, V]."""
        session, place = self.session, len(self.drafts)
        scores = session.scores(logits, self.drafts, rows)
        noise = None if self.noise is None else self.noise[:, place : place + 1]
        noise = noise if noise is None or rows is None else noise[rows]
        if self.confident:
            tokens, confidence = choose_with_confidence(scores, session.sampling, noise)
            self.confidence = confidence[:, 0]
        else:
            tokens = session.choose(scores, noise)
        self.drafts.append(self._spread(tokens, rows))
        if self.rejection:
            self.scores.append(self._spread(scores, rows))
        return self.drafts[-1]

    def settle(self, logits: Tensor) -> tuple[Tensor, list[int]]:
        """With the full model's logits [A, T, V] after the newest token and after every draft: tokens [A, T], and how
        many drafts of each row were accepted; so many of its tokens and one more are the text."""
        session = self.session
        scores = session.scores(logits, self.drafts)
        if self.rejection:  # also without drafts: that others in the batch have some must change nothing
            drafts = torch.cat([session.newest[:, :0], *self.drafts], dim=1)
            draft_scores = torch.cat([scores[:, :0], *self.scores], dim=1)
            return _reject(session, drafts, draft_scores, scores, self.limits)
        tokens = session.choose(scores, None if self.noise is None else self.noise[:, : logits.shape[1]])
        if not self.drafts:
            return tokens, [0] * len(tokens)
        return tokens, before_the_first_wrong(torch.cat(self.drafts, dim=1) == tokens[:, :-1], self.limits)

    def verify(self, logits: Tensor) -> None:
        """`settle`, and end the round."""
        tokens, accepted = self.settle(logits)
        self.session.append(tokens, accepted, drafted=self.limits)

    def _spread(self, some: Tensor, rows: Tensor | None) -> Tensor:
        """[R, ...] of some rows -> [A, ...], zeros in the others."""
        if rows is None:
            return some
        return some.new_zeros(len(self.limits), *some.shape[1:]).index_copy(0, rows, some)


def _reject(
    session: Session, drafts: Tensor, draft_scores: Tensor, scores: Tensor, limits: Sequence[int]
) -> tuple[Tensor, list[int]]:
    """Accept or reject drafts [A, T-1] of q (draft_scores [A, T-1, V]) against p (scores [A, T, V]).

    Returns tokens [A, T], and how many drafts of each row were accepted: these and one more count. The acceptance
    tests, the drafts and the replacements have independent noise, as the proof in arXiv 2211.17192 needs. Noise met
    again at a later round belongs to a place whose earlier outcome was thrown away unseen.
    """
    length = drafts.shape[1]
    sampling = session.sampling
    p, q = log_probabilities(scores, sampling).exp(), log_probabilities(draft_scores, sampling).exp()
    p_of_draft = p[:, :length].gather(-1, drafts[..., None])[..., 0]
    q_of_draft = q.gather(-1, drafts[..., None])[..., 0]
    places = session.cache.lengths[:, None] + torch.arange(1, length + 1, device=drafts.device)
    coin = hash_uniform(sampling.seed, _ACCEPT, session.rows[:, None], places)
    accepted = before_the_first_wrong(coin * q_of_draft < p_of_draft, limits)

    residual = (p[:, :length] - q).clamp(min=0)
    total = residual.sum(-1, keepdim=True)
    # p == q leaves nothing over; rounding may still have called it a rejection: then p itself is right.
    replacement = torch.where(total > 0, residual, p[:, :length])
    # A row whose every counted draft was accepted draws its extra token from p.
    place = torch.arange(length, device=drafts.device)
    from_p = (place == drafts.new_tensor(limits)[:, None])[..., None]
    replacement = torch.cat([torch.where(from_p, p[:, :length], replacement), p[:, length:]], dim=1)
    noise = session.noise(length + 1, stream=_REPLACE)
    assert noise is not None
    replaced = (replacement.log() + noise).argmax(dim=-1)
    kept = torch.cat(
        [place < drafts.new_tensor(accepted)[:, None], torch.zeros_like(replaced[:, :1], dtype=torch.bool)], dim=1
    )
    padded = torch.cat([drafts, replaced[:, :1]], dim=1)
    return torch.where(kept, padded, replaced), accepted
