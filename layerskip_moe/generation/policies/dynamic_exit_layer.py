"""DEL: exit layer and draft length by how often every layer would have been right lately (Dynamic Exit Layer, Zarch et
al., arXiv 2504.05598).

A active rows, L layers, T places of a round. Knows nothing of time: a layer is its unit of cost, whatever it costs to
verify several tokens at once. Next: `cascade.py`, which measures.
"""

import torch
from torch import Tensor

from layerskip_moe.generation.policies.fixed import check_length, is_share
from layerskip_moe.generation.policies.new_text import NewText
from layerskip_moe.generation.policies.policy import RoundReport
from layerskip_moe.generation.session import Session
from layerskip_moe.refusals import shown


class DEL:
    """Each round drafts with the exit layer l and length d that promise most tokens per layer run,

        TPL(l, d) = (1 + a_l + ... + a_l^d) / (d l + L),    l in 1..L-1, d in 0..length,

    where a_l is how often layer l's shadow token was the full model's, by row: counts over the places of each round up
    to the first mismatch, older ones weighted down by `decay` per round. A row begins with one place, half agreed upon,
    for every layer, or where there was a text before, agreed upon as often as the layer was right in it, all rows
    together (the paper does not say). Drafting stops early below the mean of two mean confidences, that of accepted
    drafts and that of the first refused ones, decayed likewise; these are counted over all rows and all texts.

    length: the most drafts in a round, the paper's d_max
    decay:  0 (the last round alone) to 1 (all rounds alike)
    """

    shadow = True

    def __init__(self, *, length: int = 8, decay: float = 0.95) -> None:
        check_length("length", length)
        if not is_share(decay):
            raise ValueError(f"decay={shown(decay)} must be between 0 (the last round alone) and 1 (all rounds alike).")
        self.length, self.decay = length, decay
        self.agreed: dict[int, list[float]] = {}  # by row number, for each layer: places it was right at
        self.places: dict[int, float] = {}  # by row number: of how many
        self.prior: list[float] | None = None  # by layer, how often it was right in the last text; None: there was none
        self.accepted, self.refused = [0.0, 0.0], [0.0, 0.0]  # drafts: sum of confidences, how many
        self._is_new = NewText()
        self._n_layers = 0

    def plan(self, session: Session) -> list[tuple[int, int]]:
        """By row, the pair of most tokens per layer."""
        if self._is_new(session):
            self._pool()
        if session.model.config.n_layers != self._n_layers:  # what is known is of another model
            self.agreed, self.places, self.prior = {}, {}, None
            self._n_layers = session.model.config.n_layers
        plan = []
        for row in session.row_numbers:
            agreed, places = self._counts(row, session.model.config.n_layers)
            plan.append(best_pair([count / places for count in agreed], self.length))
        return plan

    def should_stop(self, confidence: Tensor, position: int) -> Tensor | bool:
        """After a draft that is more like the refused ones."""
        if not (self.accepted[1] and self.refused[1]):
            return False
        return confidence < (self.accepted[0] / self.accepted[1] + self.refused[0] / self.refused[1]) / 2

    def observe(self, round: RoundReport) -> None:
        """Count who was right."""
        assert round.shadow is not None, "it was asked for"
        if round.shadow.shape[1] != self._n_layers:  # of another model's text, which another thread decodes
            return
        last = round.tokens.new_tensor(round.accepted)[:, None]
        context_held = torch.arange(round.tokens.shape[1], device=round.tokens.device) <= last
        right = (round.shadow == round.tokens[:, None]) & context_held[:, None]
        for row, counts, accepted in zip(round.rows, right.sum(dim=-1).tolist(), round.accepted, strict=True):
            before, places = self._counts(row, len(counts))
            self.agreed[row] = [self.decay * old + new for old, new in zip(before, counts, strict=True)]
            self.places[row] = self.decay * places + accepted + 1
        for sums in (self.accepted, self.refused):
            sums[:] = [self.decay * value for value in sums]
        for confidences, accepted in zip(round.confidences, round.accepted, strict=True):
            for place, confidence in enumerate(confidences[: accepted + 1]):
                sums = self.accepted if place < accepted else self.refused
                sums[:] = [sums[0] + confidence, sums[1] + 1]

    def _counts(self, row: int, n_layers: int) -> tuple[list[float], float]:
        """A row's `agreed` and `places`; before its first round, one place."""
        if row in self.places:
            return self.agreed[row], self.places[row]
        return self.prior or [0.5] * n_layers, 1.0

    def _pool(self) -> None:
        """Make the rows' counts the next text's prior."""
        if self.places:
            places = sum(self.places.values())
            self.prior = [sum(counts) / places for counts in zip(*self.agreed.values(), strict=True)]
        self.agreed, self.places = {}, {}


def best_pair(acceptance: list[float], length: int) -> tuple[int, int]:
    """(l, d) of the largest TPL for acceptance[l - 1] of each layer and d up to `length`; of equal ones the fewest
    drafts of the earliest layer."""
    n_layers = len(acceptance)
    best, most = (1, 0), 1 / n_layers
    for exit_layer in range(1, n_layers):
        tokens = reached = 1.0
        for drafts in range(1, length + 1):
            reached *= acceptance[exit_layer - 1]
            tokens += reached
            if tokens / (drafts * exit_layer + n_layers) > most:
                best, most = (exit_layer, drafts), tokens / (drafts * exit_layer + n_layers)
    return best
