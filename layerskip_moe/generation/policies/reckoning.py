"""Reckoning: seconds that a round of the text at hand is expected to take, by now.

A cost model tells what rounds cost (`../cost_model.py`). A round that verifies several tokens reads the union of their
experts: how much smaller it is than that of independent choices is learnt from the text. Steps' own times tell how
drafting compares with plain decoding by now (`drift.py`), and rounds how much of what plans promised came true, which
depends on the exit, for neither costs nor acceptance are known exactly.

Knows nothing of acceptance. Next: `adaptive.py`, which weighs it against time.
"""

import math

from layerskip_moe.generation.cost_model import CostModel
from layerskip_moe.generation.policies.drift import Drift
from layerskip_moe.generation.policies.exits import has_stages, proposing_layers
from layerskip_moe.generation.policies.policy import RoundReport
from layerskip_moe.nn.ragged import Staged

_UNION_MEMORY = 0.8  # of the unions of earlier looks
_STAGED_MEMORY = 0.9  # of what was done in stages for a draft, from round to round
# Drafts in stages, and what was done for them: runs of either stage, places, runs of the head; while nothing is known.
_FIRST_STAGED = 20.0, 24.0, 10.0, 24.0, 34.0
_EXACT = 16  # parts of what is done for a draft that are told apart
_PROMISED = 40.0  # tokens promised, of which every exit is always taken to have kept all, beside those of its rounds,
# or, an early one where int8 drafts may be made by all layers, which are nearly always right, so much of them: what is
# mostly left of the best promise of several exits that are less well known, and which of them is best changes.
_KEPT = 0.9
_PROMISE_MEMORY = 0.95  # of an exit's promises, from round to round


