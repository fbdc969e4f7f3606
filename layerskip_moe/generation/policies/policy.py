"""Policy: who decides, before a round of self-speculation, how each row drafts, and what it is told afterwards.

A policy changes how fast a text comes, never the text (under `coupling="shared"`). A active rows, L layers, T places of
a round: the newest token and the drafts after it.
Knows nothing of how a round is made. Next: `fixed.py`, the smallest; `../self_speculative.py`, which asks.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from layerskip_moe.generation.session import Session
from layerskip_moe.nn.ragged import Judged, Staged


@dataclass  # (not frozen: one is made each round, which takes thrice as long for frozen ones)
class RoundReport:
    """What came of one round, row by row in the order of the plan.

    Attributes:
        rows: the number of the prompt that each of A rows continues, counted over all of `generate`'s prompts
        exit_layers: the layers that drafted; 0 where nothing was to be drafted, or no layer was asked
        drafted: tokens drafted and verified, no more than planned: a row that may get r more has use for r - 1, and a
            margin rule may let the last one go
        accepted: how many of them the full model agreed with, before the first that it did not
        confidences: for each row and draft the probability the drafter gave it; no numbers where the policy has no
            `should_stop`
        seconds: wall time of drafting, verifying and appending to all rows, without `plan`, the head on shadow
            states, and `on_token`. Rounds with `shadow`, `experts` or `should_stop` are made of more calls than others,
            and take longer. A GPU is waited for, as every round ends by reading how many drafts were accepted.
        tokens: [A, T] int64, the full model's choices, of which accepted + 1 are a row's, though it ends at a stop
            token among them
        experts: by MoE layer, how many different experts verification read; None where the policy has no `experts`,
            and in dense models
        shadow: [A, L, T] int64, the token that the state after each layer says at each place, by the shared head and
            with the drafts' noise (the last layer's are `tokens`); -1 beyond a row's drafts and one more, beyond the
            policy's `shadow_places`, and at layers that are not among its `exits`. None where its `shadow` is False.
        made: drafts of each row that layers made, one more than are kept where a margin rule let one go
        looked_up: how many of each row's drafts, the last ones, no layer was asked for
        judged: for each row the margin (`nn/ragged.py`) of each draft, and whether the full model agreed, as far as
            that is known: up to the first wrong one, and of one that was let go behind right ones, but of none that
            was looked up. Known of rounds that are one call: where all rows draft by the same layers, the policy has
            no `should_stop`, and sampling has neither filters nor coupling="rejection". None elsewhere.
        staged: what was done to make one row's int8 drafts in stages; None of rounds that were not
        shadow_margins: [A, L, T] float64, the margins of `shadow`; nan where there are none, and where sampling filters
            or penalises. None where `shadow` is.
    """

    rows: list[int]
    exit_layers: list[int]
    drafted: list[int]
    accepted: list[int]
    confidences: list[list[float]]
    seconds: float
    tokens: Tensor
    experts: list[int] | None = None
    shadow: Tensor | None = None
    made: list[int] = field(default_factory=list)
    looked_up: list[int] = field(default_factory=list)
    judged: list[list[Judged]] | None = None
    shadow_margins: Tensor | None = None
    staged: Staged | None = None


class Policy(Protocol):
    """What `SelfSpeculative` asks of a policy. The object lives on: what it learnt in one `generate` serves in the
    next, so one object is for one model.

    It may also have these attributes:

    exit_layer: checked before anything runs
    experts: asked before each round: where True, `RoundReport.experts` is filled in
    exits: exit layers, below L: shadow tokens are of these alone. Their states at the end of the prompts are kept,
        too, in `Session.prompt`
    shadow_places: shadow tokens are of each row's first so many places alone, 1 or more; None: of all
    margin_rule: asked after each `plan`: a `MarginRule` by which rows draft no more where they are unsure, or None. It
        is left aside in rounds of which nothing would be `judged`
    int8_drafts: asked after each `plan`: whether drafts are made from int8 copies of the weights, as `SelfSpeculative`
        says, where the round is one call; elsewhere it is left aside
    lookup_drafts: asked after each `plan`: for each row drafts that no layer is asked for, or none, or () where no
        row has any; a row that has some drafts no others. In rounds of `int8_drafts` that are one call, rows that
        have none draft as planned; elsewhere these draft nothing then, and the round is not asked for `shadow`. Left
        aside with coupling="rejection"
    stage: asked after each `plan`: how int8 drafts of one row are made in two stages, a `Stage`, or None; where fewer
        layers are to draft than it says, or the same, it is left aside
    rests: a method of the session, asked first: how many steps are plain decoding from here on, without `plan` and
        `observe`, or until a row ends, before it is asked again; 0: none is
    rested: a method of (rows, seconds), called after the first of them: of how many rows it was, and how long it took,
        as in `RoundReport.seconds`
    prepare: a method of (model, rows, one_call), called before a batch of so many rows and before anything is timed;
        one_call: whether rounds may be one call, for sampling has no filters, and coupling is "shared"
    """

    @property
    def shadow(self) -> bool:
        """Whether `observe` wants `RoundReport.shadow`, which costs the head on every layer's state; asked before each
        round."""

    @property
    def should_stop(self) -> Callable[[Tensor, int], Tensor | bool] | None:
        """None where all that is planned is drafted: then confidences cost nothing. Else a method of (confidence [R],
        position): the probability that the drafter gives the newest draft of each of R rows, and which draft of
        the round it was, 0, 1, ...; it returns [R] bool, or one for all: the rows that draft no more in this round. The
        draft itself stays. One call is for all rows that still draft, by exit layer and then by row."""

    def plan(self, session: Session) -> list[tuple[int, int]]:
        """Before a round: (exit layer, draft length) for each active row, whose numbers are `session.row_numbers`.
        Length 0 is plain decoding for this round, whatever the layer."""

    def observe(self, round: RoundReport) -> None:
        """After a round."""
