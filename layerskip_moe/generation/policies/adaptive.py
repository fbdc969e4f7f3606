"""Adaptive: drafts as much as promises most tokens per second, by what is seen of this text and timed on this machine.

Expected tokens come from `acceptance.py`, seconds from `../cost_model.py`. A round that verifies several tokens reads
the union of their experts: how much smaller it is than that of independent choices is learnt from the text, too.
Steps' own times tell how drafting compares with plain decoding by now (`drift.py`).

A rows, K drafts at most, L layers. Knows nothing of how a round is made. Next: `../self_speculative.py`.
"""

import math
import weakref

from torch import Tensor

from layerskip_moe.generation.cost_model import CostModel, fit_cost_model
from layerskip_moe.generation.policies.acceptance import Acceptance
from layerskip_moe.generation.policies.drift import Drift
from layerskip_moe.generation.policies.fixed import check_length
from layerskip_moe.generation.policies.new_text import NewText
from layerskip_moe.generation.policies.policy import RoundReport
from layerskip_moe.generation.session import Session
from layerskip_moe.nn import MoEDecoder, few_rows

_BETTER = 1.02  # by how much another plan must be better before it takes the present one's place
# By how much drafting must promise to be faster than plain decoding, of one row and of several: the cost model is no
# more exact than that.
_PAYS, _PAYS_IN_BATCHES = 1.03, 1.1
_RETHINK = 4  # rounds from one choice of a plan to the next
# Rounds from one look at what other exits would have said to the next, times the rows: at first, and later.
_LOOK, _LOOK_LATER = 6, 48
_REST, _LONGEST_REST = 16, 256  # steps of plain decoding from one look to the next, where drafting does not pay
_UNION_MEMORY = 0.8  # of the unions of earlier looks
_DOUBT = 0.15  # of a fitted cost model: how far drafting may be from what it says, beside plain steps
_SURE = 0.08  # doubt beyond this is worth a try of what else may be best
_TIMED = 8  # plain steps that are timed, at the end of a rest


