"""The network's part of a self-speculative round: each row drafts with layers of its own, and all are verified
together, every layer once.

The places of a round are the newest token of each row, place 0, and its drafts after it. A draft's first layers have
run over all places but the last of its row, whose token nobody had asked about. So verification starts with the last
place of every row at layer 0, and takes in the others where their drafts left them, on its way up.

A active rows, R or N some of their places, T places of the row that has most, D width, L layers, V vocabulary.
Knows nothing of choosing tokens. Next: `self_speculative.py`, which calls this; `verification.py`, which chooses.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from layerskip_moe.generation.sampling import choose_by_margin, penalize
from layerskip_moe.generation.session import Session
from layerskip_moe.generation.verification import Round
from layerskip_moe.nn import ModelConfig, MoEDecoder
from layerskip_moe.nn.int8_copies import Int8Copies
from layerskip_moe.nn.ragged import LOOK_BACK, Judged, MarginRule, Stage, Staged, as_index, by_row, in_turn
from layerskip_moe.nn.rounds import Speculated, speculate


@dataclass
class States:
    """The states of some places of a round, all after the same layer.

    rows, places: N numbers each: which active row, and which place of it; hidden: [N, 1, D]
    """

    rows: list[int]
    places: list[int]
    hidden: Tensor

    @classmethod
    def join(cls, parts: Iterable["States"]) -> "States":
        """All of them, one after the other."""
        parts = list(parts)
        rows = [row for part in parts for row in part.rows]
        places = [place for part in parts for place in part.places]
        return cls(rows, places, torch.cat([part.hidden for part in parts]))


@dataclass
class Watch:
    """What else is kept of a round, for a policy that asks.

    exits:   exit layers, below L, after which the states are
    choices: whether the choices of verification's routers are
    shadow:  whether shadow tokens are asked for in this round
    first:   of each row's first so many places; None: of all
    seen:    (layer index, its states), each place once for each layer
    chosen:  layer index -> experts chosen there [N, K]
    """

    exits: Sequence[int]
    choices: bool
    shadow: bool
    first: int | None = None
    seen: list[tuple[int, States]] = field(default_factory=list)
    chosen: dict[int, Tensor] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.exits) or self.choices

    def collect(self, layers: range) -> list[int]:
        """Those of some layers whose states are kept."""
        return [exit_layer - 1 for exit_layer in self.exits if exit_layer - 1 in layers]


def go_together(session: Session, round_: Round, exit_layers: list[int], drafter: MoEDecoder) -> bool:
    """Whether `draft_and_verify` does for this round: all rows that draft do so by the same layers, and nothing is
    asked in between."""
    plain = drafter is session.model and not (round_.confident or round_.rejection or session.sampling.filters)
    return plain and round_.length > 0 and len({layer for layer in exit_layers if layer}) == 1


def draft_and_verify(
    session: Session,
    round_: Round,
    exit_layer: int,
    watch: Watch,
    rule: MarginRule | None,
    copies: Int8Copies | None,
    looked_up: Sequence[Sequence[int]],
    stage: Stage | None,
) -> tuple[Tensor, list[int], list[list[Judged]] | None, list[int], Staged | None]:
    """Draft, from copies of the weights where there are some, verify and choose in one call: tokens and how many
    drafts were accepted, as `Round.settle` has them, and of `RoundReport` what is judged, looked up and staged:
    looked up only beside drafts from copies, staged only such drafts of one row. Where a rule keeps fewer drafts,
    `round_` gets lower limits."""
    if copies is None or len(round_.limits) > 1 or (stage is not None and stage.exit_layer >= exit_layer):
        stage = None
    done = speculate(
        session.model,
        session.newest,
        exit_layer,
        positions=session.positions(round_.length + 1),
        cache=session.cache,
        noise=None if round_.noise is None else round_.noise * session.sampling.temperature,
        limits=round_.limits,
        rule=rule,
        collect=watch.collect(range(session.model.config.n_layers)),
        choices=watch.choices,
        copies=copies,
        looked_up=looked_up if copies is not None and stage is None else (),
        stage=stage,
        history=None if stage is None else _latest(session),
    )
    watch.chosen |= done.chosen
    judged = None if done.margins is None else _judged(done, done.margins, round_.limits)
    round_.limits = done.drafted
    if watch.shadow:
        rows, places = in_turn([range(limit + 1) for limit in round_.limits])
        watch.seen += [(layer, States(rows, places, states[:, None])) for layer, states in done.collected.items()]
    return done.tokens, done.accepted, judged, done.looked_up, done.staged


def _latest(session: Session) -> Tensor:
    """The last tokens of one row's text [.], the newest too."""
    end = int(session.cache.lengths) + 1
    return session.tokens[0, max(end - LOOK_BACK, 0) : end]


