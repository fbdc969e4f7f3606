"""Several steps of few rows in one call: drafts one after another, and a whole round of self-speculation.

A active rows, n drafts, B batch, T positions, N states, D width, V vocabulary.
On a CPU they are repeated from recordings of their parts, on a GPU drafts are one CUDA graph; `draft_places` is the
plain loop. Knows nothing of what a step computes. Next: `decoder.py` and `rounds.py`, which call this; `steps.py`;
`replay.py`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from layerskip_moe.nn import few_rows
from layerskip_moe.nn.attention import Places, locate_within
from layerskip_moe.nn.cache import KVCache
from layerskip_moe.nn.checks import check_positions, check_run
from layerskip_moe.nn.graphs import Graph
from layerskip_moe.nn.linear import linear
from layerskip_moe.nn.ragged import MarginRule, Stage
from layerskip_moe.nn.replay import Recording, drafts_of, round_of
from layerskip_moe.nn.run_blocks import recordable
from layerskip_moe.nn.steps import (
    Step,
    by_rows,
    keep_recording,
    recorded,
    recording_of,
    room_for,
    slots_read,
    weights_of,
)

if TYPE_CHECKING:
    from layerskip_moe.nn.decoder import MoEDecoder
    from layerskip_moe.nn.int8_copies import Int8Copies


def repeat_draft(
    model: "MoEDecoder",
    states_of: Callable[[Tensor, Places], list[Tensor]],
    newest: Tensor,
    positions: Tensor,
    cache: KVCache,
    noise: Tensor | None,
    *,
    length: int,
    key: tuple[Any, ...],
) -> tuple[Tensor, list[Tensor]]:
    """Tokens drafted one after another in one call; see `MoEDecoder.draft`.

    states_of: from token ids and their places to states, the first of which the head is for
    """
    if few_rows.serves(newest.device):
        return _draft_by_place(model, states_of, newest, positions, cache, noise, key)
    count, slots = positions.shape[1] - 1, slots_read(length, cache.capacity)

    def run(inputs: list[Tensor]) -> list[Tensor]:
        newest, rows, positions, *noise = inputs

        def states_at(token: Tensor, place: int) -> list[Tensor]:
            at = positions[:, place : place + 1]
            return states_of(token, locate_within(at, rows, model.config, slots, cache.capacity))

        tokens, states = draft_places(model, states_at, newest, count, noise[0] if noise else None)
        return [tokens, *states]

    inputs = [newest, cache.rows, positions, *([] if noise is None else [noise])]
    key = "drafts", len(newest), count, slots, noise is None, *key
    tokens, *states = recorded(model, run, inputs, cache, key)
    return tokens, states


def draft_places(
    model: "MoEDecoder",
    states_at: Callable[[Tensor, int], list[Tensor]],
    newest: Tensor,
    count: int,
    noise: Tensor | None,
) -> tuple[Tensor, list[Tensor]]:
    """The plain loop: drafts [A, n], and each of the states [A, n + 1, D]."""
    tokens, states = [newest], []
    for place in range(count + 1):
        states.append(states_at(tokens[-1], place))
        if place < count:
            logits = model.unembed(states[-1][0])[:, 0]
            tokens.append(few_rows.choose(logits, None if noise is None else noise[:, place])[:, None])
    return torch.cat(tokens, dim=1)[:, 1:], [torch.cat(parts, dim=1) for parts in zip(*states, strict=True)]


def choose_draft(model: "MoEDecoder", hidden: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
    """What states [N, D] say, with noise [N, V] in logits if there is any, and by what margin, as
    `few_rows.choose_by_margin`."""
    normed = model.norm(hidden)
    return few_rows.choose_by_margin(linear(normed, model.head_weight), noise, of=(normed, model.head_weight))


def _draft_by_place(
    model: "MoEDecoder",
    states_of: Callable[[Tensor, Places], list[Tensor]],
    newest: Tensor,
    positions: Tensor,
    cache: KVCache,
    noise: Tensor | None,
    key: tuple[Any, ...],
) -> tuple[Tensor, list[Tensor]]:
    """On a CPU: two recordings, from a token to its states and from those to the next token, repeated in turn."""
    count, run = positions.shape[1] - 1, by_rows(states_of, model.config, cache)
    if not count:
        inputs = [newest[:, 0], cache.rows, positions[:, 0]]
        return newest[:, :0], [state[:, None] for state in recorded(model, run, inputs, cache, ("draft", None, *key))]
    if recordings := _complete(*_drafting(model, run, newest, positions, cache, noise, key)):
        tokens, *states = drafts_of(recordings, newest, cache.rows, positions, noise)
        return tokens, states

    def states_at(token: Tensor, place: int) -> list[Tensor]:
        states = run([token[:, 0], cache.rows, positions[:, place].contiguous()])
        return [state[:, None] for state in states]

    return draft_places(model, states_at, newest, count, noise)


def _drafting(
    model: "MoEDecoder",
    run: Step,
    newest: Tensor,
    positions: Tensor,
    cache: KVCache,
    noise: Tensor | None,
    key: tuple[Any, ...],
    copies: "Int8Copies | None" = None,
) -> tuple[Recording | Graph, Recording | Graph]:
    """What is recorded of drafting: from a token to its states, and from those to the next token; by copies of the
    weights, where there are some."""

    def choice_of(inputs: list[Tensor]) -> list[Tensor]:
        hidden, *noise = inputs
        return list(choose_draft(model, hidden, noise[0] if noise else None))

    of = None if copies is None else copies.number
    with few_rows.reading({} if copies is None else copies.parts):
        start = [newest[:, 0], cache.rows, positions[:, 0]]
        first, _ = recording_of(model, run, start, cache, ("draft", of, *key))
        hidden = torch.zeros(len(newest), model.config.d_model, dtype=model.dtype, device=newest.device)
        drawn = [] if noise is None else [noise[:, 0]]
        second, _ = recording_of(model, choice_of, [hidden, *drawn], cache, ("choice", of, noise is None))
    return first, second


def _complete(*recordings: Recording | Graph) -> list[Recording]:
    """These, if they can all be repeated; else none."""
    complete = [one for one in recordings if isinstance(one, Recording) and one.complete]
    return complete if len(complete) == len(recordings) else []


@dataclass
class RecordedRound:
    """What is recorded of a round: of drafting, of a draft's choice, of verification; nothing, where not all can be."""

    recordings: list[Recording]

    @property
    def complete(self) -> bool:
        """Whether it can be repeated."""
        return bool(self.recordings)


