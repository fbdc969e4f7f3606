"""SelfSpeculative: the first layers draft, the remaining layers verify all drafts in one pass
(LayerSkip, arXiv 2404.16710, section 4.3).

The draft's keys, values and exit states are kept, so verification runs only the layers the draft left out,
and the early ones for the newest draft, which the draft had no need to run. What is rejected is forgotten
by not counting it. How many layers draft how many tokens is a policy's to say, before each round and for each row.

Drafts may be made from int8 copies of the weights (`nn/int8_copies.py`), which are read in less time: on the same
cache, whose drafted places verification then writes anew, by every layer. And by the early layers of another model,
whose cache is another: that is `speculative.py`'s way, and is left to it.

Knows nothing of how a session stores its rows. Next: `drafting.py`, `verification.py`; `policies/policy.py`.
"""

import threading
import time
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

from layerskip_moe.generation.autoregressive import Autoregressive, check_exit_layer
from layerskip_moe.generation.drafting import (
    Watch,
    draft,
    draft_and_verify,
    experts_read,
    go_together,
    shadow_tokens,
    verify,
)
from layerskip_moe.generation.policies.adaptive import Adaptive
from layerskip_moe.generation.policies.fixed import Fixed
from layerskip_moe.generation.policies.policy import Policy, RoundReport
from layerskip_moe.generation.proposals import propose
from layerskip_moe.generation.proposals import verify as verify_proposals
from layerskip_moe.generation.sampling import Sampling
from layerskip_moe.generation.session import Session
from layerskip_moe.generation.speculative import Speculative
from layerskip_moe.generation.verification import Coupling, Round, check_drafting
from layerskip_moe.nn import ModelConfig, MoEDecoder, few_rows
from layerskip_moe.nn.int8_copies import int8_copies, kept_copies, why_no_int8
from layerskip_moe.nn.ragged import MarginRule, Stage
from layerskip_moe.refusals import shown

# What a policy plans and observes it does whole: threads that share a strategy may come in between, and a callback in
# the same thread. (One for all policies: it is held for microseconds, but where one times a model or reads a prompt.)
_asking = threading.RLock()
_PLAIN = Autoregressive()


