"""What making a round's int8 drafts in stages would take, of a traced text: the runs of either stage, see `Stage`.

As long as drafts, and proposals, are right they are the text, and all is known: what the layers that propose would say
there, how sure they are, and what stood in the text before. What is proposed behind a wrong proposal no trace has: it
is taken to be the text, and a wrong draft never to have been proposed. So how often the later layers run is exact up to
the first wrong draft, how often the others do is not.

Knows nothing of policies and seconds. Next: `replay.py` and `oracle.py`, which ask.
"""

from collections.abc import Sequence

from layerskip_moe.bench.rounds import TextRounds
from layerskip_moe.nn.ragged import LOOK_BACK, MOST_PROPOSED, Stage, Staged


def staged_drafts(text: TextRounds, place: int, exit_layer: int, limit: int, made: int, stage: Stage) -> Staged:
    """What is done to make `made` drafts of a round that wants `limit`, where a margin rule lets the last one go, or
    none is."""
    traced = text.text
    early_right, early_margins = (
        part[stage.exit_layer - 1, place].tolist() for part in (traced.int8_right, traced.int8_margin)
    )
    right = traced.int8_right[exit_layer - 1, place].tolist()
    done = proposing = choosing = places = heads = 0
    lookup = stage.lookup
    while done < made:
        longest = min(MOST_PROPOSED, limit - done)
        repeated, follows = _repeated(text, place + done, lookup, longest)
        if repeated:
            count, runs, choices = longest, 1, 0
            if not (right[done] and follows[0]):
                lookup = 0
        else:
            sure = [margin >= stage.sure for margin in early_margins[done : done + longest - 1]]
            count = runs = [*sure, False].index(False) + 1
            choices, follows = min(count, longest - 1), early_right[done : done + longest]
        proposing, choosing, places, heads = proposing + runs, choosing + 1, places + count, heads + choices + 1
        same = [right[done + at] and follows[at] for at in range(count - 1)]
        done += [*same, False].index(False) + 1
    return Staged(stage.exit_layer, proposing, choosing, places, heads)


def foreseen_drafts(
    text: TextRounds, place: int, drafted: int, proposing: int, lookup: int = Stage(1, 0.0).lookup
) -> Staged:
    """The least that is done to make right drafts in stages, where it is known which proposals are right: none other is
    followed."""
    early_right = text.text.int8_right[proposing - 1, place].tolist()
    done = runs = choosing = 0
    while done < drafted:
        longest = min(MOST_PROPOSED, drafted - done)
        _, follows = _repeated(text, place + done, lookup, longest)
        by_text, by_layers = (
            [*some[: longest - 1], False].index(False) for some in (follows, early_right[done : done + longest])
        )
        runs += 1 if by_text >= by_layers else by_layers + 1
        done, choosing = done + max(by_text, by_layers) + 1, choosing + 1
    # (The head runs as often: what the last place of a run would propose is not asked, and the choice is one more.)
    return Staged(proposing, runs, choosing, drafted, heads=runs)


def _repeated(text: TextRounds, place: int, lookup: int, longest: int) -> tuple[list[int], list[bool]]:
    """What is proposed because it followed the last tokens before `place` earlier, and whether it is the text."""
    tokens, end = text.all_tokens, text.text.prompt_length + place
    found = continued(tokens[max(end - LOOK_BACK, 0) : end], lookup, longest - 1)
    there = tokens[end : end + len(found)]
    return found, [one == other for one, other in zip(found, there, strict=False)]


def continued(text: Sequence[int], count: int, wanted: int) -> list[int]:
    """What followed the last `count` tokens of a text where they last stood before, `wanted` tokens, as the kernel
    finds it; [] where they stand nowhere else."""
    end = len(text)
    for start in range(end - 1 - count, -1, -1) if count else ():
        if text[start : start + count] == text[end - count :]:
            return [text[start + count + at % (end - start - count)] for at in range(wanted)]
    return []
