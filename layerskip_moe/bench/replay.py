"""Replay: a drafting policy, as it is, meets the rounds of a traced text instead of a model.

The policy is asked and told what `SelfSpeculative` would ask and tell it, one prompt after another, each a batch of its
own. How many drafts are accepted is exact; a round lasts as long as a cost model says, so every replay is the same.
Four things that a policy may see are not in a trace: what is drafted after the first refused draft, where the text's
own places stand in (so `should_stop` or a margin rule may end a round's last, refused drafts elsewhere); what is
proposed behind a wrong proposal, where drafts are made in stages (`staging.py`); the model itself, of which a session
here has the config alone; and the clock. As in decoding, drafts are int8 in rounds that are one call alone: not of a
policy with `should_stop`.

L layers, T places of a round.
Knows nothing of how policies are compared. Next: `policies.py`, which does; `rounds.py`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import torch

from layerskip_moe.bench.rounds import TextRounds
from layerskip_moe.bench.staging import staged_drafts
from layerskip_moe.generation import Sampling, Session
from layerskip_moe.generation.policies.policy import Policy, RoundReport
from layerskip_moe.generation.self_speculative import watched_exits
from layerskip_moe.nn import ModelConfig
from layerskip_moe.nn.ragged import Judged


@dataclass(frozen=True)
class ReplayedRound:
    """One round.

    Attributes:
        exit_layer: the layers that drafted, 0 where nothing was to be drafted, or none was asked
        drafted: tokens drafted and verified
        accepted: of them
        experts: how many different ones verification read, by MoE layer
        seconds: by the cost model
        int8: whether drafts were made from int8 copies
    """

    exit_layer: int
    drafted: int
    accepted: int
    experts: list[int]
    seconds: float
    int8: bool = False


@dataclass
class ReplaySession:
    """What stands in for `Session` in `plan`: of one row, those of its attributes that a plan may depend on.

    model has nothing but its `config`; the prompt is that of `text_rounds`; place: how many new tokens there are.
    """

    text_rounds: TextRounds
    model: SimpleNamespace
    sampling: Sampling
    row_numbers: list[int]
    max_new_tokens: int
    place: int = 0
    one_call: bool = True

    @property
    def remaining(self) -> list[int]:
        """As `Session.remaining`."""
        return [self.max_new_tokens - self.place]

    @property
    def new_tokens(self) -> list[list[int]]:
        """As `Session.new_tokens`."""
        return [self.text_rounds.tokens[: self.place].tolist()]

    @property
    def newest(self) -> torch.Tensor:
        """As `Session.newest`."""
        end = self.text_rounds.text.prompt_length + self.place
        return torch.tensor([self.text_rounds.all_tokens[end - 1 : end]])

    def texts(self) -> list[list[int]]:
        """As `Session.texts`."""
        return [self.text_rounds.all_tokens[: self.text_rounds.text.prompt_length + self.place]]

    def prompt_agreement(self, exits: Sequence[int]) -> list[dict[int, list[Judged]]]:
        """As `Session.prompt_agreement`."""
        traced = self.text_rounds.text
        last = slice(max(traced.prompt_length - 17, 0), traced.prompt_length - 1)
        said, margin = traced.said[:, last], traced.margin[:, last]
        by_exit = {exit_layer: (margin[exit_layer - 1], said[exit_layer - 1] == said[-1]) for exit_layer in exits}
        return [{layer: [*zip(*(part.tolist() for part in parts), strict=True)] for layer, parts in by_exit.items()}]


def replay(texts: Sequence[TextRounds], policy: Policy, config: ModelConfig) -> list[list[ReplayedRound]]:
    """The rounds of each text, one after another, by a policy that goes on learning.

    Raises ValueError for a plan that `SelfSpeculative` would refuse, and for int8 drafts that the trace does not have.
    """
    return [_replay_text(text, policy, config) for text in texts]


def _replay_text(text: TextRounds, policy: Policy, config: ModelConfig) -> list[ReplayedRound]:
    session = ReplaySession(
        text_rounds=text,
        model=SimpleNamespace(config=config),
        sampling=Sampling(text.text.temperature, seed=text.text.seed),
        row_numbers=[0],
        max_new_tokens=text.length,
    )
    rounds: list[ReplayedRound] = []
    while (place := session.place) < text.length:
        if resting := int(getattr(policy, "rests", _never)(cast(Session, session))):
            session.place = min(place + resting, text.length)
            for step in range(place, session.place):
                rounds.append(ReplayedRound(0, 0, 0, text.experts(step, 0, 0), text.seconds(step, 0, 0)))
            continue
        [(exit_layer, length)] = policy.plan(cast(Session, session))
        if length < 0 or (length and not 1 <= exit_layer <= config.n_layers):
            raise ValueError(
                f"the policy planned exit layer {exit_layer} and {length} drafts; exit layers are 1 to "
                f"{config.n_layers}, and 0 drafts or more."
            )
        [lookups] = getattr(policy, "lookup_drafts", ()) or [[]]
        limit = min(len(lookups) or length, session.remaining[0] - 1)
        exit_layer = exit_layer if limit and not lookups else 0
        stop = policy.should_stop
        int8 = bool(exit_layer and stop is None and getattr(policy, "int8_drafts", False))
        if int8 and limit > text.most_int8:
            raise ValueError(
                f"the policy planned {limit} int8 drafts, and the trace has {text.most_int8} at most; plan fewer, or "
                "record a trace where int8 copies can be made."
            )
        if lookups:
            drafted, made, confidences, looked_up = limit, 0, list[float](), limit
            same = (one == other for one, other in zip(lookups[:limit], text.tokens[place:].tolist(), strict=False))
            accepted = [*same, False].index(False)
        else:
            drafted, confidences = _draft(text, place, exit_layer, limit, policy, int8)
            made, looked_up = min(drafted + 1, limit) if stop is None else drafted, 0
            accepted = text.accepted(place, exit_layer, drafted, int8=int8)
        stage, staged = getattr(policy, "stage", None) if int8 else None, None
        if stage is not None and stage.exit_layer < exit_layer:
            drafted, made, accepted, staged = staged_drafts(text, place, exit_layer, limit, drafted, made, stage)
            looked_up, exit_layer = staged.looked_up, exit_layer if made else 0
        experts = text.experts(place, exit_layer, drafted, int8=int8)
        seconds = text.seconds(place, exit_layer, drafted, made, int8=int8, staged=staged)
        places = slice(place, place + drafted + 1)
        asked = limit and stop is None and not lookups
        judged = _judged(text, place, exit_layer, min(accepted + 1, made), int8) if asked else None
        shadow = _shadow(text, places, policy, config) if policy.shadow and not lookups else None
        most = getattr(policy, "shadow_places", None)
        asked_of = drafted + 1 if most is None else min(drafted + 1, most)
        watched = 0 if shadow is None else asked_of * len(watched_exits(policy, config))
        asking = text.asking_seconds(int8=int8, stops=bool(made) and stop is not None, made=made, shadow=watched)
        session.place += accepted + 1
        report = RoundReport(
            rows=[0],
            exit_layers=[exit_layer],
            drafted=[drafted],
            accepted=[accepted],
            confidences=[confidences],
            seconds=seconds,
            tokens=_tokens(text.tokens[places]),
            experts=experts if experts and getattr(policy, "experts", False) else None,
            shadow=shadow,
            judged=judged,
            made=[made],
            looked_up=[looked_up],
            shadow_margins=None if shadow is None else _shadow_margins(text, places, shadow),
            staged=staged,
        )
        policy.observe(report)
        rounds.append(ReplayedRound(exit_layer, drafted, accepted, experts, seconds + asking, int8))
    return rounds


def _draft(
    text: TextRounds, place: int, exit_layer: int, limit: int, policy: Policy, int8: bool
) -> tuple[int, list[float]]:
    """How many drafts are verified, of at most `limit`; their confidences where the policy asks."""
    should_stop, rule = policy.should_stop, getattr(policy, "margin_rule", None)
    confidences: list[float] = []
    if should_stop is None:
        if rule is not None and limit:
            margins = text.margins(place, exit_layer, limit, int8=int8)
            [limit] = rule.kept(torch.from_numpy(margins[None]), [limit])
        return limit, confidences
    for draft in range(limit):
        confidence = torch.from_numpy(text.confidence[exit_layer - 1, place + draft, None].copy())
        confidences.append(float(confidence))
        if draft + 1 < limit and bool(should_stop(confidence, draft)):
            return draft + 1, confidences
    return limit, confidences


def _judged(text: TextRounds, place: int, exit_layer: int, count: int, int8: bool) -> list[list[Judged]]:
    """As in a report: so many places' margins, and whether the exit is right there, of which all but the last are
    known to be."""
    right = text.accepted(place, exit_layer, count, int8=int8)
    margins = text.margins(place, exit_layer, count, int8=int8).tolist()
    return [[(margin, draft < right) for draft, margin in enumerate(margins)]]


def _shadow(text: TextRounds, places: slice, policy: Policy, config: ModelConfig) -> torch.Tensor:
    """[1, L, T], as in a report: of the exits that the policy watches, at the places that it asks for, and of the last
    layer."""
    said = _tokens(text.said[:, places])
    watched = [*watched_exits(policy, config), config.n_layers]
    others = [layer for layer in range(config.n_layers) if layer + 1 not in watched]
    said[:, others] = -1
    if (most := getattr(policy, "shadow_places", None)) is not None:
        said[:, :-1, most:] = -1
    return said


def _shadow_margins(text: TextRounds, places: slice, shadow: torch.Tensor) -> torch.Tensor:
    """[1, L, T], likewise: of shadow tokens, but the last layer's."""
    margins = torch.from_numpy(text.margin[None, :, places].astype("float64"))
    margins[:, -1] = math.nan
    return margins.where(shadow >= 0, math.nan)


def _never(session: Session) -> int:
    """A policy without `rests` does not."""
    return 0


def _tokens(of_row: Any) -> torch.Tensor:
    """[...] -> [1, ...] int64."""
    return torch.from_numpy(of_row.astype("int64"))[None]