def _judged(done: Speculated, margins: Tensor, limits: Sequence[int]) -> list[list[Judged]]:
    """By row, of drafts that stand behind right ones alone: the margin, and whether the full model agrees. Drafts that
    were looked up have none."""
    drafts, tokens = done.drafts.tolist(), done.tokens.tolist()
    judged = []
    for row, of_row in enumerate(margins.tolist()):
        asked = done.drafted[row] - done.looked_up[row] if done.looked_up[row] else limits[row]
        known = min(done.accepted[row] + 1, asked)
        judged.append([(of_row[at], drafts[row][at] == tokens[row][at]) for at in range(known)])
    return judged


def draft(
    session: Session,
    round_: Round,
    exit_layers: list[int],
    should_stop: Callable[[Tensor, int], Tensor | bool] | None,
    drafter: MoEDecoder,
    watch: Watch,
) -> tuple[dict[int, list[States]], list[list[float]]]:
    """Draft up to round_.limits[r] tokens for row r by its first exit_layers[r] layers; `round_` gets them, and lower
    limits where `should_stop` says so.

    drafter: the model, or one of the same layers with another head
    -> by exit layer, rising, the states that verification goes on from; for each row its drafts' confidences
    """
    states: dict[int, list[States]] = {layer: [] for layer in sorted(set(exit_layers)) if layer}
    confidences: list[list[float]] = [[] for _ in exit_layers]
    place = 0
    while place < round_.length:
        drafting: list[int] = []  # the rows that do, by exit layer
        logits = []
        for exit_layer, parts in states.items():
            rows = [row for row, limit in enumerate(round_.limits) if limit > place and exit_layers[row] == exit_layer]
            if rows:
                part, told = _draft_with(session, round_, exit_layer, rows, drafter, watch)
                parts.append(part)
                logits.append(told)
                drafting += rows
        everybody = len(drafting) == len(exit_layers) and len(logits) == 1
        round_.draft(*logits) if everybody else round_.draft(torch.cat(logits), session.newest.new_tensor(drafting))
        if should_stop is not None:
            assert round_.confidence is not None
            for row, confidence in zip(drafting, round_.confidence.tolist(), strict=True):
                confidences[row].append(confidence)
            if place + 1 < round_.length:
                for row, stops in zip(drafting, _told(should_stop, round_.confidence, place), strict=True):
                    if stops:
                        round_.limits[row] = place + 1
        place += 1
    return {layer: parts for layer, parts in states.items() if parts}, confidences


def _draft_with(
    session: Session, round_: Round, exit_layer: int, rows: list[int], drafter: MoEDecoder, watch: Watch
) -> tuple[States, Tensor]:
    """The next place of some rows through the first layers and the head: states, and logits [R, 1, V]."""
    place = len(round_.drafts)
    token = round_.drafts[-1] if place else session.newest
    if len(rows) == len(token):
        cache = session.cache
    else:
        index = token.new_tensor(rows)
        token, cache = token[index], session.cache.subset(index)
    positions, layers, model = cache.lengths[:, None] + place, range(exit_layer), session.model
    places = [place] * len(rows)
    if drafter is model and not watch.exits:
        output, logits = model.decode(token, layers, positions=positions, cache=cache)
        return States(rows, places, output.hidden), logits
    collect = watch.collect(layers)
    output = model.run(model.embed(token), layers, positions=positions, cache=cache, collect=collect)
    watch.seen += [(layer, States(rows, places, output.collected[layer])) for layer in collect]
    return States(rows, places, output.hidden), drafter.unembed(output.hidden)


def verify(session: Session, round_: Round, drafted: dict[int, list[States]], watch: Watch) -> Tensor:
    """The full model's logits [A, T, V] after the newest token of each row and after its drafts; zeros beyond."""
    model, limits, places = session.model, round_.limits, round_.length + 1
    n_layers = model.config.n_layers
    if not drafted:
        return _decode(session, watch)
    text = torch.cat([session.newest, *round_.drafts], dim=1)
    if min(limits) == round_.length and len(drafted) == 1 and not watch:  # as one [A, T]
        positions = session.positions(places)
        [(exit_layer, parts)] = drafted.items()
        newest = session.run(model.embed(text[:, -1:]), range(exit_layer), positions[:, -1:])
        hidden = torch.cat([*(part.hidden for part in parts), newest], dim=1)
        return session.decode(hidden, range(exit_layer, n_layers), positions)
    last = text.gather(1, text.new_tensor(limits)[:, None])
    states, done = States(list(range(len(limits))), list(limits), model.embed(last)), 0
    for exit_layer, parts in drafted.items():
        states = _run(session, states, range(done, exit_layer), watch)
        states, done = States.join([states, *parts]), exit_layer
    index = as_index(states.rows, states.places, text.device)
    if watch:
        told = model.unembed(_run(session, states, range(done, n_layers), watch).hidden)
    else:
        _, told = model.decode(states.hidden, range(done, n_layers), **session.at(*index))
    return by_row(told, *index, shape=(len(limits), places))