def repeat_round(
    model: "MoEDecoder",
    exit_layer: int,
    wanted: tuple[list[int], list[int]],
    choices: bool,
    newest: Tensor,
    positions: Tensor,
    cache: KVCache,
    noise: Tensor | None,
    limits: Sequence[int],
    rule: MarginRule | None,
    copies: "Int8Copies | None",
    looked_up: Sequence[Sequence[int]],
    stage: Stage | None,
    history: Tensor | None,
) -> list[Tensor] | None:
    """Drafts, their verification and the full model's choices in one call, see `replay.round_of`; None where that
    cannot be recorded: on a GPU, and where an operator is not of the few rows'.

    wanted: layers of drafting and of verification whose states are
    copies: of weights, that drafts are made from; verification then begins with the tokens, and writes over what drafts
        left in the cache
    looked_up: by row, drafts that no layer is asked for, where others are made from copies; of none, or of all rows
    stage, history: of drafts of one row made from copies
    """
    assert stage is None or (copies is not None and len(newest) == 1 and stage.exit_layer < exit_layer)
    assert copies is not None or not any(looked_up)
    if not few_rows.serves(newest.device):
        return None
    check_positions(positions, model.config, cache)
    most = sum(limits) + len(limits)
    rooms = room_for(len(newest)), room_for(most)
    first = exit_layer if copies is None else 0  # of the layers that verify
    of = None if copies is None else copies.number
    proposing = exit_layer if stage is None else stage.exit_layer
    key = *weights_of(model), "round", of, proposing, exit_layer, *map(tuple, wanted), choices, noise is None, *rooms
    found = cache.recordings.get(key)
    if found is None:
        layers = list(range(exit_layer)), list(range(first, model.config.n_layers))
        for some, states in zip(layers, wanted, strict=True):
            check_run(some, model.config, len(positions), cache, collect=states)
        step, step_key = recordable(model, layers[0][:proposing], cache, None, wanted[0])
        run = by_rows(step, model.config, cache)
        drafting = _drafting(model, run, newest, positions, cache, noise, step_key, copies)
        deepen = list[Recording | Graph]()
        if stage is not None and copies is not None:
            step, step_key = recordable(model, layers[0][proposing:], cache, None, ())
            run, hidden = by_rows(step, model.config, cache), torch.zeros(1, model.config.d_model, dtype=model.dtype)
            with few_rows.reading(copies.parts):
                begin = [hidden, cache.rows, positions[:, 0]]
                deepen = [recording_of(model, run, begin, cache, ("deepen", of, *step_key))[0]]
        step, step_key = recordable(model, layers[1], cache, None, wanted[1], choices=choices, heads=True)
        start = torch.zeros(most, dtype=torch.int64)  # tokens, or states
        if copies is None:
            start = torch.zeros(most, model.config.d_model, dtype=model.dtype)
        inputs = [start, *(numbers[:1].expand(most) for numbers in (cache.rows, positions[:, 0]))]
        # (What is written here is written again, at the first repetition.)
        verification, _ = recording_of(model, by_rows(step, model.config, cache), inputs, cache, step_key)
        found = RecordedRound(_complete(*drafting, verification, *deepen))
        keep_recording(cache, key, found)
    assert isinstance(found, RecordedRound)
    if not found.complete:
        return None
    text = newest[0] if history is None else history
    padded = [[*drafts, *[-1] * (positions.shape[1] - 1 - len(drafts))] for drafts in looked_up]
    known = torch.tensor(padded) if any(looked_up) else None
    where = newest, cache.rows, positions
    return round_of(found.recordings, *where, noise, torch.tensor(limits), rule, known, stage, text)
