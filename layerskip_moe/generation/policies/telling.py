"""Telling: where a text has repeated itself for long, what followed before is likely to follow again, and no layer is
needed to draft it.

A text that has repeated itself for m tokens goes on to do so for k more with a probability of about m / (m + k). Each
row has a budget, which grows while what it told was right; where it was wrong, the row is not asked for a while.

Knows nothing of time. Next: `adaptive.py`, which weighs what is told against it; `../ngrams.py`, which looks up.
"""

from dataclasses import dataclass

from layerskip_moe.generation.ngrams import Text
from layerskip_moe.generation.session import Session
from layerskip_moe.nn.ragged import TOLD_PER_REPEATED, Stage

REPEATED = Stage(1, 0.0).sure_lookup  # last tokens that must have stood in the text before
_BUDGET, _LEAST_BUDGET = 8, 4  # drafts of a row at first, and where they were wrong
_WAIT, _LONGEST_WAIT = 16, 256  # tokens from drafts that were wrong to the next, twice as many each time
_PAYS = 0.3  # share of the drafts that must have been right


@dataclass
class _Row:
    """What is known of one row: its text; how many new tokens it had when it was asked last, and how many of these the
    text has; the most drafts that it tells; until which new token it is not asked, and for how many more where it is
    wrong again."""

    text: Text | None = None
    at: int = 0
    known: int = 0
    budget: int = _BUDGET
    until: int = 0
    wait: int = _WAIT


class Telling:
    """What the rows of one batch tell, and how right they were."""

    def __init__(self) -> None:
        self._rows: dict[int, _Row] = {}

    def begin(self) -> None:
        """Forget the rows: other texts begin."""
        self._rows.clear()

    def pays(self, row: int, new_tokens: int) -> bool:
        """Whether what that row's text tells is worth drafting, now that it has so many new tokens."""
        of_row = self._rows.setdefault(row, _Row())
        of_row.at = new_tokens
        return new_tokens >= of_row.until

    def tell(self, session: Session, most: int) -> list[tuple[int, list[int]]]:
        """For each active row, by how many tokens its text has repeated itself, `REPEATED` or more, and what followed,
        `most` drafts at most; 0 and [] where it does not, or is not asked."""
        found = []
        for index, (row, new, left) in enumerate(
            zip(session.row_numbers, session.new_tokens, session.remaining, strict=True)
        ):
            of_row = self._rows.setdefault(row, _Row())
            if of_row.text is None:
                of_row.text = Text(session.text(index), REPEATED, REPEATED)
            else:
                of_row.text.extend(new[of_row.known :])
            of_row.known = len(new)
            repeated = of_row.text.repeated() if self.pays(row, len(new)) else 0
            count = min(TOLD_PER_REPEATED * repeated, of_row.budget, most, left - 1)
            found.append((repeated, of_row.text.continuation(count)) if count > 0 else (0, []))
        return found

    def see(self, row: int, told: int, right: int) -> None:
        """Of so many drafts that the row's text told when it was asked last, these were right."""
        of_row = self._rows.setdefault(row, _Row())
        if right >= _PAYS * told:
            of_row.wait = _WAIT
            of_row.budget = max(of_row.budget, 2 * told) if right == told else of_row.budget
        else:
            of_row.until, of_row.budget = of_row.at + of_row.wait, max(of_row.budget // 2, _LEAST_BUDGET)
            of_row.wait = min(2 * of_row.wait, _LONGEST_WAIT)


def expected_right(repeated: int, told: int) -> float:
    """How many of so many drafts are right, before the first that is not, of a text that has repeated itself for so
    many tokens."""
    return sum(repeated / (repeated + count) for count in range(1, told + 1))
