"""The network's part of a round whose drafts come from several sources, as many for each row as there are.

The places of a round are the newest token of each row, place 0, and its drafts after it. Layers that drafted have run
over some places, and are not run there again where they ran as the model does.

A active rows, R of them that draft, n drafts, T places of the row that has most, P places that layers have run,
N places of any rows, D width, V vocabulary. Knows nothing of n-grams or of which layers draft. Next:
`prompt_lookup.py`, `lookup_speculative.py`, `sparse_speculative.py`, which call this; `verification.py`, which chooses.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from layerskip_moe.generation.verification import Round
from layerskip_moe.nn.ragged import as_index, by_row, in_turn


def draft(
    round_: Round,
    layers: Sequence[int],
    count: int,
    *,
    rows: Tensor | None = None,
    top_k: int | None = None,
    collect: Sequence[int] = (),
) -> tuple[Tensor, list[Tensor]]:
    """`count` drafts of some rows, one after another: tokens [R, n], and the states [R, n + 1, D] of newest and drafts,
    after the last of the layers and after each of `collect`.

    rows: [R] int64, by default all; layers, top_k, collect: as in `MoEDecoder.draft`, which does it all in one call
    unless the sampling filters or penalises tokens
    """
    session = round_.session
    positions = session.positions(count + 1)
    positions = positions if rows is None else positions[rows]
    if not session.sampling.filters:
        noise = None if round_.noise is None else round_.noise[:, :count]
        noise = noise if noise is None or rows is None else noise[rows]
        return session.draft(layers, positions, noise, rows=rows, top_k=top_k, collect=collect)
    model, token = session.model, session.newest if rows is None else session.newest[rows]
    cache = session.cache if rows is None else session.cache.subset(rows)
    tokens, by_place = [token[:, :0]], []
    for place in range(count + 1):
        at = positions[:, place : place + 1]
        output = model.run(model.embed(token), layers, positions=at, cache=cache, top_k=top_k, collect=collect)
        by_place.append([output.hidden, *(output.collected[layer] for layer in collect)])
        if place < count:
            token = round_.draft(model.unembed(output.hidden), rows)
            token = token if rows is None else token[rows]
            tokens.append(token)
    return torch.cat(tokens, dim=1), [torch.cat(parts, dim=1) for parts in zip(*by_place, strict=True)]


def propose(round_: Round, drafts: Sequence[Sequence[int]]) -> None:
    """Make these the round's drafts, a list for each active row, each cut to what its row has use for."""
    round_.limits = [min(len(tokens), limit) for tokens, limit in zip(drafts, round_.limits, strict=True)]
    round_.drafts = []
    if round_.length:
        padded = [[*tokens, *[0] * round_.length][: round_.length] for tokens in drafts]
        round_.drafts = list(torch.tensor(padded, device=round_.session.newest.device).split(1, dim=1))


def verify(round_: Round, *, choices: bool = False) -> tuple[Tensor, dict[int, Tensor]]:
    """The full model's logits [A, T, V] after the newest token of each row and after its drafts, zeros beyond; and with
    choices, by MoE layer, the experts that were chosen [., K]."""
    session, limits, model = round_.session, round_.limits, round_.session.model
    text, layers = torch.cat([session.newest, *round_.drafts], dim=1), range(model.config.n_layers)
    if len(set(limits)) == 1:
        positions = session.positions(text.shape[1])
        output, logits = model.decode(text, layers, positions=positions, cache=session.cache, choices=choices)
        return logits, output.chosen
    rows, places = as_index(*in_turn([range(limit + 1) for limit in limits]), text.device)
    output, told = model.decode(text[rows, places][:, None], layers, **session.at(rows, places), choices=choices)
    return by_row(told, rows, places, shape=(len(limits), text.shape[1])), output.chosen


def verify_rest(round_: Round, exit_layer: int, states: Tensor, known: Sequence[int]) -> Tensor:
    """`verify`, where the first exit_layer layers have run over some places.

    states: [A, P, D] after them, of which row r's first known[r] count, at most limits[r] + 1
    """
    session, model, limits = round_.session, round_.session.model, round_.limits
    text, layers = torch.cat([session.newest, *round_.drafts], dim=1), range(exit_layer, model.config.n_layers)
    if len(set(limits)) == 1 and len(set(known)) == 1:
        positions, states = session.positions(text.shape[1]), states[:, : known[0]]
        if known[0] < text.shape[1]:
            new = model.embed(text[:, known[0] :])
            new = session.run(new, range(exit_layer), positions[:, known[0] :])
            states = torch.cat([states, new], dim=1)
        return session.decode(states, layers, positions)
    rows, places = as_index(*in_turn([range(count) for count in known]), text.device)
    states = states[rows, places][:, None]
    if sum(known) < sum(limits) + len(limits):
        unknown = [range(count, limit + 1) for count, limit in zip(known, limits, strict=True)]
        later, at = as_index(*in_turn(unknown), text.device)
        new = model.embed(text[later, at])[:, None]
        new = model.run(new, range(exit_layer), **session.at(later, at)).hidden
        states, rows, places = torch.cat([states, new]), torch.cat([rows, later]), torch.cat([places, at])
    _, told = model.decode(states, layers, **session.at(rows, places))
    return by_row(told, rows, places, shape=(len(limits), text.shape[1]))
