"""Adaptive: drafts as much as promises most tokens per second, by what is seen of this text and timed on this machine.

Expected tokens come from `acceptance.py`, seconds from `../cost_model.py` and the rounds' own times. A round that
verifies several tokens reads the union of their experts: how much smaller it is than that of independent choices is
learnt from the text, too.

A rows, K drafts at most, L layers. Knows nothing of how a round is made. Next: `../self_speculative.py`.
"""

import math
import time
import weakref

from layerskip_moe.generation.cost_model import CostModel, fit_cost_model
from layerskip_moe.generation.policies.acceptance import Acceptance
from layerskip_moe.generation.policies.fixed import check_length
from layerskip_moe.generation.policies.new_text import NewText
from layerskip_moe.generation.policies.policy import RoundReport
from layerskip_moe.generation.session import Session
from layerskip_moe.nn import ModelConfig, MoEDecoder, few_rows

_BETTER = 1.02  # by how much another plan must be better before it takes the present one's place
_PAYS = 1.05  # by how much drafting must seem faster than plain decoding: what it costs to decide is in no round
_DOUBT = 0.5  # standard errors that acceptance is taken to be lower: the best of many guesses is a lucky one
_RETHINK = 4  # rounds from one choice of a plan to the next
_LOOK = 16  # rounds from one look at what other exits would have said to the next
_REST, _LONGEST_REST = 16, 128  # steps of plain decoding from one look to the next, where drafting does not pay
_TIME_MEMORY, _UNION_MEMORY = 0.9, 0.9  # of times and unions of earlier rounds, per round
_CAUTION = 0.8  # of the probability at which a draft no longer pays: what is known of it is rough
_NEVER = 1e-300  # a product of certainties below which none falls
_SPREAD = 0.4  # a round's time counts as at most e^0.4 of what was expected: some are interrupted


