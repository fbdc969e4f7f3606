"""TextLookup: where a text has repeated itself for long, what followed before is likely to follow again, and no layer
is needed to draft it.

A text that has repeated itself for m tokens goes on to do so for k more with a probability of about m / (m + k). Each
row has a budget, which grows while its lookups are right; where they are wrong, nothing is looked up for a while,
twice as long each time, also from one text to the next, until one is right.

Knows nothing of time. Next: `adaptive.py`, which weighs such drafts against it; `../ngrams.py`, which looks up.
"""

from dataclasses import dataclass

from layerskip_moe.generation.ngrams import Text
from layerskip_moe.generation.session import Session
from layerskip_moe.nn.few_rows import MOST_ROWS
from layerskip_moe.nn.ragged import LOOK_BACK, MOST_PER_REPEATED

REPEATED = 8  # last tokens that must have stood in the text before
_BUDGET = 4  # drafts of a row at first, and at least
_WAIT, _LONGEST_WAIT = 32, 256  # tokens from drafts that were wrong to the next, twice as many each time
_PAYS = 0.5  # share of the drafts that must be right


@dataclass
class _Row:
    """What is known of one row: its text; how many new tokens it had when it was asked last, and how many of these the
    text has; its budget; until which new token nothing is looked up, and for how many more where it is wrong again; and
    whether it was told how many were right."""

    text: Text | None = None
    at: int = 0
    known: int = 0
    budget: int = _BUDGET
    until: int = 0
    wait: int = _WAIT
    told: bool = False


class TextLookup:
    """Of the rows of one batch after another, texts of one kind: what they say comes next, and how often that was
    right."""

    def __init__(self) -> None:
        self._rows: dict[int, _Row] = {}
        self._wait = _WAIT  # of a row of which nothing is known

    def begin(self) -> None:
        """Forget the rows, but for how long the one that was right last would wait: other texts begin."""
        self._wait = min((row.wait for row in self._rows.values() if row.told), default=self._wait)
        self._rows.clear()

    def pays(self, row: int, new_tokens: int) -> bool:
        """Whether that row's lookups are worth drafting, now that it has so many new tokens."""
        of_row = self._of(row)
        of_row.at = new_tokens
        return new_tokens >= of_row.until

    def drafts(self, session: Session, most: int) -> list[tuple[int, list[int]]]:
        """For each active row, by how many tokens its text has repeated itself, `REPEATED` or more, and what followed,
        `most` drafts at most; 0 and [] where it does not, or is not asked."""
        numbers, new_tokens, found = session.row_numbers, session.new_tokens, list[tuple[int, list[int]]]()
        rows = [self._of(row) for row in numbers]
        if any(row.text is None for row in rows):
            for row, tokens, new in zip(rows, session.texts(), new_tokens, strict=True):
                row.text, row.known = Text(tokens[-LOOK_BACK:], REPEATED, REPEATED), len(new)
        for number, row, new, left in zip(numbers, rows, new_tokens, session.remaining, strict=True):
            assert row.text is not None, "it was made"
            row.text.extend(new[row.known :])
            row.known = len(new)
            repeated = row.text.repeated(MOST_ROWS) if self.pays(number, len(new)) else 0
            count = min(MOST_PER_REPEATED * repeated, row.budget, most, left - 1)
            found.append((repeated, row.text.continuation(count)) if count > 0 else (0, []))
        return found

    def see(self, row: int, drafted: int, right: int) -> None:
        """Of so many drafts that were looked up when the row was asked last, these were right."""
        of_row = self._of(row)
        of_row.told = True
        if right >= _PAYS * drafted:
            of_row.wait = _WAIT
            of_row.budget = max(of_row.budget, 2 * drafted) if right == drafted else of_row.budget
        else:
            of_row.until, of_row.budget = of_row.at + of_row.wait, max(of_row.budget // 2, _BUDGET)
            of_row.wait = min(2 * of_row.wait, _LONGEST_WAIT)

    def _of(self, row: int) -> _Row:
        return self._rows.setdefault(row, _Row(wait=self._wait))


def expected_right(repeated: int, drafted: int) -> float:
    """How many of so many drafts are right, before the first that is not, of a text that has repeated itself for so
    many tokens."""
    return sum(repeated / (repeated + count) for count in range(1, drafted + 1))
