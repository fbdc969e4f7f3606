"""DraftVerify: drafting stops below a confidence that is moved until most drafts are accepted (Draft & Verify, Zhang et
al., arXiv 2309.08168, section 3.3).

Next: `dynamic_exit_layer.py`, which chooses the exit layer too.
"""

from torch import Tensor

from layerskip_moe.generation.policies.fixed import check_length
from layerskip_moe.generation.policies.heuristic import check_threshold
from layerskip_moe.generation.policies.policy import RoundReport
from layerskip_moe.generation.session import Session

# The paper's constants. With AR the running acceptance rate and g the threshold, after each row's round:
#   AR <- RATE_MEMORY AR + (1 - RATE_MEMORY) accepted / drafted
#   g~ =  g + STEP where AR < TARGET, else g where all that may be drafted was, else g - STEP
#   g  <- MEMORY g + (1 - MEMORY) g~
_TARGET, _STEP, _MEMORY, _RATE_MEMORY = 0.9, 0.01, 0.9, 0.5


class DraftVerify:
    """Drafts until one is less probable than a threshold, which rises while fewer than 90% are accepted and falls while
    more are. The threshold is one for all rows: a probability means the same in each.

    exit_layer: the layers that draft, 1..L
    length:     the most drafts in a round, the paper's d_max
    threshold:  to begin with; None: the paper's, 0.8 where the first text is greedy and 0.5 where it is sampled
    """

    shadow = False

    def __init__(self, exit_layer: int, *, length: int = 8, threshold: float | None = None) -> None:
        check_length("length", length)
        if threshold is not None:
            check_threshold(threshold)
        self.exit_layer, self.length, self.threshold = exit_layer, length, threshold
        self.rates: dict[int, float] = {}  # AR by row number; a row's first round is its own average

    def plan(self, session: Session) -> list[tuple[int, int]]:
        """As many as may be: `should_stop` ends it."""
        if self.threshold is None:
            self.threshold = 0.8 if session.sampling.greedy else 0.5
        return [(self.exit_layer, self.length)] * len(session.row_numbers)

    def should_stop(self, confidence: Tensor, position: int) -> Tensor:
        """After a draft below the threshold."""
        assert self.threshold is not None, "`plan` came before"
        return confidence < self.threshold

    def observe(self, round: RoundReport) -> None:
        """Move the threshold."""
        assert self.threshold is not None, "`plan` came before"
        for row, drafted, accepted in zip(round.rows, round.drafted, round.accepted, strict=True):
            if not drafted:
                continue
            rate = accepted / drafted
            self.rates[row] = _RATE_MEMORY * self.rates.get(row, rate) + (1 - _RATE_MEMORY) * rate
            aim = self.threshold
            if self.rates[row] < _TARGET:
                aim += _STEP
            elif drafted < self.length:
                aim -= _STEP
            self.threshold = _MEMORY * self.threshold + (1 - _MEMORY) * aim