class Reckoning:
    """Of one cost model."""

    def __init__(self, cost: CostModel, *, doubt: float) -> None:
        """doubt: how far drafting may be from what the cost model says, beside plain steps; 0: it is taken as it is,
        whatever steps really take"""
        self._cost, self._drift = cost, Drift(doubt)
        # Layers that propose where int8 drafts of one row are made in stages; 0: none are.
        self.proposing = proposing_layers(cost.n_layers) if cost.int8_drafts else 0
        self._staged: dict[int, list[float]] = {}  # by exit, drafts and what was done for them
        self._union = 1.0  # experts that places read, over those of independent choices
        self._known: dict[tuple[int, ...], float] = {}  # by what `_by_cost_model` is asked of
        self._promises: dict[int, list[float]] = {}  # by exit, tokens that came, and that were promised for the time

    @property
    def doubt(self) -> float:
        """As given, by now."""
        return self._drift.doubt

    @property
    def offset(self) -> float:
        """By how much drafting takes longer than the cost model says, beside plain steps, as a logarithm."""
        return self._drift.offset

    def seconds(self, exit_layer: int, longest: float, places: float, rows: int, most: float | None = None) -> float:
        """Seconds of a round, see `CostModel.amounts`; of numbers that are expected, between those of whole ones."""
        most, short, few = longest if most is None else most, int(longest), int(places)
        at = seconds = self._by_cost_model(exit_layer, short, few, rows)
        if longest > short:
            seconds += (longest - short) * (self._by_cost_model(exit_layer, short + 1, few, rows) - at)
        if places > few:
            seconds += (places - few) * (self._by_cost_model(exit_layer, short, few + 1, rows) - at)
        if most > longest:
            seconds += (most - longest) * (self._by_cost_model(exit_layer, short, few, rows, short + 1) - at)
        return seconds * math.exp(self._drift.offset) if most else seconds

    def _by_cost_model(self, exit_layer: int, longest: int, places: int, rows: int, most: int | None = None) -> float:
        """The same by the cost model alone: plans have much in common, and it is asked hundreds of times a choice."""
        most = longest if most is None else most
        round_ = exit_layer, longest, places, rows, most
        seconds = self._known.get(round_)
        if seconds is None:
            later = self._later(exit_layer, places)
            staged = self._expected(exit_layer, most) if rows == 1 else None
            amounts = self._cost.amounts(exit_layer, longest, most, rows, places, later, staged)
            seconds = self._known[round_] = max(self._cost.seconds_of(amounts), 1e-9)
        return seconds

    def in_stages(self, exit_layer: int) -> bool:
        """Whether that exit's drafts for one row are made in stages."""
        return has_stages(exit_layer, self.proposing)

    def _later(self, exit_layer: int, places: int) -> float:
        """Experts that verification reads beyond those of one place."""
        return self._union * self._cost.more_experts(exit_layer, places)

    def see_staged(self, round: RoundReport) -> None:
        """What was done in stages."""
        did = round.staged
        if did is None or not round.made[0]:
            return
        exit_layer = max(round.exit_layers)
        sums, before = self._staged.setdefault(exit_layer, [*_FIRST_STAGED]), self._expected(exit_layer, _EXACT)
        for part, amount in enumerate((round.made[0], did.proposing, did.choosing, did.places, did.heads)):
            sums[part] = _STAGED_MEMORY * sums[part] + amount
        if self._expected(exit_layer, _EXACT) != before:  # of which what is known was reckoned
            self._known.clear()

    def _expected(self, exit_layer: int, most: int) -> Staged | None:
        """What will be done in stages for so many drafts of that exit; None where they are not made so."""
        if not most or not self.in_stages(exit_layer):
            return None
        drafts, *did = self._staged.get(exit_layer, _FIRST_STAGED)
        # (Not to the last digit: rounds are the same then, and known. Neither stage runs less than once.)
        parts = [max(most * round(_EXACT * amount / drafts) / _EXACT, 1.0) for amount in did]
        proposing, choosing, places, heads = parts
        return Staged(self.proposing, proposing, choosing, places, heads)

    def trust(self, exit_layer: int) -> float:
        """The share of its promises that an exit has kept, of the last twenty rounds or so; near 1 while it has made
        few, or `_KEPT`, by a fitted cost model."""
        came, promised = self._promises.get(exit_layer, (0.0, 0.0))
        kept = _KEPT if self._cost.int8_drafts and exit_layer < self._cost.n_layers and self._drift.doubt else 1.0
        return (came + kept * _PROMISED) / (promised + _PROMISED)

    def see_plain(self, rows: int, seconds: float) -> None:
        """How long a step of plain decoding took."""
        self._drift.see(seconds, self._by_cost_model(0, 0, rows, rows), drafting=False)

    def see_round(self, round: RoundReport, promised: float) -> None:
        """How long a round took, and how many tokens it gave; promised: tokens per second, 0 where nothing was."""
        exit_layer, rows = max(round.exit_layers), len(round.drafted)
        places, most = sum(round.drafted) + rows, max(round.made)
        if round.staged is None:
            reckoned = self._by_cost_model(exit_layer, max(round.drafted), places, rows, most)
        else:  # what was done is known
            amounts = exit_layer, max(round.drafted), most, rows, places, self._later(exit_layer, places), round.staged
            reckoned = self._cost.seconds_of(self._cost.amounts(*amounts))
        self._drift.see(round.seconds, reckoned, drafting=True)
        if promised and self._drift.doubt:
            of_exit = self._promises.setdefault(exit_layer, [0.0, 0.0])
            of_exit[0] = _PROMISE_MEMORY * of_exit[0] + sum(round.accepted) + rows
            # Counted as if plain steps took as long as the cost model says: what slows all alike is no broken promise.
            of_exit[1] = _PROMISE_MEMORY * of_exit[1] + promised * round.seconds / math.exp(self._drift.level)

    def see_experts(self, round: RoundReport) -> None:
        """How many experts verification read, of those that independent choices would have."""
        places, exit_layer = sum(round.drafted) + len(round.drafted), max(round.exit_layers)
        if round.experts is None or places < 2 or not self._cost.more_experts(exit_layer, places):
            return
        read = self._cost.later_experts(exit_layer, round.experts) / self._cost.more_experts(exit_layer, places)
        self._union += (1 - _UNION_MEMORY) * (read - self._union)
        self._known.clear()
