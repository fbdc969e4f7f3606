"""What making a round's int8 drafts in stages would take, of a traced text: the runs of either stage, see `Stage`.

As long as drafts, and proposals, are right they are the text, and all is known: what the layers that propose would say
there, how sure they are, and what stood in the text before. What is proposed behind a wrong proposal no trace has: it
is taken to be the text, and a wrong draft never to have been proposed. So how often the later layers run is exact up to
the first wrong draft, how often the others do is not.

Knows nothing of policies and seconds. Next: `replay.py` and `oracle.py`, which ask.
"""

from typing import NamedTuple

from layerskip_moe.bench.rounds import TextRounds
from layerskip_moe.nn.ragged import MOST_PER_REPEATED, MOST_PROPOSED, Stage, Staged


class MadeInStages(NamedTuple):
    """Drafts of a round: how many are verified, how many layers made, how many are right before the first that is not,
    and what was done."""

    drafted: int
    made: int
    accepted: int
    staged: Staged


def staged_drafts(
    text: TextRounds, place: int, exit_layer: int, limit: int, kept: int, made: int, stage: Stage
) -> MadeInStages:
    """Of a round that wants `limit` drafts, of which a margin rule would keep so many of so many that are made, were
    layers asked for all of them."""
    traced = text.text
    early_right, early_margins = (
        part[stage.exit_layer - 1, place].tolist() for part in (traced.int8_right, traced.int8_margin)
    )
    right = traced.int8_right[exit_layer - 1, place].tolist()
    done = proposing = choosing = places = heads = 0
    lookup = stage.lookup
    while done < made:
        longest = min(MOST_PROPOSED, limit - done)
        repeated, follows = text.repetition(place + done, lookup)
        if stage.sure_lookup and repeated >= stage.sure_lookup:
            looked_up = min(limit - done, MOST_PER_REPEATED * repeated)
            accepted = text.accepted(place, exit_layer, done, int8=True)
            accepted += min(follows, looked_up) if accepted == done else 0
            staged = Staged(stage.exit_layer, proposing, choosing, places, heads, looked_up)
            return MadeInStages(done + looked_up, done, accepted, staged)
        if repeated:
            count, runs, choices = longest, 1, 0
            same = [right[done + at] and at < follows for at in range(count - 1)]
            if not (right[done] and follows):
                lookup = 0
        else:
            sure = [margin >= stage.sure for margin in early_margins[done : done + longest - 1]]
            count = runs = [*sure, False].index(False) + 1
            choices = min(count, longest - 1)
            same = [right[done + at] and early_right[done + at] for at in range(count - 1)]
        proposing, choosing, places, heads = proposing + runs, choosing + 1, places + count, heads + choices + 1
        done += [*same, False].index(False) + 1
    staged = Staged(stage.exit_layer, proposing, choosing, places, heads)
    return MadeInStages(kept, made, text.accepted(place, exit_layer, kept, int8=True), staged)


def foreseen_drafts(
    text: TextRounds, place: int, asked: int, looked_up: int, proposing: int, lookup: int = Stage.lookup
) -> Staged:
    """The least that is done to make right drafts in stages, where it is known which proposals are right: none other is
    followed. asked, looked_up: how many drafts layers are asked for, and how many are looked up after them."""
    early_right = text.text.int8_right[proposing - 1, place].tolist()
    done = runs = choosing = 0
    while done < asked:
        longest = min(MOST_PROPOSED, asked - done)
        by_text = min(text.repetition(place + done, lookup)[1], longest - 1)
        by_layers = [*early_right[done : done + longest - 1], False].index(False)
        runs += 1 if by_text >= by_layers else by_layers + 1
        done, choosing = done + max(by_text, by_layers) + 1, choosing + 1
    # (The head runs as often: what the last place of a run would propose is not asked, and the choice is one more.)
    return Staged(proposing, runs, choosing, asked, heads=runs, looked_up=looked_up)