class Adaptive:
    """Maximises expected tokens / expected seconds of a round over exit layers and draft lengths, no drafts included.

    All rows of a batch draft by the same layers, each as many tokens as pay: a draft that is reached with probability p
    adds p tokens, and the time of a place more. The plan is chosen anew every fourth round, and changed for one that
    is 2% better; drafting must promise 3% more than plain decoding, 10% in batches, and less while costs are in doubt.
    Every now and then a round asks what other exits would have said. Where drafting does not pay, decoding is plain for
    16 steps, then 32, and so on up to 256, from look to look. What was learnt of acceptance is kept from text to text,
    and how long steps take beside what was reckoned, too: where it is in doubt which of the two is faster, the other
    one is tried.

    length: the most drafts in a round, K
    cost_model: seconds of a round, which are taken as they are; None: fitted to the model when first needed, see
        `fit_cost_model`, and corrected by how long steps take
    """

    should_stop = None

    def __init__(self, *, length: int = 7, cost_model: CostModel | None = None) -> None:
        check_length("length", length)
        self.length, self.cost_model = length, cost_model
        self.exits: tuple[int, ...] = ()
        self.shadow = self.experts = False
        self._given = cost_model is not None
        self._prepared_for: weakref.ref[MoEDecoder] | None = None
        self._acceptances: dict[bool, Acceptance] = {}  # by whether the text is greedy
        self._acceptance: Acceptance | None = None
        self._is_new_text = NewText()
        self._union = 1.0  # experts that places read, over those of independent choices
        self._reckoned: dict[tuple[int, int, int, int], float] = {}  # by exit layer, longest draft, places, rows
        self._drift = Drift(0.0)  # a given cost model is taken as it is
        self._last: tuple[int, int, int, int] | None = None  # what the last round was: as `_reckoned`; None: none
        self._rounds = self._rest = self._looks = 0
        self._to_look, self._next_rest = _LOOK, _REST
        self._exit, self._lengths, self._rows = 0, list[int](), list[int]()

    def prepare(self, model: MoEDecoder, rows: int) -> None:
        """Before a batch of so many rows is decoded: time the model, once. Not a part of decoding. Raises ValueError
        for a model that a given cost model is not of."""
        exits = candidate_exits(model.config.n_layers)
        cost = self.cost_model if self._given else fit_cost_model(model, rows, exits=exits)
        assert cost is not None
        if not cost.is_of(model.config):
            raise ValueError("the cost model is of another network; fit one to this model, or leave it out.")
        if self._prepared_for is None or self._prepared_for() is not model:
            self._acceptances, self._looks, self._to_look = {}, 0, _LOOK
            self._is_new_text, self._exit, self._rest, self._rows = NewText(), 0, 0, []
        if cost is not self.cost_model:
            self._drift, self._union = Drift(0.0 if self._given else _DOUBT), 1.0
            self._reckoned.clear()
        self.exits, self.cost_model, self._prepared_for = exits, cost, weakref.ref(model)

    def rests(self, session: Session) -> bool:
        """Whether this step is one of plain decoding, of which nothing is to be told."""
        if self._is_new_text(session):
            self._begin(session)
        if self._rest:
            self._rest -= 1
            return True
        return False

    def rested(self, rows: int, seconds: float) -> None:
        """How long that step took. The last few before a look count, which are not cold, and next to what follows."""
        self._last = None
        if self._rest < _TIMED:
            self._drift.see(seconds, self._reckoned_seconds(0, 0, rows, rows), drafting=False)

    def _begin(self, session: Session) -> None:
        """Another text: of this one nothing is known yet. Where nothing is known at all, its prompt is looked at."""
        is_another = self._prepared_for is not None and self._prepared_for() is not session.model
        if self.cost_model is None or is_another:  # (or texts of two models take turns)
            self.prepare(session.model, len(session.stats))
            self._is_new_text(session)
        self.exits = candidate_exits(session.model.config.n_layers)
        # Greedy text and sampled text are not equally easy.
        self._acceptance = self._acceptances.setdefault(session.sampling.greedy, Acceptance(self.exits))
        self._acceptance.begin()
        self._rest, self._next_rest, self._exit, self._rows, self._last = 0, _REST, 0, [], None
        if not self._acceptance.seen:  # people's text is harder than the model's own, and no measure of it for long
            for row, by_exit in zip(session.row_numbers, session.prompt_agreement(self.exits), strict=False):
                for exit_layer, right in by_exit.items():
                    self._acceptance.see_text(row, exit_layer, right)

    def plan(self, session: Session) -> list[tuple[int, int]]:
        """The pair of each row; the same as in the last round, mostly."""
        if self._is_new_text(session):
            self._begin(session)
        assert self._acceptance is not None
        rows, self._rounds = session.row_numbers, self._rounds + 1
        if self._exit == 0 or self._rounds % _RETHINK == 0 or rows != self._rows:
            self._choose(rows)
        self._to_look -= 1
        self.shadow = self._exit == 0 or self._to_look <= 0
        self.experts = self.shadow and self._exit > 0
        if self.shadow:
            self._looks += 1
            # (A look at many rows takes longer, and tells more.)
            self._to_look = min(_LOOK + 2 * self._looks * len(rows), _LOOK_LATER * len(rows))
        return [(self._exit or 1, length) for length in self._lengths]

    def _choose(self, rows: list[int]) -> None:
        """The best plan, unless the present one is nearly as good."""
        pays = _PAYS if len(rows) == 1 else _PAYS_IN_BATCHES
        # What is not done now is tried where it may well be better.
        tried = math.exp(max(self._drift.doubt - _SURE, 0.0) * (1 if self._exit else -1))
        plans = [(tried * pays * len(rows) / self._seconds(0, 0, len(rows), len(rows)), 0, [0] * len(rows))]
        plans += [self._best_lengths(exit_layer, rows) for exit_layer in self.exits]
        best = max(plans, key=lambda plan: plan[0])
        present = next(plan for plan in plans if plan[1] == self._exit)
        _, self._exit, self._lengths = best if best[0] > _BETTER * present[0] or rows != self._rows else present
        self._rows = rows

    def _best_lengths(self, exit_layer: int, rows: list[int]) -> tuple[float, int, list[int]]:
        """Tokens per second of the best lengths for drafts of that exit, the exit, and the lengths. Drafts are added
        from the likeliest to be reached on."""
        assert self._acceptance is not None
        drafts = []
        for index, row in enumerate(rows):
            reached, later = self._acceptance.rates(row, exit_layer)
            for place in range(self.length):
                drafts.append((reached, -place, index))
                reached *= later
        lengths, tokens, best = [0] * len(rows), float(len(rows)), (0.0, exit_layer, [0] * len(rows))
        for reached, _, index in sorted(drafts, reverse=True):
            lengths[index] += 1
            tokens += reached
            places = sum(lengths) + len(rows)
            if places > few_rows.MOST_ROWS >= len(rows):  # beyond, verification is another kind of work
                break
            worth = tokens / self._seconds(exit_layer, max(lengths), places, len(rows))
            if worth > best[0]:
                best = worth, exit_layer, lengths.copy()
            elif reached < 0.05:
                break
        return best

    def _seconds(self, exit_layer: int, longest: int, places: int, rows: int) -> float:
        """Seconds expected of a round of this text, by now."""
        reckoned = self._reckoned_seconds(exit_layer, longest, places, rows)
        return reckoned * math.exp(self._drift.offset) if longest else reckoned

    def _reckoned_seconds(self, exit_layer: int, longest: int, places: int, rows: int) -> float:
        """The same by the cost model alone: plans have much in common, and it is asked hundreds of times a choice."""
        plan = exit_layer, longest, places, rows
        seconds = self._reckoned.get(plan)
        if seconds is None:
            cost = self.cost_model
            assert cost is not None, "`prepare` came before"
            later = self._union * cost.more_experts(exit_layer, places)
            seconds = max(cost.seconds_of(cost.amounts(exit_layer, longest, rows, places, later)), 1e-9)
            self._reckoned[plan] = seconds
        return seconds

    def observe(self, round: RoundReport) -> None:
        """Learn what was accepted, and where it was asked what other exits would have said and how many experts were
        read; then perhaps rest."""
        assert self._acceptance is not None
        if not {*round.exit_layers} <= {0, *self.exits}:  # of another model's text, which another thread decodes
            return
        told = zip(round.rows, round.exit_layers, round.drafted, round.accepted, strict=True)
        for row, exit_layer, drafted, accepted in told:  # (another thread may have had another plan made meanwhile)
            if drafted:
                self._acceptance.see_draft(row, exit_layer, drafted, accepted)
        if round.shadow is not None:
            self._last = None
            self._see_shadow(round, round.shadow)
            self._see_experts(round)
        else:
            self._see_seconds(round)
        if self._exit:
            self._next_rest = _REST
        else:
            self._rest, self._next_rest = self._next_rest, min(2 * self._next_rest, _LONGEST_REST)

    def _see_seconds(self, round: RoundReport) -> None:
        """How long a round took that was like the one before: the first of a kind is recorded."""
        longest, places, rows = max(round.drafted), sum(round.drafted) + len(round.drafted), len(round.drafted)
        kind = max(round.exit_layers), longest, places, rows
        if longest and kind == self._last:
            self._drift.see(round.seconds, self._reckoned_seconds(*kind), drafting=True)
        self._last = kind

    def _see_shadow(self, round: RoundReport, shadow: Tensor) -> None:
        """What the other exits would have said, of the tokens that became text."""
        assert self._acceptance is not None
        right = (shadow == round.tokens[:, None]).tolist()
        for index, (row, accepted) in enumerate(zip(round.rows, round.accepted, strict=True)):
            for exit_layer in self.exits:
                if exit_layer != round.exit_layers[index]:
                    self._acceptance.see_text(row, exit_layer, right[index][exit_layer - 1][: accepted + 1])

    def _see_experts(self, round: RoundReport) -> None:
        """How many experts verification read, of those that independent choices would have."""
        cost, places, exit_layer = self.cost_model, sum(round.drafted) + len(round.drafted), max(round.exit_layers)
        if round.experts is None or places < 2 or cost is None or not cost.more_experts(exit_layer, places):
            return
        pairs = zip(cost.moe_layers, round.experts, strict=True)
        read = sum(count - cost.top_k for layer, count in pairs if layer >= exit_layer)
        self._union += (1 - _UNION_MEMORY) * (read / cost.more_experts(exit_layer, places) - self._union)
        self._reckoned.clear()


def candidate_exits(n_layers: int) -> tuple[int, ...]:
    """Exit layers that are worth trying: up to half of the layers, 1, 2, 3, 4, 6, 8, 12, 16, ..."""
    steps = sorted({2**power for power in range(12)} | {3 * 2**power for power in range(11)})
    return tuple(layer for layer in steps if layer <= max(n_layers // 2, 1) and layer < n_layers)
