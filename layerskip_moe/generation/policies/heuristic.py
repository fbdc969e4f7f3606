"""Heuristic: transformers' rule for how many tokens to draft.

Next: `draft_verify.py`, which adapts the threshold instead of the length.
"""

from torch import Tensor

from layerskip_moe.generation.policies.fixed import check_length, is_share
from layerskip_moe.generation.policies.new_text import NewText
from layerskip_moe.generation.policies.policy import RoundReport
from layerskip_moe.generation.session import Session
from layerskip_moe.refusals import shown


class Heuristic:
    """`num_assistant_tokens_schedule="heuristic"` of transformers, with its `assistant_confidence_threshold`: two more
    drafts after a round whose drafts were all accepted, else one less, but at least one; and no more in a round after a
    draft less probable than the threshold. (transformers also moves the threshold where scikit-learn is installed; this
    one stays.) A new text begins with `length` again, as transformers' "heuristic_transient" does.

    exit_layer: the layers that draft, 1..L
    length:     drafts of a row's first round, transformers' `num_assistant_tokens`
    threshold:  0 to 1
    """

    shadow = False

    def __init__(self, exit_layer: int, *, length: int = 20, threshold: float = 0.4) -> None:
        check_length("length", length)
        check_threshold(threshold)
        self.exit_layer, self.length, self.threshold = exit_layer, length, threshold
        self.lengths: dict[int, int] = {}  # by row number
        self._is_new = NewText()

    def plan(self, session: Session) -> list[tuple[int, int]]:
        """Each row by what became of its last round."""
        if self._is_new(session):
            self.lengths = {}
        return [(self.exit_layer, self.lengths.get(row, self.length)) for row in session.row_numbers]

    def should_stop(self, confidence: Tensor, position: int) -> Tensor:
        """After an improbable draft."""
        return confidence < self.threshold

    def observe(self, round: RoundReport) -> None:
        """Two more, or one less."""
        for row, drafted, accepted in zip(round.rows, round.drafted, round.accepted, strict=True):
            length = self.lengths.get(row, self.length)
            if drafted:  # a row that may get one more token drafts none
                self.lengths[row] = length + 2 if accepted == drafted else max(1, length - 1)


def check_threshold(threshold: float) -> None:
    """Raise ValueError unless it is a probability."""
    if not is_share(threshold):
        raise ValueError(f"threshold={shown(threshold)} must be between 0 (never stop) and 1: it is a probability.")