@dataclass(frozen=True)
class SelfSpeculative:
    """Draft with the first layers, verify with the rest: `SelfSpeculative()`, or `SelfSpeculative(2, 4)` for a fixed
    exit layer and draft length.

    Attributes:
        exit_layer: n in 1..L: the first n layers draft; L drafts with the whole model. With `draft_length` short for
            the policy `Fixed(exit_layer, draft_length)`.
        draft_length: tokens drafted per round, 1 or more; 4 where only exit_layer is given
        policy: decides both anew for each row before each round, and may end a round's drafting early; see `policies/`.
            Where neither it nor exit_layer is given, `Adaptive()`, which drafts as much as pays, and goes on learning
            from call to call of the same object
        coupling: "shared": draft and full model choose with the same noise, and the full model's choice is
            the output, so the text equals plain decoding's token for token at any temperature.
            "rejection": accept a draft x with probability min(1, p(x) / q(x)), else draw from
            max(p - q, 0) normalised (arXiv 2211.17192); keeps the distribution, not the text, and
            accepts somewhat more. Greedy decoding is the same under both. (Noise of a discarded draft is met again at
            its position: "rejection" is exact where plans do not depend on drafts behind the first refused one.)
        draft_model: another decoder whose first `exit_layer` layers and head draft, such as
            `quantize(model, "int4")`, as in `Speculative`; None: the model itself. It is as lossless: what the draft
            computed is used at verification only where its embedding and those layers are the model's own. It drafts
            by exit_layer and draft_length, not by a policy.
        int8_drafts: whether drafts are made from int8 copies of the model's weights, which take a quarter of float32's
            memory beside them, and every layer verifies. As lossless, and faster where reading weights is what takes
            time: the whole model may draft then, exit_layer=L. On a CPU, compiled, in rounds of one call: without
            `should_stop`, `top_k`, `top_p` and penalties, with shared noise, of at most 64 places, prompts times
            drafts + 1. True refuses what cannot be. None: where `SelfSpeculative()` is left to find its own settings,
            of up to 32 prompts, where they can be, on a processor with AVX2 or AVX-512, and where they take 1 GiB or
            less. They stay as long as the model, and follow its weights, but for what is written through `.data`, or to
            weights made in inference mode.
    """

    exit_layer: int | None = None
    draft_length: int | None = None
    _: KW_ONLY
    policy: Policy | None = None
    coupling: Coupling = "shared"
    draft_model: MoEDecoder | None = None
    int8_drafts: bool | None = None

    def __post_init__(self) -> None:
        for name, value in (("exit_layer", self.exit_layer), ("draft_length", self.draft_length)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise ValueError(f"{name}={shown(value)} must be a whole number; a policy is given as policy=.")
        if self.policy is not None:
            if isinstance(self.policy, str | type) or not hasattr(self.policy, "plan"):
                raise ValueError(
                    f"policy={shown(self.policy)} is not a policy; give an object, such as Cascade(exit_layer=2)."
                )
            if self.exit_layer is not None or self.draft_length is not None or self.draft_model is not None:
                raise ValueError(
                    "a policy says which layers draft how much; leave out exit_layer, draft_length and draft_model."
                )
            if self.int8_drafts is not None:
                raise ValueError("a policy says whether drafts are int8, by its own int8_drafts; leave it out here.")
        elif self.exit_layer is None:
            if self.draft_length is not None or self.draft_model is not None:
                raise ValueError("draft_length and draft_model go with an exit_layer; give it, or leave both out.")
            object.__setattr__(self, "policy", Adaptive(int8_drafts=self.int8_drafts))
        elif self.draft_length is None:
            object.__setattr__(self, "draft_length", 4)
        if self.int8_drafts is not None and not isinstance(self.int8_drafts, bool):
            raise ValueError(f"int8_drafts={shown(self.int8_drafts)} must be True, False or None.")
        if self.int8_drafts and (self.draft_model is not None or self.coupling != "shared"):
            raise ValueError(
                "int8_drafts are the model's own, chosen with shared noise; leave out draft_model and coupling."
            )
        check_drafting(1 if self.draft_length is None else self.draft_length, self.coupling)

    def check(self, config: ModelConfig) -> None:
        """Raise ValueError where the model, or the draft model, has no such exit layer, and where the two do not share
        a vocabulary."""
        if self.draft_model is not None:
            self._speculative(self.draft_model).check(config)
        elif hasattr(self._policy, "exit_layer"):
            check_exit_layer(self._policy.exit_layer, config)

    def prepare(self, model: MoEDecoder, rows: int, sampling: Sampling) -> None:
        """Before a batch of so many rows, and before anything is timed: a policy may time the model, once. Raises
        ValueError where drafts shall be int8, and cannot."""
        one_call = self._one_call(sampling)
        if self.int8_drafts:
            against = why_no_int8(model) if one_call else "top_k, top_p or a penalty is set"
            places = rows * ((self.draft_length or 0) + 1)
            if places > few_rows.MOST_ROWS:
                against = (
                    f"{rows} prompts times {self.draft_length} drafts + 1 are more than {few_rows.MOST_ROWS} places"
                )
            if against is not None:
                raise ValueError(f"int8_drafts=True cannot be: {against}; leave it out.")
        prepare = getattr(self._policy, "prepare", None)
        if prepare is not None:
            with _asking:
                prepare(model, rows, one_call)
        if getattr(self._policy, "int8_drafts", False):
            int8_copies(model)  # as its weights are now

    def start(self, session: Session) -> None:
        """Run the prompts, through both models where they differ; then raises ValueError as `Speculative.start`."""
        draft, session.one_call = self.draft_model, self._one_call(session.sampling)
        if draft is None or (self.exit_layer is not None and _begin_alike(session.model, draft, self.exit_layer)):
            exits = getattr(self._policy, "exits", ())
            session.prefill(collect=[exit_layer - 1 for exit_layer in exits])
        else:
            self._speculative(draft).start(session)

    def step(self, session: Session) -> None:
        """One round: draft, verify, append what the full model chose. Raises ValueError for a plan that cannot be
        followed."""
        if session.resting:  # (a rest is to be as fast as plain decoding)
            session.resting -= 1
            _PLAIN.step(session)
            return
        drafter, policy = self.draft_model or session.model, self._policy
        rests = getattr(policy, "rests", None)
        if rests is not None:
            with _asking:
                resting = rests(session)
            if resting:
                n_rows, started = len(session.row_numbers), _clock(session)
                session.resting = int(resting) - 1
                _PLAIN.step(session)
                rested, seconds = getattr(policy, "rested", None), _clock(session) - started
                if rested is not None:
                    with _asking:
                        rested(n_rows, seconds)
                return
        if session.state is not None:  # the cache of a draft model that differs, which `start` made
            self._speculative(drafter).step(session)
            return
        with _asking:
            plan = policy.plan(session)
            shadow, experts = policy.shadow, getattr(policy, "experts", False)
            rule, int8 = getattr(policy, "margin_rule", None), getattr(policy, "int8_drafts", False)
            stage, lookups = getattr(policy, "stage", None), getattr(policy, "lookup_drafts", ())
            first = getattr(policy, "shadow_places", None)
        _check_plan(plan, session)
        if rule is not None and not isinstance(rule, MarginRule):
            raise ValueError(f"the policy's margin_rule={shown(rule)} is no rule; give a MarginRule, or None.")
        if rule is not None and len(rule.halves) != len(plan):
            raise ValueError(
                f"the policy's margin rule is for {len(rule.halves)} rows, and {len(plan)} are active; "
                "give a half for each."
            )
        if first is not None and not first >= 1:
            raise ValueError(f"the policy's shadow_places={shown(first)} must be 1 or more, or None for all.")
        if stage is not None and not isinstance(stage, Stage):
            raise ValueError(f"the policy's stage={shown(stage)} is no stage; give a Stage, or None.")
        lookups = lookups if any(lookups) and self.coupling == "shared" else [[] for _ in plan]
        _check_lookups(lookups, session)
        started = _clock(session)
        exits = watched_exits(policy, session.model.config) if shadow else ()
        watch = Watch(exits, experts, shadow, first)
        stop, copies = policy.should_stop, kept_copies(session.model) if int8 else None
        lengths = [len(drafts) or length for (_, length), drafts in zip(plan, lookups, strict=True)]
        round_ = Round.begin(session, lengths, self.coupling, confident=stop is not None)
        exit_layers = [
            layer if limit and not drafts else 0
            for (layer, _), limit, drafts in zip(plan, round_.limits, lookups, strict=True)
        ]
        confidences: list[list[float]] = [[] for _ in plan]
        judged, staged, wanted, looked_up = None, None, round_.limits, [0] * len(plan)
        together = go_together(session, round_, exit_layers, drafter)
        if any(lookups) and (copies is None or not together):
            watch, exit_layers = Watch((), experts, False), [0] * len(plan)
            propose(round_, lookups)  # the other rows draft nothing
            logits, watch.chosen = verify_proposals(round_, choices=experts)
            tokens, accepted = round_.settle(logits)
            looked_up = round_.limits
        elif together:
            known = [drafts[:limit] for drafts, limit in zip(lookups, wanted, strict=True)]
            how = watch, rule, copies, known, stage
            tokens, accepted, judged, looked_up, staged = draft_and_verify(session, round_, max(exit_layers), *how)
        else:
            drafted, confidences = draft(session, round_, exit_layers, stop, drafter, watch)
            tokens, accepted = round_.settle(verify(session, round_, drafted, watch))
        seconds = _clock(session) - started  # a GPU was waited for: it was asked how many drafts were right
        rows = session.row_numbers
        read = experts_read(watch, session.model.config) if watch.choices else None
        said, margins = shadow_tokens(session, round_, watch, tokens) if watch.shadow else (None, None)
        appending = _clock(session)
        session.append(tokens, accepted, drafted=round_.limits)
        seconds += _clock(session) - appending
        lets_go = rule is not None and judged is not None  # one draft more than is kept
        made = [
            kept - known if known else min(kept + lets_go, limit)
            for kept, known, limit in zip(round_.limits, looked_up, wanted, strict=True)
        ]
        report = RoundReport(
            rows=rows,
            exit_layers=[layer if count else 0 for layer, count in zip(exit_layers, made, strict=True)],
            drafted=round_.limits,
            accepted=accepted,
            confidences=confidences,
            seconds=seconds,
            tokens=tokens,
            experts=read,
            shadow=said,
            judged=judged,
            made=made,
            looked_up=looked_up,
            shadow_margins=margins,
            staged=staged,
        )
        with _asking:
            policy.observe(report)

    @property
    def _policy(self) -> Policy:
        if self.policy is not None:
            return self.policy
        assert self.exit_layer is not None and self.draft_length is not None, "settled at construction"
        return Fixed(self.exit_layer, self.draft_length, bool(self.int8_drafts))

    def _one_call(self, sampling: Sampling) -> bool:
        """Whether rounds may be one call, as far as sampling and coupling go."""
        return self.coupling == "shared" and not sampling.filters

    def _speculative(self, draft: MoEDecoder) -> Speculative:
        assert self.draft_length is not None, "settled at construction"
        return Speculative(draft, self.draft_length, self.coupling, self.exit_layer)


def _clock(session: Session) -> float:
    """Seconds, but those in which a user is told of tokens."""
    return time.perf_counter() - session.telling_seconds


def _check_plan(plan: list[tuple[int, int]], session: Session) -> None:
    """Raise ValueError for a plan of another number of rows, and for layers and lengths that there are not."""
    n_rows, n_layers = len(session.row_numbers), session.model.config.n_layers
    if len(plan) != n_rows:
        raise ValueError(f"the policy planned for {len(plan)} rows, and {n_rows} are active; give one pair for each.")
    for exit_layer, length in plan:
        if length < 0 or (length and not 1 <= exit_layer <= n_layers):
            raise ValueError(
                f"the policy planned exit layer {exit_layer} and {length} drafts; exit layers are 1 to {n_layers}, "
                "and 0 drafts or more."
            )


def _check_lookups(lookups: Sequence[Sequence[int]], session: Session) -> None:
    """Raise ValueError for drafts of another number of rows, and for tokens that there are not."""
    n_rows, vocab_size = len(session.row_numbers), session.model.config.vocab_size
    if len(lookups) != n_rows:
        raise ValueError(
            f"the policy looked up drafts for {len(lookups)} rows, and {n_rows} are active; give a list for each."
        )
    strange = [token for drafts in lookups for token in drafts if not 0 <= token < vocab_size]
    if strange:
        raise ValueError(f"the policy looked up token {strange[0]}, and there are 0 to {vocab_size - 1}.")


def watched_exits(policy: Policy, config: ModelConfig) -> Sequence[int]:
    """The exit layers whose states are kept for a policy that asks for shadow tokens."""
    return getattr(policy, "exits", range(1, config.n_layers))


def _begin_alike(model: MoEDecoder, draft: MoEDecoder, exit_layer: int) -> bool:
    """Whether the draft's embedding and first layers are the model's own, run in the same way."""
    return (
        type(draft) is type(model)
        and draft.config == model.config
        and draft.embedding is model.embedding
        and all(draft.blocks[layer] is model.blocks[layer] for layer in range(exit_layer))
    )
