"""A round of self-speculation: the first layers draft one token after another, the rest verify all of them in one pass,
and the full model chooses. On a CPU, compiled, it is one call.

A rows, n drafts at most, T = n + 1 places of a row, N places there are, D width, K experts chosen, V vocabulary.
Knows nothing of sessions and policies. Next: `decoder.py` and `drafts.py`, which it is made of;
`generation/drafting.py`, which calls it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from layerskip_moe.nn import few_rows
from layerskip_moe.nn.cache import KVCache
from layerskip_moe.nn.decoder import MoEDecoder
from layerskip_moe.nn.drafts import repeat_round
from layerskip_moe.nn.steps import can_repeat


@dataclass
class Speculated:
    """What came of a round.

    tokens:      [A, T] int64, what the full model chooses after the newest token and after each draft, of no meaning
                 beyond a row's drafts
    drafts:      [A, T - 1] int64, likewise
    drafted, accepted: how many drafts each row had, and how many the full model agreed with before the first that it
                 did not
    certainties: [A, T - 1] float32, see `few_rows.choose`; of no meaning beyond the first draft that was given up
    collected:   layer index -> its states [N, D], of newest token and drafts, row by row
    chosen:      layer index -> experts [N, K] of them, in the layers that verified
    """

    tokens: Tensor
    drafts: Tensor
    drafted: list[int]
    accepted: list[int]
    certainties: Tensor
    collected: dict[int, Tensor]
    chosen: dict[int, Tensor]


def speculate(
    model: MoEDecoder,
    newest: Tensor,
    exit_layer: int,
    *,
    positions: Tensor,
    cache: KVCache,
    noise: Tensor | None,
    limits: Sequence[int],
    floors: Sequence[float] | None = None,
    temperature: float = 0.0,
    collect: Sequence[int] = (),
    choices: bool = False,
) -> Speculated:
    """Draft by the first layers, verify by the rest, and choose.

    newest: [A, 1] int64; positions: [A, n + 1] int64, where it stands and where n drafts will
    noise: [A, n + 1, V] float64, added to the logits; a draft, and the full model's choice, is where they are largest
    limits: drafts of each row; floors, temperature: as in `MoEDecoder.draft`
    collect: layers whose states are wanted; choices: whether `Speculated.chosen` is
    """
    split = range(exit_layer)
    kept = [layer for layer in collect if layer in split], [layer for layer in collect if layer not in split]
    limit = torch.tensor(limits, device=newest.device)
    floor = None if floors is None else torch.tensor(floors, dtype=torch.float64, device=newest.device)
    how: dict[str, Any] = {"noise": noise, "limits": limit, "floors": floor, "temperature": temperature}
    most = sum(limits) + len(limits)
    if not (model.compiled and can_repeat(most, model.dtype, newest.device)):
        return _in_two_steps(model, exit_layer, kept, choices, newest, positions, cache, **how)
    made = repeat_round(model, exit_layer, kept, choices, newest, positions, cache, most=most, **how)
    if made is None:
        return _in_two_steps(model, exit_layer, kept, choices, newest, positions, cache, **how)
    tokens, drafts, counts, certainties, *states = made
    drafted, accepted = zip(*counts.tolist(), strict=True)
    early, late = states[: len(kept[0])], states[len(kept[0]) + 1 :]
    collected = _present(kept[0], early, drafted) | dict(zip(kept[1], late, strict=False))
    routed = [layer for layer in range(exit_layer, model.config.n_layers) if choices and model.config.is_moe(layer)]
    chosen = dict(zip(routed, late[len(kept[1]) :], strict=True))
    return Speculated(tokens, drafts, list(drafted), list(accepted), certainties, collected, chosen)


def _in_two_steps(
    model: MoEDecoder,
    exit_layer: int,
    kept: tuple[list[int], list[int]],
    choices: bool,
    newest: Tensor,
    positions: Tensor,
    cache: KVCache,
    *,
    noise: Tensor | None,
    limits: Tensor,
    floors: Tensor | None,
    temperature: float,
) -> Speculated:
    """`speculate` by `MoEDecoder.draft` and `MoEDecoder.decode`; kept: layers of the two whose states are."""
    drafted = model.draft(
        newest,
        range(exit_layer),
        positions=positions,
        cache=cache,
        noise=None if noise is None else noise[:, :-1],
        limits=limits,
        floors=floors,
        temperature=temperature,
        collect=kept[0],
    )
    counts, positions_there = drafted.counts.tolist(), positions.shape[1]
    longest = max(counts)
    rows = torch.tensor([row for row, count in enumerate(counts) for _ in range(count + 1)], device=newest.device)
    places = torch.tensor([place for count in counts for place in range(count + 1)], device=newest.device)
    states, positions = drafted.states[0][:, : longest + 1], positions[:, : longest + 1]
    # Of rows with fewer drafts no more places are run, where any number of places is as good as another.
    ragged = min(counts) < longest and few_rows.serves(newest.device)
    if ragged:
        states, positions, cache = states[rows, places][:, None], positions[rows, places][:, None], cache.subset(rows)
    later = range(exit_layer, model.config.n_layers)
    output, logits = model.decode(states, later, positions=positions, cache=cache, collect=kept[1], choices=choices)
    if ragged:
        logits = logits.new_zeros(len(counts), longest + 1, logits.shape[-1]).index_put((rows, places), logits[:, 0])
    drawn = None if noise is None else noise[:, : longest + 1].flatten(0, 1)
    tokens = few_rows.choose(logits.flatten(0, 1), drawn)[0].view(len(counts), longest + 1)
    right = (tokens[:, :-1] == drafted.tokens[:, :longest]).tolist()
    accepted = [[*row[:count], False].index(False) for row, count in zip(right, counts, strict=True)]
    early = (states[rows, places] for states in drafted.states[1:])
    late = (states[:, 0] if ragged else states[rows, places] for states in output.collected.values())
    collected = dict(zip(kept[0], early, strict=True)) | dict(zip(kept[1], late, strict=True))
    chosen = (
        output.chosen
        if ragged
        else {
            layer: experts.view(len(counts), longest + 1, -1)[rows, places] for layer, experts in output.chosen.items()
        }
    )
    tokens = torch.nn.functional.pad(tokens, (0, positions_there - longest - 1))
    return Speculated(tokens, drafted.tokens, counts, accepted, drafted.certainties, collected, chosen)


def _present(layers: Sequence[int], states: Sequence[Tensor], drafted: Sequence[int]) -> dict[int, Tensor]:
    """States [A, T, D] after some layers: those of the newest token and of each row's drafts, row by row."""
    if not layers:
        return {}
    there = [some[row, : count + 1] for some in states for row, count in enumerate(drafted)]
    per_layer = len(drafted)
    return {layer: torch.cat(there[index * per_layer : (index + 1) * per_layer]) for index, layer in enumerate(layers)}
