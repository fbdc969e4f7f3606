"""The two ends between which a drafting policy lies: the best that never changes, and the best that knows the future.

Both are found from the rounds of traced texts under a cost model, exactly: the first by trying every pair of exit layer
and draft length, the second by dynamic programming over the places of each text.

Knows nothing of policies. Next: `policies.py`, which sets them beside policies.
"""

from collections.abc import Sequence
from typing import NamedTuple

from layerskip_moe.bench.rounds import TextRounds
from layerskip_moe.bench.staging import foreseen_drafts
from layerskip_moe.generation.policies.exits import has_stages
from layerskip_moe.nn import few_rows
from layerskip_moe.nn.ragged import Staged


def fixed_seconds(text: TextRounds, exit_layer: int, draft_length: int, *, int8: bool = False) -> float:
    """Of the text's continuation with the same pair in every round, as `Fixed` decodes it."""
    place, seconds = 0, 0.0
    while place < text.length:
        drafted = min(draft_length, text.length - place - 1)
        layer = exit_layer if drafted else 0
        seconds += text.seconds(place, layer, drafted, int8=int8 and drafted > 0)
        place += text.accepted(place, layer, drafted, int8=int8) + 1
    return seconds


class ForeseenRound(NamedTuple):
    """A round whose drafts are all right: the layers that draft, 0 where they are looked up or there are none, how
    many drafts, whether they are int8, and what is done to make them in stages, if they are."""

    exit_layer: int
    drafted: int
    int8: bool = False
    staged: Staged | None = None


def oracle(
    text: TextRounds,
    exit_layers: Sequence[int],
    int8_exits: Sequence[int] = (),
    proposing: int = 0,
    *,
    lookup: bool = True,
) -> list[ForeseenRound]:
    """The rounds that make the text's continuation in the least seconds. proposing: layers that propose where int8
    drafts are made in stages, 0: none are; lookup: whether drafts may be looked up.

    least(N) = 0 and least(n) = min over e in exit_layers and d >= 0 of seconds(n, e, d) + least(n + d + 1), where
    the d drafts from layer e at n are all right, and over int8 drafts by int8_exits likewise, one by one or, where
    `has_stages` says so, in stages: then it is known which proposals are right, and the last drafts are looked up
    wherever the text repeats itself, or all, in rounds that ask no layer. Without proposing and lookup it is the best
    that choosing a pair of exit layer and draft length can do. Longer drafts are not tried: what a round refuses, it
    had better not have drafted.
    """
    least = [0.0] * (text.length + 1)
    best = [ForeseenRound(0, 0)] * text.length
    in_stages = [exit_layer for exit_layer in int8_exits if has_stages(exit_layer, proposing)]
    for place in reversed(range(text.length)):
        rest = text.length - place - 1
        looked_up = min(text.foretold(place), rest, few_rows.MOST_ROWS - 1) if lookup else 0
        ways = [ForeseenRound(0, drafted) for drafted in range(looked_up + 1)]
        for exits, int8 in ((exit_layers, False), (int8_exits, True)):
            for exit_layer in exits:
                longest = text.accepted(place, exit_layer, rest, int8=int8)
                ways += [ForeseenRound(exit_layer, drafted, int8) for drafted in range(1, longest + 1)]
        for drafted, staged in _in_stages(text, place, proposing) if in_stages else ():
            asked = drafted - staged.looked_up
            able = (layer for layer in in_stages if text.accepted(place, layer, asked, int8=True) == asked)
            ways += [ForeseenRound(exit_layer, drafted, True, staged) for exit_layer in able]

        def seconds(way: ForeseenRound, place: int = place) -> float:
            exit_layer, drafted, int8, staged = way
            return text.seconds(place, exit_layer, drafted, int8=int8, staged=staged) + least[place + drafted + 1]

        best[place] = min(ways, key=seconds)
        least[place] = seconds(best[place])
    rounds: list[ForeseenRound] = []
    place = 0
    while place < text.length:
        rounds.append(best[place])
        place += best[place].drafted + 1
    return rounds


def _in_stages(text: TextRounds, place: int, proposing: int) -> list[tuple[int, Staged]]:
    """Numbers of drafts, 1 and more, and what is done to make them in stages, by layers that are right as long as they
    are asked: the rest is looked up as soon as it can be."""
    rest = min(text.length - place - 1, text.most_int8)
    ways, asked = list[tuple[int, Staged]](), 0
    for drafted in range(1, rest + 1):
        while asked < drafted and text.foretold(place + asked) < drafted - asked:
            asked += 1
        ways.append((drafted, foreseen_drafts(text, place, asked, drafted - asked, proposing)))
    return ways
