"""Plans: how much an exit's drafts are worth, by how likely they are right and how long they take.

A rows, K drafts of each at most. Knows nothing of a text. Next: `acceptance.py` and `reckoning.py`, which it asks;
`adaptive.py`, which chooses between exits.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from layerskip_moe.generation.policies.acceptance import Acceptance
from layerskip_moe.generation.policies.reckoning import Reckoning
from layerskip_moe.generation.policies.text_lookup import expected_right

_SUREST = 0.98  # of how likely a draft must be right
# Of how likely one draft must be right to be worth its time, what is asked of all together: of one row's int8 drafts,
# of several rows', and of others. (Making an int8 draft, not verifying it, is what takes time.)
_SHARE, _SHARE_OF_SEVERAL, _SHARE_OF_OTHERS = 0.75, 0.5, 1.0
_LENGTHS = (1, 2, 3, 5)  # of several rows' drafts that are weighed, beside the most


@dataclass(frozen=True)
class Plan:
    """Tokens per second that are promised, layers that draft (0: none), the most drafts of a row, how likely they must
    all be right for the last one to be kept, and how far the exit's promises are to be trusted (`Reckoning.trust`)."""

    worth: float
    exit_layer: int
    length: int
    least: float
    trust: float = 1.0

    @property
    def truly(self) -> float:
        """Tokens per second that are expected, all told."""
        return self.worth * self.trust


PLAIN = Plan(0.0, 0, 0, 0.0)


def best_by_margin(
    acceptance: Acceptance,
    reckoning: Reckoning,
    exit_layer: int,
    rows: Sequence[int],
    length: int,
    *,
    worth: float,
    int8: bool,
) -> Plan:
    """The best plan for that exit and these rows, of K drafts at most, where a margin rule ends them.

    worth: tokens per second that are known to be possible; int8: whether drafts are
    """
    n_rows, seconds = len(rows), reckoning.seconds
    if not length:
        return Plan(0.0, exit_layer, 0, 0.0)
    # What it costs that every row keeps one more is to run them through all layers. (Of int8 drafts, also to make
    # the next one, which is worth something, too: on average, from half of the most drafts on.)
    many = max(length, 2) if int8 else 2
    few = many // 2
    more = seconds(exit_layer, many, (many + 1) * n_rows, n_rows) - seconds(exit_layer, few, (few + 1) * n_rows, n_rows)
    more = max(more, 0.0) / (many - few) / n_rows
    share = _SHARE_OF_OTHERS if not int8 else _SHARE if n_rows == 1 else _SHARE_OF_SEVERAL
    best = Plan(0.0, exit_layer, 0, 0.0)
    for _ in range(2):  # what a draft must be worth is known when it is known what the others are
        least = min(share * more * max(worth, best.worth), _SUREST)
        plan = _of_least(acceptance, reckoning, exit_layer, rows, length, least)
        best = max(best, plan, key=lambda plan: plan.worth)
    return best


def _of_least(
    acceptance: Acceptance, reckoning: Reckoning, exit_layer: int, rows: Sequence[int], length: int, least: float
) -> Plan:
    """Of drafts kept while they are so likely to be right."""
    n_rows = len(rows)
    if n_rows == 1:  # which ends its drafts itself; several wait for the one that drafts most
        kept, right, made = acceptance.totals(rows[0], exit_layer, least, length)
        worth = (1 + right) / reckoning.seconds(exit_layer, kept, 1 + kept, 1, made)
        return Plan(worth, exit_layer, length, least)
    by_draft = zip(*(acceptance.course(row, exit_layer, least, length) for row in rows), strict=True)
    best = Plan(0.0, exit_layer, 0, least)
    tokens = places = float(n_rows)
    longest, most = 0.0, 1.0
    for drafts, of_rows in enumerate(by_draft, start=1):
        # The share of rounds in which some row keeps so many, and so makes one more.
        some = 1 - math.prod([1 - kept for kept, _ in of_rows])
        places += sum([kept for kept, _ in of_rows])
        tokens += sum([kept * right for kept, right in of_rows])
        longest += some
        if drafts == length or drafts in _LENGTHS:
            found = tokens / reckoning.seconds(exit_layer, longest, places, n_rows, most)
            if found > best.worth:
                best = replace(best, worth=found, length=drafts)
        most += some
    return best


def best_length(
    acceptance: Acceptance,
    reckoning: Reckoning,
    exit_layer: int,
    rows: Sequence[int],
    length: int,
) -> Plan:
    """The same where margins are not known, and all drafts are kept."""
    n_rows = len(rows)
    by_draft = zip(*(acceptance.course(row, exit_layer, 0.0, length) for row in rows), strict=True)
    best, tokens = Plan(0.0, exit_layer, 0, 0.0), float(n_rows)
    for drafts, of_rows in enumerate(by_draft, start=1):
        tokens += sum([right for _, right in of_rows])
        found = tokens / reckoning.seconds(exit_layer, drafts, n_rows * (drafts + 1), n_rows)
        if found <= best.worth:
            break
        best = replace(best, worth=found, length=drafts)
    return best


def lookup_worth(reckoning: Reckoning, found: Sequence[tuple[int, list[int]]]) -> float:
    """Tokens per second of a round of drafts that were looked up, and no others: by row, for how many tokens its text
    has repeated itself, and drafts. 0 where there are none."""
    n_rows, drafts = len(found), sum(len(tokens) for _, tokens in found)
    if not drafts:
        return 0.0
    right = sum(expected_right(repeated, len(tokens)) for repeated, tokens in found)
    return (n_rows + right) / reckoning.seconds(0, 0, n_rows + drafts, n_rows, 0)
