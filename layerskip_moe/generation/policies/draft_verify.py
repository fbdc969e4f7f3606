"""DraftVerify: drafting stops below a confidence that is moved until most drafts are accepted (Draft & Verify, Zhang et
al., arXiv 2309.08168, section 3.3).

Next: `dynamic_exit_layer.py`, which chooses the exit layer too.
"""

from torch import Tensor

from layerskip_moe.generation.policies.fixed import check_length
from layerskip_moe.generation.policies.heuristic import check_threshold
from layerskip_moe.generation.policies.new_text import NewText
from layerskip_moe.generation.policies.policy import RoundReport
from layerskip_moe.generation.session import Session

# The paper's constants. With AR the running acceptance rate and g the threshold, after each row's round:
#   AR <- RATE_MEMORY AR + (1 - RATE_MEMORY) accepted / drafted
#   g~ =  g + STEP where AR < TARGET, else g where all that may be drafted was, else g - STEP
#   g  <- MEMORY g + (1 - MEMORY) g~
_TARGET, _STEP, _MEMORY, _RATE_MEMORY = 0.9, 0.01, 0.9, 0.5
_GREEDY, _SAMPLED = 0.8, 0.5  # g to begin with


class DraftVerify:
    """Drafts until one is less probable than a threshold, which rises while fewer than 90% are accepted and falls while
    more are. The threshold is one for all rows: a probability means the same in each. There are two, of greedy texts
    and of sampled ones, each kept from one text of its kind to the next; the rows' acceptance rates are not.

    exit_layer: the layers that draft, 1..L
    length:     the most drafts in a round, the paper's d_max
    threshold:  to begin with; None: the paper's, 0.8 where a text is greedy and 0.5 where it is sampled
    """

    shadow = False

    def __init__(self, exit_layer: int, *, length: int = 8, threshold: float | None = None) -> None:
        check_length("length", length)
        if threshold is not None:
            check_threshold(threshold)
        self.exit_layer, self.length = exit_layer, length
        # By whether texts are greedy.
        self.thresholds = (
            {True: _GREEDY, False: _SAMPLED} if threshold is None else dict.fromkeys((True, False), threshold)
        )
        self.greedy = True  # of the text at hand
        self.rates: dict[int, float] = {}  # AR by row number; a row's first round is its own average
        self._is_new = NewText()

    def plan(self, session: Session) -> list[tuple[int, int]]:
        """As many as may be: `should_stop` ends it."""
        if self._is_new(session):
            self.greedy, self.rates = session.sampling.greedy, {}
        return [(self.exit_layer, self.length)] * len(session.row_numbers)

    def should_stop(self, confidence: Tensor, position: int) -> Tensor:
        """After a draft below the threshold."""
        return confidence < self.thresholds[self.greedy]

    def observe(self, round: RoundReport) -> None:
        """Move the threshold."""
        threshold = self.thresholds[self.greedy]
        for row, drafted, accepted in zip(round.rows, round.drafted, round.accepted, strict=True):
            if not drafted:
                continue
            rate = accepted / drafted
            self.rates[row] = _RATE_MEMORY * self.rates.get(row, rate) + (1 - _RATE_MEMORY) * rate
            aim = threshold
            if self.rates[row] < _TARGET:
                aim += _STEP
            elif drafted < self.length:
                aim -= _STEP
            threshold = _MEMORY * threshold + (1 - _MEMORY) * aim
        self.thresholds[self.greedy] = threshold
