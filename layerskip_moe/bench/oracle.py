"""The two ends between which a drafting policy lies: the best that never changes, and the best that knows the future.

Both are found from the rounds of traced texts under a cost model, exactly: the first by trying every pair of exit layer
and draft length, the second by dynamic programming over the places of each text.

Knows nothing of policies. Next: `policies.py`, which sets them beside policies.
"""

from collections.abc import Sequence

from layerskip_moe.bench.rounds import TextRounds


def fixed_seconds(text: TextRounds, exit_layer: int, draft_length: int, *, int8: bool = False) -> float:
    """Of the text's continuation with the same pair in every round, as `Fixed` decodes it."""
    place, seconds = 0, 0.0
    while place < text.length:
        drafted = min(draft_length, text.length - place - 1)
        layer = exit_layer if drafted else 0
        seconds += text.seconds(place, layer, drafted, int8=int8 and drafted > 0)
        place += text.accepted(place, layer, drafted, int8=int8) + 1
    return seconds


def oracle(text: TextRounds, exit_layers: Sequence[int], int8_exits: Sequence[int] = ()) -> list[tuple[int, int, bool]]:
    """The rounds that make the text's continuation in the least seconds: (exit layer, drafts, whether they are int8),
    (0, 0, False) for plain ones.

    least(N) = 0 and least(n) = min over e in exit_layers and d >= 0 of seconds(n, e, d) + least(n + d + 1), where the d
    drafts from layer e at n are all right, and over int8 drafts by int8_exits likewise. Longer drafts are not tried:
    what a round refuses, it had better not have drafted, as no cost model is cheaper for more of it.
    """
    least = [0.0] * (text.length + 1)
    best = [(0, 0, False)] * text.length
    drafters = [(exit_layer, False) for exit_layer in exit_layers] + [(exit_layer, True) for exit_layer in int8_exits]
    for place in reversed(range(text.length)):
        least[place] = text.seconds(place, 0, 0) + least[place + 1]
        for exit_layer, int8 in drafters:
            rest = text.length - place - 1
            for drafted in range(1, text.accepted(place, exit_layer, rest, int8=int8) + 1):
                seconds = text.seconds(place, exit_layer, drafted, int8=int8) + least[place + drafted + 1]
                if seconds < least[place]:
                    least[place], best[place] = seconds, (exit_layer, drafted, int8)
    rounds: list[tuple[int, int, bool]] = []
    place = 0
    while place < text.length:
        rounds.append(best[place])
        place += best[place][1] + 1
    return rounds
