"""Adaptive: drafts as much as promises most tokens per second, by what is seen of this text and timed on this machine.

Expected tokens come from `acceptance.py`, seconds from `reckoning.py`, and what both come to from `plans.py`.

A rows, K drafts at most, L layers. Knows nothing of how a round is made. Next: `../self_speculative.py`.
"""

import math
import weakref
from collections.abc import Sequence
from dataclasses import replace

from layerskip_moe.generation.cost_model import CostModel
from layerskip_moe.generation.fit_cost_model import fit_cost_model
from layerskip_moe.generation.policies.acceptance import Acceptance
from layerskip_moe.generation.policies.exits import MOST_DRAFTS, candidate_exits
from layerskip_moe.generation.policies.fixed import check_length
from layerskip_moe.generation.policies.judging import judged_drafts, judged_shadow
from layerskip_moe.generation.policies.new_text import NewText
from layerskip_moe.generation.policies.plans import PLAIN, best_by_margin, best_length, lookup_worth
from layerskip_moe.generation.policies.policy import RoundReport
from layerskip_moe.generation.policies.reckoning import Reckoning
from layerskip_moe.generation.policies.text_lookup import REPEATED, TextLookup
from layerskip_moe.generation.session import MOST_NOISE, Session
from layerskip_moe.nn import MoEDecoder, few_rows
from layerskip_moe.nn.int8_copies import are_made_unasked, why_no_int8
from layerskip_moe.nn.ragged import MarginRule, Stage
from layerskip_moe.refusals import shown

_BETTER = 1.02  # by how much another plan must be better before it takes the present one's place
# By how much drafting must promise to be faster than plain decoding, of one row, of few or by int8 copies, and of more:
# the cost model is no more exact than that.
_PAYS, _PAYS_FOR_SEVERAL, _PAYS_IN_BATCHES = 1.03, 1.06, 1.2
_FEW = 4  # rows whose weights are waited for longer than their sums
_MOST_ROWS_INT8 = few_rows.MOST_ROWS // 2  # of which each may have a draft
_MOST = 7  # drafts of a row in a round, of the weights themselves
_RETHINK, _RETHINK_SEVERAL = 8, 32  # rounds from one choice of a plan to the next, of one row and of more
# Rounds from one look at what other exits would have said to the next: at first, and later, times the rows.
_LOOK, _LOOK_LATER = 10, 96
_REST, _LONGEST_REST = 16, 256  # steps of plain decoding from one look to the next, where drafting does not pay
_SHORTER = 4  # times a text's rest is shorter at first than the last one's next would have been, of the same kind
_KNOWN = 30  # drafts judged of each exit, after which a text may begin without a look
_DOUBT = 0.15  # of a fitted cost model: how far drafting may be from what it says, beside plain steps
_SURE = 0.08  # doubt beyond this is worth a try of what else may be best
# Times the margin at which the layers that propose are right half of the time: with what margin they are followed.
_SURE_TIMES = 6.0
_LOOK_UP = 16  # plain steps from one lookup to the next, of texts that do not repeat themselves
_SELDOM = 8  # rounds of several rows from one lookup to the next, likewise
_TIMED = 4  # plain steps that are timed, at the end of a rest