class Adaptive:
    """Maximises expected tokens / expected seconds of a round over exit layers and draft lengths, no drafts included.

    All rows of a batch draft by the same layers, each as many tokens as pay: a draft that is reached with probability p
    adds p tokens, and the time of a place more. While drafting, a draft is given up where it became so improbable that
    it pays no more, by its certainty.

    The present plan stays until another is better by 2%, and drafting must promise 5% over plain decoding. Every 16th
    round asks what other exits would have said; where drafting does not pay, decoding is plain for 16 steps, then 32,
    and so on up to 128, from look to look. What was learnt of acceptance and times is kept from text to text.

    length: the most drafts in a round, K
    cost_model: seconds of a round; None: fitted to the model when first needed, see `fit_cost_model`
    """

    should_stop = None

    def __init__(self, *, length: int = 8, cost_model: CostModel | None = None) -> None:
        check_length("length", length)
        self.length, self.cost_model = length, cost_model
        self.exits: tuple[int, ...] = ()
        self.shadow = self.experts = False
        self.give_up_below: list[float] | None = None
        self._given = cost_model is not None
        self._acceptance: Acceptance | None = None
        self._acceptances: dict[bool, Acceptance] = {}  # by whether the text is greedy
        self._prepared_for: weakref.ref[MoEDecoder] | None = None
        self._n_rows = 0
        self._filters = False
        self._running: tuple[int, int, float, float] | None = None  # step: exit, longest draft, seconds expected, since
        self._step_began = 0.0
        self._is_new_text = NewText()
        self._union = 1.0  # experts that places read, over those of independent choices
        self._drift: float = 0.0  # log of rounds' times over expected ones, of late
        self._residuals: dict[tuple[int, int], list[float]] = {}  # by exit and longest draft: mean, rounds
        self._rounds = self._rest = 0
        self._next_rest = _REST
        self._exit, self._lengths, self._rows = 0, list[int](), list[int]()

    def prepare(self, model: MoEDecoder, rows: int) -> None:
        """Before a batch of so many rows is decoded: time the model, once. Not a part of decoding. Raises ValueError
        for a model that a given cost model is not of."""
        self.exits = candidate_exits(model.config.n_layers)
        if self._prepared_for is None or self._prepared_for() is not model:
            self._acceptances = {}  # another model's are of no use
        if self._prepared_for is None or self._prepared_for() is not model or rows != self._n_rows:
            self._union, self._drift, self._residuals = 1.0, 0.0, {}
        self._prepared_for, self._n_rows = weakref.ref(model), rows
        if not self._given:
            self.cost_model = fit_cost_model(model, rows, exits=self.exits)
        assert self.cost_model is not None
        if not self.cost_model.is_of(model.config):
            raise ValueError("the cost model is of another network; fit one to this model, or leave it out.")

    def _settle(self, config: ModelConfig, *, greedy: bool) -> None:
        """Take up what is known of greedy text, or of sampled text: certainties do not compare."""
        self.exits = candidate_exits(config.n_layers)
        self._acceptance = self._acceptances.setdefault(greedy, Acceptance(self.exits, self.length))

    def rests(self, session: Session) -> bool:
        """Whether this step is one of plain decoding, of which nothing is to be told."""
        if not self._notice(session):
            self._tick()
        if not self._rest:
            return False
        self._rest -= 1
        if not self._given:
            self._running = (
                0,
                0,
                self._expected(0, 0, len(session.row_numbers), len(session.row_numbers)),
                self._step_began,
            )
        return True

    def plan(self, session: Session) -> list[tuple[int, int]]:
        """The pair of each row; the same as in the last round, mostly."""
        self._notice(session)
        rows = session.row_numbers
        if self._exit == 0 or self._rounds % _RETHINK == 0 or rows != self._rows:
            self._choose(rows)
        self.shadow = self._exit == 0 or self._rounds % _LOOK == _LOOK - 1
        self.experts = self._rounds % _RETHINK == 0
        self._rounds += 1
        return [(self._exit or 1, length) for length in self._lengths]

    def _notice(self, session: Session) -> bool:
        """Whether another text begins; then look at its prompt: how often the exits would have been right."""
        if not self._is_new_text(session):
            return False
        if self.cost_model is None:
            self.prepare(session.model, len(session.row_numbers))
        self._settle(session.model.config, greedy=session.sampling.greedy)
        assert self._acceptance is not None
        self._filters = session.sampling.filters
        self._acceptance.begin()
        self._rounds, self._rest, self._next_rest, self._rows = 0, 0, _REST, []
        for row, by_exit in zip(session.row_numbers, session.prompt_agreement(self.exits), strict=False):
            for exit_layer, right in by_exit.items():
                self._acceptance.see_text(row, exit_layer, right)
        self._running, self._step_began = None, time.perf_counter()
        return True

    def _choose(self, rows: list[int]) -> None:
        """The best plan, unless the present one is nearly as good."""
        plain = _PAYS * len(rows) / self._seconds(0, 0, len(rows), len(rows))
        plans = [(plain, 0, [0] * len(rows), 0.0), *(self._best_lengths(exit_layer, rows) for exit_layer in self.exits)]
        best = max(plans, key=lambda plan: plan[0])
        if rows == self._rows:
            present = next(plan for plan in plans if plan[1] == self._exit)
            best = best if best[0] > _BETTER * present[0] else present
        elif best[0] <= _BETTER * plain:
            best = plans[0]
        _, self._exit, self._lengths, floor = best
        self._rows = rows
        self.give_up_below = self._floors(floor)

    def _best_lengths(self, exit_layer: int, rows: list[int]) -> tuple[float, int, list[int], float]:
        """Tokens per second of the best lengths for drafts of that exit, the exit, the lengths, and the probability
        below which a draft that is reached no longer pays. Drafts are added from the likeliest to be reached on."""
        assert self._acceptance is not None
        drafts = []
        for index, row in enumerate(rows):
            reached = 1.0
            for place, rate in enumerate(self._acceptance.rates(row, exit_layer, doubt=_DOUBT)):
                reached *= rate
                drafts.append((reached, -place, index))
        lengths, tokens, best = [0] * len(rows), float(len(rows)), (0.0, exit_layer, [0] * len(rows), 0.0)
        for reached, _, index in sorted(drafts, reverse=True):
            lengths[index] += 1
            tokens += reached
            longest, places = max(lengths), sum(lengths) + len(rows)
            if places > few_rows.MOST_ROWS >= len(rows):  # beyond, verification is another kind of work
                break
            seconds = self._seconds(exit_layer, longest, places, len(rows))
            if tokens / seconds > best[0]:
                more = self._seconds(exit_layer, longest, places + 1, len(rows)) - seconds
                longer = self._seconds(exit_layer, longest + 1, places, len(rows), timed_as=longest)
                more += (longer - seconds) / len(rows)
                best = tokens / seconds, exit_layer, lengths.copy(), min(max(tokens / seconds * more, 0.0), 1.0)
            elif reached < 0.05:
                break
        return best

    def _floors(self, floor: float) -> list[float] | None:
        """The product of certainties below which a draft is given up, for each row; rows that draft may then draft one
        more than planned, while they are certain. Where too little is known of certainties, they are asked for."""
        assert self._acceptance is not None
        if not self._exit or self._filters:  # (filtered, drafts have no certainties)
            return None
        exponent = self._acceptance.exponent(self._exit)
        if exponent is None or sum(self._lengths) + 2 * len(self._lengths) > few_rows.MOST_ROWS:
            return [_NEVER] * len(self._lengths)
        self._lengths = [min(length + 1, self.length) if length else 0 for length in self._lengths]
        return [max((_CAUTION * floor) ** (1 / exponent), _NEVER)] * len(self._lengths)

    def _seconds(self, exit_layer: int, longest: int, places: int, rows: int, *, timed_as: int | None = None) -> float:
        """Seconds expected of a round, corrected by rounds of the same exit and longest draft, or of `timed_as`."""
        seconds = self._expected(exit_layer, longest, places, rows)
        mean, seen = self._residuals.get((exit_layer, longest if timed_as is None else timed_as), (0.0, 0.0))
        return seconds * math.exp(self._drift + mean * seen / (seen + 8))

    def _expected(self, exit_layer: int, longest: int, places: int, rows: int) -> float:
        """The cost model's seconds of a round of this text."""
        cost = self.cost_model
        assert cost is not None, "`prepare` came before"
        later = cost.more_experts(exit_layer, places) * self._union
        return max(cost.seconds_of(cost.amounts(exit_layer, longest, rows, places, later)), 1e-9)

    def observe(self, round: RoundReport) -> None:
        """Learn what was accepted, how long it took, and how many experts it read; then perhaps rest."""
        assert self._acceptance is not None
        for index, (row, drafted, accepted) in enumerate(zip(round.rows, round.drafted, round.accepted, strict=True)):
            if drafted:
                self._acceptance.see_draft(row, self._exit, drafted, accepted)
            certainties = round.certainties[index] if round.certainties is not None else []
            if drafted:
                self._acceptance.see_certainties(self._exit, certainties[:drafted], accepted)
            if len(certainties) > drafted == accepted:
                self._acceptance.see_given_up(row, self._exit, drafted, certainties[-1])
        if round.shadow is not None:
            self._see_shadow(round)
            self._acceptance.fit_exponents()
        self._see_experts(round)
        self._see_time(round)
        if self._exit == 0:
            self._rest, self._next_rest = self._next_rest, min(2 * self._next_rest, _LONGEST_REST)
        elif self._exit:
            self._next_rest = _REST

    def _see_shadow(self, round: RoundReport) -> None:
        assert round.shadow is not None and self._acceptance is not None
        counts = [accepted + 1 for accepted in round.accepted]
        right = (round.shadow == round.tokens[:, None]).tolist()
        for index, (row, count) in enumerate(zip(round.rows, counts, strict=True)):
            for exit_layer in self.exits:
                if exit_layer != round.exit_layers[index]:
                    self._acceptance.see_text(row, exit_layer, right[index][exit_layer - 1][:count])

    def _see_experts(self, round: RoundReport) -> None:
        cost, places = self.cost_model, sum(round.drafted) + len(round.drafted)
        if round.experts is None or places < 2 or cost is None:
            return
        expected = cost.more_experts(self._exit, places)
        pairs = zip(cost.moe_layers, round.experts, strict=True)
        if expected:
            read = sum(count - cost.top_k for layer, count in pairs if layer >= self._exit)
            self._union = _UNION_MEMORY * self._union + (1 - _UNION_MEMORY) * read / expected

    def _see_time(self, round: RoundReport) -> None:
        """Expect how long this round takes, and where there is no clock be told."""
        longest = max(round.drafted)
        exit_layer = max(round.exit_layers) if longest else 0
        expected = self._expected(exit_layer, longest, sum(round.drafted) + len(round.rows), len(round.rows))
        if self._given:
            self._took(exit_layer, longest, round.seconds / expected)
        elif round.shadow is None and exit_layer:  # (a look at other exits takes longer, and a plain one than a rest)
            self._running = exit_layer, longest, expected, self._step_began

    def _tick(self) -> None:
        """The step before is over: all of it has a price, from one plan to the next."""
        now = time.perf_counter()
        if self._running is not None:
            exit_layer, longest, expected, began = self._running
            self._took(exit_layer, longest, (now - began) / expected)
        self._running, self._step_began = None, now

    def _took(self, exit_layer: int, longest: int, ratio: float) -> None:
        """A step took so many times what was expected: all of late may, or those of this exit and longest draft."""
        mean, seen = self._residuals.get((exit_layer, longest), [0.0, 0.0])
        off = math.log(max(ratio, 1e-6))
        off = min(max(off, self._drift + mean - _SPREAD), self._drift + mean + _SPREAD)
        self._residuals[exit_layer, longest] = [
            mean + (off - self._drift - mean) / min(seen + 1, 20),
            min(seen + 1, 50),
        ]
        self._drift = _TIME_MEMORY * self._drift + (1 - _TIME_MEMORY) * (off - mean * seen / (seen + 8))


def candidate_exits(n_layers: int) -> tuple[int, ...]:
    """Exit layers that are worth trying: up to half of the layers, 1, 2, 3, 4, 6, 8, 12, 16, ..."""
    steps = sorted({2**power for power in range(12)} | {3 * 2**power for power in range(11)})
    return tuple(layer for layer in steps if layer <= max(n_layers // 2, 1) and layer < n_layers)