def _decode(session: Session, watch: Watch) -> Tensor:
    """A step of plain decoding: logits [A, 1, V]."""
    layers, rows = range(session.model.config.n_layers), list(range(len(session.newest)))
    output, logits = session.model.decode(
        session.newest,
        layers,
        positions=session.positions(1),
        cache=session.cache,
        collect=watch.collect(layers),
        choices=watch.choices,
    )
    watch.seen += [(layer, States(rows, [0] * len(rows), states)) for layer, states in output.collected.items()]
    watch.chosen |= output.chosen
    return logits


def _run(session: Session, states: States, layers: range, watch: Watch) -> States:
    """Places of any rows through some layers: each is run as a row of its own, over its row's cache."""
    if not layers:  # (of the whole model that drafted)
        return states
    collect = watch.collect(layers)
    output = session.model.run(
        states.hidden,
        layers,
        collect=collect,
        choices=watch.choices,
        **session.at(*as_index(states.rows, states.places, states.hidden.device)),
    )
    watch.seen += [(layer, States(states.rows, states.places, output.collected[layer])) for layer in collect]
    watch.chosen |= output.chosen
    return States(states.rows, states.places, output.hidden)


def _told(should_stop: Callable[[Tensor, int], Tensor | bool], confidence: Tensor, place: int) -> list[bool]:
    """What a policy's `should_stop` says of each row."""
    stops = torch.as_tensor(should_stop(confidence, place))
    if stops.shape not in ((), confidence.shape):
        raise ValueError(
            f"the policy's should_stop returned shape {list(stops.shape)} for {len(confidence)} drafts; "
            "it must return one truth value for each, or one for all."
        )
    return [bool(stops)] * len(confidence) if stops.dim() == 0 else stops.tolist()


def shadow_tokens(session: Session, round_: Round, watch: Watch, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """[A, L, T] int64: what the state after each layer that is watched says at each place, with the drafts' noise; the
    last layer's are `tokens` [A, T]; -1 elsewhere, and beyond the places that are asked for. And margins [A, L, T], see
    `RoundReport.shadow_margins`. Before the round is appended."""
    n_rows, places = tokens.shape
    shadow = tokens.new_full((n_rows, session.model.config.n_layers, places), -1)
    margins = torch.full(shadow.shape, math.nan, dtype=torch.float64, device=tokens.device)
    limits = tokens.new_tensor(round_.limits)[:, None]
    shadow[:, -1] = tokens.where(torch.arange(places, device=tokens.device) <= limits, -1)
    if watch.seen:
        layers = tokens.new_tensor([layer for layer, states in watch.seen for _ in states.rows])
        states = States.join(states for _, states in watch.seen)
        rows, at = as_index(states.rows, states.places, tokens.device)
        asked = at < (places if watch.first is None else watch.first)
        layers, rows, at = layers[asked], rows[asked], at[asked]
        scores, seen = session.model.unembed(states.hidden[asked])[:, 0], session.seen(places, round_.drafts)
        assert seen is None or len(round_.drafts) + 1 == places, "a round with a penalty notes its drafts"
        if seen is not None:
            scores = penalize(scores, seen[rows, at], session.sampling.repetition_penalty)
        noise = None if round_.noise is None else round_.noise[rows, at]
        shadow[rows, layers, at], margins[rows, layers, at] = choose_by_margin(scores, session.sampling, noise)
    return shadow, margins


def experts_read(watch: Watch, config: ModelConfig) -> list[int] | None:
    """By MoE layer, rising, how many different experts verification read; None in dense models."""
    layers = [layer for layer in range(config.n_layers) if config.is_moe(layer)]
    if not layers:
        return None
    read = dict.fromkeys(layers, config.top_k)  # by the one place that a draft ran in the same call
    if watch.chosen:
        chosen = [experts.flatten() for experts in watch.chosen.values()]
        index = torch.repeat_interleave(torch.tensor([len(experts) for experts in chosen]))
        found = torch.zeros(len(chosen) * config.num_experts, dtype=torch.int64, device=chosen[0].device)
        found[torch.cat(chosen) + config.num_experts * index.to(found.device)] = 1
        counts = found.view(len(chosen), config.num_experts).sum(dim=1).tolist()
        read |= dict(zip(watch.chosen, counts, strict=True))
    return list(read.values())