class Adaptive:
    """Maximises expected tokens / expected seconds of a round over exit layers and how sure a draft must be, no drafts
    included.

    All rows of a batch draft by the same layers, each as many tokens as pay: a draft that is right with probability
    p, as are those before it, adds p tokens, and the time of a place more; so it is kept where p is at least that
    time times the tokens per second of the best plan. How likely a draft is right is told by its margin
    (`MarginRule`); where margins are not known, all rows draft a fixed number. Several rows wait for the one that
    drafts most, so the number of their drafts is limited, too. For one row, int8 drafts are made in two stages where
    at least as many layers then choose as propose (`Stage`): the first third proposes where it is sure, or the text
    does, where it repeats itself. What followed in a text that has done so for long is drafted as it is, no layer
    asked (`text_lookup.py`): at the end of such rounds, in batches beside other rows' int8 drafts, and else in rounds
    of their own, where these promise more tokens per second. The plan is chosen anew every 8 rounds, of several rows
    every 32, and changed for one that is 2% better, by what exits promise and by how much of their promises they have
    kept; drafting must promise 3% more than plain decoding, 6% of two to four rows or by int8 copies, 20% of more, and
    less while costs are in doubt. Every now and then a round asks what other exits would have said. Where drafting does
    not pay, decoding is plain for 16 steps, then 32, and so on up to 256, from look to look; a text of the same kind
    begins with a quarter of what the last one's next rest would have been. What was learnt of acceptance is kept from
    text to text, and how long steps take beside what was reckoned, too: where it is in doubt which of the two is
    faster, the other one is tried.

    length: the most drafts of a row in a round, K; None: 7, or 31 int8 ones or such that are looked up. Of several
        rows as many as make 64 places together, of 33 to 64 none
    cost_model: seconds of a round, which are taken as they are; None: fitted to the model when first needed, see
        `fit_cost_model`, and corrected by how long steps take
    int8_drafts: whether drafts are made from int8 copies of the weights; None: of up to 32 rows, where they can be, on
        a processor with AVX2 or AVX-512, and where they take 1 GiB or less; with a cost model, as that has it. Then
        exits are up to the last layer. (What is told of other exits is of the weights themselves, which is nearly the
        same.)
    lookup: whether texts that repeat themselves are drafted from
    """

    should_stop = None
    shadow_places = 8  # of a look, which is mostly the head on these, for every exit

    def __init__(
        self,
        *,
        length: int | None = None,
        cost_model: CostModel | None = None,
        int8_drafts: bool | None = None,
        lookup: bool = True,
    ) -> None:
        if length is not None:
            check_length("length", length)
        self.length, self.cost_model = length, cost_model
        if int8_drafts not in (None, True, False):
            raise ValueError(f"int8_drafts={shown(int8_drafts)} must be True, False or None.")
        self.int8_drafts = cost_model is not None and cost_model.int8_drafts
        if cost_model is not None and int8_drafts not in (None, self.int8_drafts):
            raise ValueError("the cost model is of the other kind of drafts; leave out int8_drafts.")
        self._wants_int8, self.lookup = int8_drafts, lookup
        self.exits: tuple[int, ...] = ()
        self.shadow = self.experts = False
        self.margin_rule: MarginRule | None = None
        self.stage: Stage | None = None
        self.lookup_drafts: Sequence[Sequence[int]] = ()
        self._given = cost_model is not None
        self._prepared_for: weakref.ref[MoEDecoder] | None = None
        self._prepared_how: tuple[int, bool] | None = None  # for so many rows, and whether rounds may be one call
        # By whether texts are greedy, and filtered, and drafts are int8.
        self._acceptances: dict[tuple[bool, bool, bool], Acceptance] = {}
        self._acceptance: Acceptance | None = None
        self._is_new_text, self._text_lookup = NewText(), TextLookup()
        self._text_lookups: dict[tuple[bool, bool, bool], TextLookup] = {}  # likewise
        # (A given cost model is taken as it is.)
        self._reckoning = None if cost_model is None else Reckoning(cost_model, doubt=0.0)
        self._last: tuple[int, int] | None = None  # what the last round was: exit layer and rows; None: none
        self._rounds = self._rest = self._looks = 0
        self._to_look, self._next_rest, self._looks_on = _LOOK, 0, False
        self._plan, self._rows = PLAIN, list[int]()
        self._kind: tuple[tuple[bool, bool, bool], int] | None = None  # of this text, and how many rows it began with
        self._n_layers, self._most_int8 = 0, MOST_DRAFTS
        self._has_room = False  # whether texts end after the longest drafts of this round
        self._tells_margins, self._filters = True, False  # whether rounds do; whether this text is filtered

    def prepare(self, model: MoEDecoder, rows: int, one_call: bool = True) -> None:
        """Before a batch of so many rows is decoded: time the model, once. Not a part of decoding. Raises ValueError
        for a model that a given cost model is not of."""
        cost, config = self.cost_model, model.config
        if not self._given:
            wants = (
                rows <= _MOST_ROWS_INT8 and are_made_unasked(model) if self._wants_int8 is None else self._wants_int8
            )
            self.int8_drafts = wants and one_call and why_no_int8(model) is None
        self.exits = candidate_exits(config.n_layers, deep=self.int8_drafts)
        if not self._given:
            drafting = (*self.exits, config.n_layers) if self.int8_drafts else self.exits
            cost = fit_cost_model(model, rows, exits=drafting, int8_drafts=self.int8_drafts)
        assert cost is not None
        if not cost.is_of(config):
            raise ValueError("the cost model is of another network; fit one to this model, or leave it out.")
        if self._prepared_for is None or self._prepared_for() is not model:
            self._acceptances, self._text_lookups, self._looks, self._to_look = {}, {}, 0, _LOOK
            self._is_new_text, self._plan, self._rest, self._rows, self._kind = NewText(), PLAIN, 0, [], None
        if cost is not self.cost_model:
            self._reckoning = Reckoning(cost, doubt=_DOUBT)
        self.cost_model, self._prepared_for, self._prepared_how = cost, weakref.ref(model), (rows, one_call)

    def rests(self, session: Session) -> int:
        """How many steps are plain decoding from here on, of which nothing is to be told but of the first."""
        if self._is_new_text(session):
            self._begin(session)
        n_rows = len(session.row_numbers)
        if not self._rest:
            return 0 if self._most_drafts(n_rows) else _LOOK_UP
        if n_rows < len(self._rows) and min(session.remaining) > _REST:  # of fewer rows another plan may be best
            return 0
        if self._looks_on or self._rest >= _TIMED:  # (to ask takes time, too)
            self._looks_on = any(self._look_up(session))
            if self._looks_on:
                return 0
        steps = min(max(self._rest - _TIMED, 1), _LOOK_UP)  # (the last ones are timed, each by itself)
        self._rest -= steps
        return steps

    def rested(self, rows: int, seconds: float) -> None:
        """How long that step took. The last few before a look count, which are not cold, and next to what follows."""
        self._last = None
        if self._rest < _TIMED:
            assert self._reckoning is not None, "`prepare` came before"
            self._reckoning.see_plain(rows, seconds)

    def _begin(self, session: Session) -> None:
        """Another text: of this one nothing is known yet. Where nothing is known at all, its prompt is looked at."""
        if not self._given:
            how, of = (len(session.stats), session.one_call), self._prepared_for
            if of is None or of() is not session.model or how != self._prepared_how:  # (or texts take turns)
                self.prepare(session.model, *how)
                self._is_new_text(session)
        self._n_layers = session.model.config.n_layers
        self.exits = candidate_exits(self._n_layers, deep=self.int8_drafts)
        # (Noise is drawn for all drafts that there may be.)
        drawn = MOST_NOISE // session.model.config.vocab_size // len(session.row_numbers) - 1
        self._most_int8 = MOST_DRAFTS if session.sampling.greedy else min(max(drawn, _MOST), MOST_DRAFTS)
        # Greedy text and sampled text are not equally easy.
        kind = session.sampling.greedy, session.sampling.filters, self.int8_drafts
        if kind not in self._acceptances:
            whole = [self._n_layers] if self.int8_drafts else []
            self._acceptances[kind] = Acceptance(self.exits, sure=whole)
        of_so_many = kind, len(session.row_numbers)
        goes_on, self._kind = self._kind == of_so_many, of_so_many
        self._acceptance = self._acceptances[kind]
        self._acceptance.begin()
        self._text_lookup = self._text_lookups.setdefault(kind, TextLookup())
        self._text_lookup.begin()
        self._next_rest = self._next_rest // _SHORTER if goes_on else 0
        self._rest, self._plan, self._last, self._looks_on = 0, PLAIN, None, False
        self._rows = list[int]()
        self._filters = session.sampling.filters
        if not self._acceptance.seen:  # people's text is harder than the model's own, and no measure of it for long
            for row, by_exit in zip(session.row_numbers, session.prompt_agreement(self.exits), strict=False):
                for exit_layer, judged in by_exit.items():
                    self._acceptance.see(row, exit_layer, judged, exits_told=len(self.exits))
        elif self._acceptance.seen > _KNOWN:
            self._choose(session.row_numbers)
            if not self._plan.exit_layer:
                self._begin_rest()

    def _begin_rest(self) -> None:
        """Steps of plain decoding, twice as many as the last time."""
        self._rest = max(self._next_rest, _REST)
        self._next_rest = min(2 * self._rest, _LONGEST_REST)

    def plan(self, session: Session) -> list[tuple[int, int]]:
        """The pair of each row; the same as in the last round, mostly."""
        if self._is_new_text(session):
            self._begin(session)
        assert self._acceptance is not None
        rows = session.row_numbers
        self.shadow, self.experts, self.margin_rule, self.stage, self.lookup_drafts = False, False, None, None, ()
        if self._rest:
            self.lookup_drafts = self._look_up(session)
            if any(self.lookup_drafts):
                return [(1, 0)] * len(rows)
        self._rest, self._rounds = 0, self._rounds + 1
        every = _RETHINK if len(rows) == 1 else _RETHINK_SEVERAL
        if not self._plan.exit_layer or self._rounds % every == 0 or rows != self._rows:
            self._choose(rows)
        self._has_room = min(session.remaining) > self._plan.length
        # (A look takes as much longer as there are rows, and comes the later for that: not where fewer rows are left.)
        apart = min(_LOOK + 2 * self._looks * len(rows) ** 2, _LOOK_LATER * len(rows))
        self._to_look = min(self._to_look, apart) - 1
        drafts = self._plan.exit_layer > 0
        self.shadow = not drafts or self._to_look <= 0
        self.experts = self.shadow and drafts
        if self.shadow:
            self._looks += 1
            self._to_look = min(_LOOK + 2 * self._looks * len(rows) ** 2, _LOOK_LATER * len(rows))
        elif len(rows) == 1 or self._looks_on or self._rounds % _SELDOM == 0:
            self.lookup_drafts = self._look_up(session)
            self._looks_on = any(self.lookup_drafts)
        self.stage = self._stage(session)
        if drafts and self._plan.least > 0:
            halves = [self._acceptance.half(row, self._plan.exit_layer) for row in rows]
            self.margin_rule = MarginRule(halves, self._plan.least)
        return [(self._plan.exit_layer or 1, self._plan.length)] * len(rows)

    def _stage(self, session: Session) -> Stage | None:
        """How one row's int8 drafts are made: the first layers propose where they are sure."""
        assert self._acceptance is not None and self._reckoning is not None
        [row, *more], proposing = session.row_numbers, self._reckoning.proposing
        if more or not self._reckoning.in_stages(self._plan.exit_layer):
            return None
        sure = _SURE_TIMES * self._acceptance.half(row, self._told(proposing))
        looks_up = self.lookup and self._text_lookup.pays(row, len(session.new_tokens[0]))
        return Stage(proposing, sure, sure_lookup=REPEATED if looks_up else 0)

    def _look_up(self, session: Session) -> list[list[int]]:
        """For each row drafts that no layer is asked for, where they promise most tokens per second: what followed in a
        text that repeats itself. (Rounds in stages look up themselves.)"""
        assert self._reckoning is not None
        n_rows, exit_layer = len(session.row_numbers), 0 if self._rest else self._plan.exit_layer
        one_call = session.one_call and self.int8_drafts
        most = min(self.length or self._most_int8, few_rows.MOST_ROWS // n_rows - 1)
        in_stages = n_rows == 1 and one_call and exit_layer and self._reckoning.in_stages(exit_layer)
        if not self.lookup or most < 1 or in_stages:
            return []
        found = self._text_lookup.drafts(session, most)
        drafts = [tokens for _, tokens in found]
        if not any(drafts):  # mostly
            return []
        if exit_layer and n_rows > 1:  # the others are to draft meanwhile, or not to wait
            return drafts if one_call or all(drafts) else []
        plain = n_rows / self._reckoning.seconds(0, 0, n_rows, n_rows)
        best = max(plain, self._plan.truly if exit_layer else 0.0)
        return drafts if lookup_worth(self._reckoning, found) > self._pays(n_rows) * best else []

    def _told(self, layer: int) -> int:
        """The exit that is known of next to that layer."""
        assert self._acceptance is not None
        return min(self._acceptance.told, key=lambda exit_layer: abs(exit_layer - layer))

    def _choose(self, rows: list[int]) -> None:
        """The best plan, unless the present one is nearly as good."""
        assert self._acceptance is not None and self._reckoning is not None
        reckoning = self._reckoning
        pays = self._pays(len(rows))
        # What is not done now is tried where it may well be better.
        tried = math.exp(max(reckoning.doubt - _SURE, 0.0) * (1 if self._plan.exit_layer else -1))
        plain = replace(PLAIN, worth=len(rows) / reckoning.seconds(0, 0, len(rows), len(rows)))
        same = rows == self._rows
        known = max(plain.worth, self._plan.truly if self._plan.exit_layer and same else 0.0)
        plans = [replace(plain, worth=plain.worth * tried * pays)]
        length = self._most_drafts(len(rows))
        for exit_layer in self._acceptance.exits:
            of_exit = self._acceptance, reckoning, exit_layer, rows, length
            if self._knows_margins:
                plan = best_by_margin(*of_exit, worth=known, int8=self.int8_drafts)
            else:
                plan = best_length(*of_exit)
            plans.append(replace(plan, trust=reckoning.trust(exit_layer)))
        best = max(plans, key=lambda plan: plan.truly)
        present = next(plan for plan in plans if plan.exit_layer == self._plan.exit_layer)
        # (Where a row has ended, what the others draft by is recorded; another exit would have to be, at first.)
        goes_on = same or bool(self._rows and present.exit_layer)
        self._plan = present if goes_on and best.truly <= _BETTER * present.truly else best
        self._rows = rows

    def _pays(self, n_rows: int) -> float:
        """By how much drafting for so many rows must promise to be faster than plain decoding."""
        several = _PAYS_FOR_SEVERAL if n_rows <= _FEW or self.int8_drafts else _PAYS_IN_BATCHES
        return _PAYS if n_rows == 1 else several

    def _most_drafts(self, n_rows: int) -> int:
        """Of each of so many rows. Verification of more than 64 places is another kind of work than that of fewer."""
        length = self.length or (self._most_int8 if self.int8_drafts else _MOST)
        if n_rows > few_rows.MOST_ROWS:
            return length
        return min(length, few_rows.MOST_ROWS // n_rows - 1)

    @property
    def _knows_margins(self) -> bool:
        return self._tells_margins and not self._filters

    def observe(self, round: RoundReport) -> None:
        """Learn what was accepted, and where it was asked what other exits would have said and how many experts were
        read; then perhaps rest."""
        assert self._acceptance is not None and self._reckoning is not None
        unknown = {*round.exit_layers} - {0, *self._acceptance.exits}
        if unknown or (round.shadow is not None and round.shadow.shape[1] != self._n_layers):  # another thread's model
            return
        if max(round.exit_layers) and self._tells_margins != (round.judged is not None):
            self._tells_margins, self._rows = not self._tells_margins, []  # and plan anew
        self._reckoning.see_staged(round)
        for index, count in enumerate(round.looked_up):
            right = round.accepted[index] - round.made[index]
            if count and right >= 0:  # (behind a wrong draft nothing is known)
                self._text_lookup.see(round.rows[index], count, right)
        for index, row in enumerate(round.rows):  # (another thread may have had another plan made meanwhile)
            if round.exit_layers[index]:
                self._acceptance.see(row, round.exit_layers[index], judged_drafts(round, index))
        if round.shadow is not None:
            self._last = None
            others = self._acceptance.told
            for row, exit_layer, judged in judged_shadow(round, others):
                self._acceptance.see(row, exit_layer, judged, exits_told=len(others))
            self._reckoning.see_experts(round)
        elif any(round.looked_up):  # which says nothing of what drafting takes
            self._last = None
        else:
            self._see_seconds(round)
        if self._rest:  # which goes on
            self._rest -= 1
        elif self._plan.exit_layer:
            self._next_rest = 0
        else:
            self._begin_rest()

    def _see_seconds(self, round: RoundReport) -> None:
        """How long a round took that was like the one before: the first of a kind is recorded."""
        assert self._reckoning is not None
        kind = max(round.exit_layers), len(round.drafted)
        if kind[0] and kind == self._last:
            as_planned = kind[0] == self._plan.exit_layer and self._has_room
            self._reckoning.see_round(round, self._plan.worth if as_planned else 0.0)
        self._last = kind
