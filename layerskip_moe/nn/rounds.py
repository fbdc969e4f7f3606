"""A round of self-speculation: the first layers draft one token after another, the rest verify all of them in one pass,
and the full model chooses. On a CPU, compiled, it is one call.

A rows, T places of the row that has most, its T - 1 drafts and one more, N places there are, D width, K experts chosen,
V vocabulary. Knows nothing of sessions and policies. Next: `decoder.py` and `drafts.py`, which it is made of;
`generation/drafting.py`, which calls it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from layerskip_moe.nn import few_rows
from layerskip_moe.nn.cache import KVCache
from layerskip_moe.nn.decoder import MoEDecoder
from layerskip_moe.nn.drafts import repeat_round
from layerskip_moe.nn.int8_copies import Int8Copies
from layerskip_moe.nn.ragged import MarginRule, Stage, Staged, as_index, before_the_first_wrong, by_row, in_turn
from layerskip_moe.nn.steps import can_repeat


@dataclass
class Speculated:
    """What came of a round.

    tokens:    [A, T] int64, what the full model chooses after the newest token and after each draft, of no meaning
               beyond the drafts that a row kept
    drafts:    [A, T - 1] int64, of no meaning beyond those that were made
    margins:   [A, T - 1] float64, of the drafts, likewise, and no numbers where these were looked up; None where the
               round was not one call
    looked_up: how many of each row's drafts, the last ones, no layer was asked for
    staged:    what was done where drafts were made in stages; None elsewhere
    drafted:   how many drafts of each row were kept, and verified; one more was made where a rule let it go, but
               for rows whose drafts were looked up
    accepted:  how many of them the full model agreed with before the first that it did not
    collected: layer index -> its states [N, D], of newest token and drafts, row by row
    chosen:    layer index -> experts [N, K] of them, in the layers that verified them
    """

    tokens: Tensor
    drafts: Tensor
    margins: Tensor | None
    looked_up: list[int]
    staged: Staged | None
    drafted: list[int]
    accepted: list[int]
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
    rule: MarginRule | None = None,
    collect: Sequence[int] = (),
    choices: bool = False,
    copies: Int8Copies | None = None,
    looked_up: Sequence[Sequence[int]] = (),
    stage: Stage | None = None,
    history: Tensor | None = None,
) -> Speculated:
    """Draft by the first layers, verify by the rest, and choose.

    newest: [A, 1] int64; positions: [A, T] int64, where it stands and where drafts will
    noise: [A, T, V] float64, added to the logits; a draft, and the full model's choice, is where they are largest
    limits: drafts of each row, at most T - 1
    rule: by which fewer are kept, where the round is one call: elsewhere, as on a GPU, all are drafted and verified at
        once, and keeping fewer would save nothing
    collect: layers whose states are wanted; choices: whether `Speculated.chosen` is
    copies: of the model's weights, which drafts are made from where the round is one call. All layers verify then, for
        what the draft computed is not what they would
    looked_up: by row, its drafts, as many as its limit says, where no layer is to be asked for them, else none; () of
        no row. Only beside drafts made from copies, and left aside where the round is not one call
    stage: how drafts of one row made from copies are made in two stages
    history: [.] int64, the row's text up to the newest token, where proposals are looked for; None: that token alone
    """
    first = exit_layer if copies is None else 0  # of the layers that verify
    wanted, most, made = _parted(collect, first), sum(limits) + len(limits), None
    if model.compiled and can_repeat(most, model.dtype, newest.device):
        how = noise, limits, rule, copies, looked_up, stage, history
        made = repeat_round(model, exit_layer, wanted, choices, newest, positions, cache, *how)
    if made is None:
        wanted = _parted(collect, exit_layer)
        return _in_two_steps(model, exit_layer, wanted, choices, newest, positions, cache, noise, limits)
    tokens, drafts, margins, kept, accepted, counts, *states = made
    early, late = states[: len(wanted[0])], states[len(wanted[0]) + 1 :]  # (between them, the last layer's)
    drafted = kept.tolist()
    collected = _present(wanted[0], early, drafted) | dict(zip(wanted[1], late, strict=False))
    routed = [layer for layer in range(first, model.config.n_layers) if choices and model.config.is_moe(layer)]
    chosen = dict(zip(routed, late[len(wanted[1]) :], strict=True))
    staged = None if stage is None else Staged(stage.exit_layer, *counts.tolist())
    known = list(map(len, looked_up)) or [0] * len(limits)
    known = known if staged is None else [staged.looked_up]
    return Speculated(tokens, drafts, margins, known, staged, drafted, accepted.tolist(), collected, chosen)


def _in_two_steps(
    model: MoEDecoder,
    exit_layer: int,
    wanted: tuple[list[int], list[int]],
    choices: bool,
    newest: Tensor,
    positions: Tensor,
    cache: KVCache,
    noise: Tensor | None,
    limits: Sequence[int],
) -> Speculated:
    """`speculate` by `MoEDecoder.draft` and `MoEDecoder.decode`; wanted: layers of the two whose states are."""
    first = None if noise is None else noise[:, :-1]
    drafts, (states, *early) = model.draft(
        newest, range(exit_layer), positions=positions, cache=cache, noise=first, collect=wanted[0]
    )
    rows, places = as_index(*in_turn([range(limit + 1) for limit in limits]), newest.device)
    # Of rows with fewer drafts no more places are run, where any number of places is as good as another.
    ragged = len(rows) < positions.numel() and few_rows.serves(newest.device)
    if ragged:
        states, cache = states[rows, places][:, None], cache.subset(rows)
    at = positions[rows, places][:, None] if ragged else positions
    later = range(exit_layer, model.config.n_layers)
    output, logits = model.decode(states, later, positions=at, cache=cache, collect=wanted[1], choices=choices)
    if ragged:
        logits = by_row(logits, rows, places, shape=(len(limits), positions.shape[1]))
    tokens = few_rows.choose(logits.flatten(0, 1), None if noise is None else noise.flatten(0, 1)).view(positions.shape)
    accepted = before_the_first_wrong(tokens[:, :-1] == drafts, limits)
    collected = {layer: some[rows, places] for layer, some in zip(wanted[0], early, strict=True)}
    for layer, some in output.collected.items():
        collected[layer] = some[:, 0] if ragged else some[rows, places]
    chosen = output.chosen
    if not ragged:
        by_place = {layer: experts.view(*positions.shape, -1) for layer, experts in output.chosen.items()}
        chosen = {layer: experts[rows, places] for layer, experts in by_place.items()}
    return Speculated(tokens, drafts, None, [0] * len(limits), None, list(limits), accepted, collected, chosen)


def _parted(layers: Sequence[int], first: int) -> tuple[list[int], list[int]]:
    """Those of some layers that come before the first that verifies, and the others."""
    return [layer for layer in layers if layer < first], [layer for layer in layers if layer >= first]


def _present(layers: Sequence[int], states: Sequence[Tensor], limits: Sequence[int]) -> dict[int, Tensor]:
    """States [A, T, D] after some layers: those of the newest token and of each row's drafts, row by row."""
    if not layers:
        return {}
    there = [some[row, : count + 1] for some in states for row, count in enumerate(limits)]
    per_layer = len(limits)
    return {layer: torch.cat(there[index * per_layer : (index + 1) * per_layer]) for index, layer in enumerate(layers)}
