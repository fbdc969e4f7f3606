"""What a round shows of drafts: of those that were made, and of those that other exits would have made.

Knows nothing of policies. Next: `acceptance.py`, which learns from it.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import islice

from layerskip_moe.generation.policies.policy import RoundReport
from layerskip_moe.nn.ragged import Judged


def judged_drafts(round: RoundReport, index: int) -> list[Judged]:
    """What is known of a row's drafts; of rounds that tell no margins, all but these."""
    if round.judged is not None:
        return round.judged[index]
    drafted, accepted = round.drafted[index], round.accepted[index]
    return [(math.nan, place < accepted) for place in range(min(accepted + 1, drafted))]


def judged_shadow(round: RoundReport, exits: Sequence[int]) -> Iterator[tuple[int, int, list[Judged]]]:
    """What these exits would have said of the tokens that became text, where they were asked and did not draft: row,
    exit layer, and of each place that was asked whether it is right."""
    if round.shadow is None or round.shadow_margins is None:
        return
    said, margins, tokens = round.shadow.tolist(), round.shadow_margins.tolist(), round.tokens.tolist()
    for index, (row, accepted) in enumerate(zip(round.rows, round.accepted, strict=True)):
        for exit_layer in exits:
            of_exit = said[index][exit_layer - 1]
            # (Where another thread began a text of another kind meanwhile, others may have been asked.)
            if exit_layer != round.exit_layers[index] and of_exit[0] >= 0:
                by_place = zip(margins[index][exit_layer - 1], of_exit, tokens[index], strict=True)
                yield (
                    row,
                    exit_layer,
                    [(margin, its == token) for margin, its, token in islice(by_place, accepted + 1) if its >= 0],
                )
