"""Cascade: drafts only while that is measured to pay, and as many as pay best (utility-driven speculative decoding for
Mixture-of-Experts, Saxena et al., arXiv 2506.20675).

Verifying several tokens reads the union of their experts, so that on these models drafting may not pay.
Knows nothing of layers or experts: it looks at the clock. Next: `../self_speculative.py`, which reports the times.
"""

from statistics import mean, median

from layerskip_moe.generation.policies.fixed import check_length
from layerskip_moe.generation.policies.new_text import NewText
from layerskip_moe.generation.policies.policy import RoundReport
from layerskip_moe.generation.session import Session
from layerskip_moe.refusals import require_index


class Cascade:
    """Chooses the draft length K by its utility,

        U(K) = tokens per round and row / (seconds per round / seconds per plain round).

    Plain rounds measure the time to compare with, `trial` of them. Then the test phase climbs from the last K that was
    best in at most `trials` trials of `trial` rounds each: up where the first one's utility is 1 or more, else down,
    until it falls; where none paid, K = 1 is tried too, before drafting is given up. The K of the largest utility is
    set for `rounds` rounds, or 0 where that is below 1; each time that it is 0 again the phase lasts twice as long.
    Test and set phases follow each other.

    A round has one time for all rows of a batch, so they have one K. A new text, or another number of rows, begins with
    a test phase from `start`; only the seconds of plain rounds of so many rows are kept, if they were ever measured.
    Times are medians: the first round of a kind is recorded and takes longer.

    exit_layer: the layers that draft, 1..L
    start:      the K of a text's first trial (ours; the constants below are the paper's)
    length:     the most drafts in a round (ours)
    trial, trials, rounds: see above
    int8_drafts: whether drafts are made from int8 copies of the weights, see `SelfSpeculative` (ours)
    """

    shadow = False
    should_stop = None

    def __init__(
        self,
        exit_layer: int,
        *,
        start: int = 2,
        length: int = 8,
        trial: int = 4,
        trials: int = 4,
        rounds: int = 16,
        int8_drafts: bool = False,
    ) -> None:
        for name, value in (("start", start), ("length", length)):
            check_length(name, value)
        for name, value in (("trial", trial), ("trials", trials), ("rounds", rounds)):
            require_index(name, value)
            if value < 1:
                raise ValueError(f"{name}={value} must be 1 or more.")
        self.exit_layer, self.length, self.trial, self.trials, self.rounds = exit_layer, length, trial, trials, rounds
        self.int8_drafts = int8_drafts
        self.draft_length = 0  # K in use
        self._start = self._climb_from = min(start, length)
        self._plain_seconds: dict[int, float] = {}  # by number of rows
        self._n_rows = 0  # of the rounds that are noted
        self._is_new = NewText()
        self._off_rounds = rounds  # how long the next phase at K = 0 lasts
        self._utilities: dict[int, float] = {}  # by K, of the trials of this test phase
        self._begin("plain", 0, trial)

    def plan(self, session: Session) -> list[tuple[int, int]]:
        """One K for all rows."""
        rows = session.row_numbers
        if self._is_new(session) or len(rows) != self._n_rows:
            self._n_rows, self._climb_from, self._off_rounds = len(rows), self._start, self.rounds
            if self._n_rows in self._plain_seconds:
                self._begin_test()
            else:
                self._begin("plain", 0, self.trial)
        return [(self.exit_layer, self.draft_length)] * len(rows)

    def observe(self, round: RoundReport) -> None:
        """Note the round, and at the end of a phase choose the next."""
        if any(drafted != self.draft_length for drafted in round.drafted):
            return  # a row was near its end
        self._tokens.append(mean(round.accepted) + 1)
        self._seconds.append(round.seconds)
        if len(self._tokens) < self._phase_rounds:
            return
        seconds = median(self._seconds)
        if self.draft_length == 0:
            self._plain_seconds[self._n_rows] = seconds
        if self._phase != "test":
            self._begin_test()
            return
        self._utilities[self.draft_length] = mean(self._tokens) / (seconds / self._plain_seconds[self._n_rows])
        following = self._next_trial()
        if following is None:
            self._set()
        else:
            self._begin("test", following, self.trial)

    def _begin(self, phase: str, draft_length: int, rounds: int) -> None:
        self._phase, self.draft_length, self._phase_rounds = phase, draft_length, rounds
        self._tokens: list[float] = []
        self._seconds: list[float] = []

    def _begin_test(self) -> None:
        self._utilities = {}
        self._begin("test", self._climb_from, self.trial)

    def _next_trial(self) -> int | None:
        """The K to try after the newest trial; None where the climb is over."""
        utilities = list(self._utilities.values())
        fell = len(utilities) > 1 and utilities[-1] < utilities[-2]
        following = self.draft_length + (1 if utilities[0] >= 1 else -1)
        if not fell and len(utilities) < self.trials and 1 <= following <= self.length:
            return following
        return 1 if max(utilities) < 1 and 1 not in self._utilities else None

    def _set(self) -> None:
        best = max(self._utilities, key=self._utilities.__getitem__)
        self._climb_from = best
        if self._utilities[best] >= 1:
            self._off_rounds = self.rounds
            self._begin("set", best, self.rounds)
        else:
            self._begin("set", 0, self._off_rounds)
            self._off_rounds *= 2
