"""What the end of the prompts tells of a text to come: where each exit would have said what the full model would.

Knows nothing of drafting. Next: `session.py`, which keeps the states; `policies/adaptive.py`, which asks.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from layerskip_moe.generation.sampling import choose_by_margin, gumbel_noise
from layerskip_moe.nn.ragged import Judged

if TYPE_CHECKING:
    from layerskip_moe.generation.session import Session

_MOST_STATES = 64  # that the head is applied to
_MOST_PLACES = 16  # of a prompt


def prompt_agreement(session: "Session", exits: Sequence[int]) -> list[dict[int, list[Judged]]]:
    """For each row, by exit layer, its margin at the last places of the prompt, and whether it would have said there
    what the full model would, with that place's noise. Margins are nan where sampling filters. Nothing where the
    prompt's states were not kept, or there are none, or the text has gone on since."""
    prompt = session.prompt
    if prompt is None or any(session.outputs):
        return []
    first, output = prompt
    exits = [exit_layer for exit_layer in exits if exit_layer - 1 in output.collected]
    n_rows = len(session.row_numbers)
    ends = session.cache.lengths.tolist()  # positions of the newest tokens, which are not run yet
    count = min(max(_MOST_STATES // (n_rows * (len(exits) + 1)), 1), _MOST_PLACES)
    places = [range(max(end - count, first), end) for end in ends]
    rows = [row for row, some in enumerate(places) for _ in some]
    at = [place - first for some in places for place in some]
    if not rows:
        return []
    states = torch.stack(
        [*(output.collected[exit_layer - 1][rows, at] for exit_layer in exits), output.hidden[rows, at]]
    )
    scores = session.model.unembed(states.flatten(0, 1)).view(len(exits) + 1, len(rows), -1)
    noise = None
    if not session.sampling.greedy:
        places_after = torch.tensor(at, device=states.device)[:, None] + first + 1
        noise = gumbel_noise(session.sampling.seed, session.rows[rows], places_after, scores.shape[-1])[:, 0]
    tokens, margins = choose_by_margin(scores, session.sampling, noise)
    right = (tokens[:-1] == tokens[-1]).tolist()
    found: list[dict[int, list[Judged]]] = [{exit_layer: [] for exit_layer in exits} for _ in range(n_rows)]
    for exit_layer, by_place, of_margin in zip(exits, right, margins[:-1].tolist(), strict=True):
        for row, was_right, margin in zip(rows, by_place, of_margin, strict=True):
            found[row][exit_layer].append((margin, was_right))
    return found
