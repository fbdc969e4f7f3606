"""What making a round's int8 drafts in stages would take, of a traced text: the runs of either stage, see `Stage`.

As long as the drafts are right they are the text, and all is known: what the layers that propose would say there, how
sure they are, and what stood in the text before. Where a draft is wrong, a proposal is taken to be another token, and
what follows to be proposed as the text is.

L layers, N tokens of a continuation, D drafts. Knows nothing of policies and seconds. Next: `replay.py`, which asks.
"""

from collections.abc import Sequence

from layerskip_moe.bench.rounds import TextRounds
from layerskip_moe.nn.ragged import Stage, Staged

_MOST_PROPOSED = 8  # places of a run, as in cpp/staged.h


def staged_rounds(text: TextRounds, place: int, exit_layer: int, limit: int, made: int, stage: Stage) -> Staged:
    """What is done to make `made` drafts of a round that wants `limit`, where a margin rule lets the last one go, or
    none is."""
    traced, tokens = text.text, text.text.tokens.tolist()
    newest = traced.prompt_length + place - 1
    early = [
        traced.int8_right[stage.exit_layer - 1, place].tolist(),
        traced.int8_margin[stage.exit_layer - 1, place].tolist(),
    ]
    right = traced.int8_right[exit_layer - 1, place].tolist()
    done = proposing = choosing = places = 0
    while done < made:
        longest = min(_MOST_PROPOSED, limit - done)
        repeated = continued(tokens[: newest + done + 1], stage.lookup, longest - 1)
        same = [right[done + at] and early[0][done + at] for at in range(longest)]
        if repeated:
            count, runs = longest, 1
            there = tokens[newest + done + 1 : newest + done + longest]
            same = [right[done + at] and token == repeated[at] for at, token in enumerate(there)]
        else:
            sure = [margin >= stage.sure for margin in early[1][done : done + longest - 1]]
            count = runs = [*sure, False].index(False) + 1
        proposing, choosing, places = proposing + runs, choosing + 1, places + count
        done += [*same[: count - 1], False].index(False) + 1
    return Staged(stage.exit_layer, proposing, choosing, places)


def continued(text: Sequence[int], count: int, wanted: int) -> list[int]:
    """What followed the last `count` tokens of a text where they last stood before, `wanted` tokens, as the kernel
    finds it; [] where they stand nowhere else."""
    end = len(text)
    for start in range(end - 1 - count, -1, -1) if count else ():
        if text[start : start + count] == text[end - count :]:
            return [text[start + count + at % (end - start - count)] for at in range(wanted)]
    return []
