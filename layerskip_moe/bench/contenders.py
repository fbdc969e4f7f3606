"""The policies that are compared on a trace, and what their rounds cost on this machine.

Knows nothing of traces. Next: `policies.py`, which compares them.
"""

from collections.abc import Callable, Sequence
from functools import partial

from layerskip_moe.bench.rounds import RoundCost
from layerskip_moe.generation.cost_model import CostModel
from layerskip_moe.generation.fit_cost_model import CostFit
from layerskip_moe.generation.policies import DEL, Adaptive, Cascade, DraftVerify, Fixed, Heuristic
from layerskip_moe.generation.policies.exits import MOST_DRAFTS, candidate_exits, proposing_layers
from layerskip_moe.generation.policies.policy import Policy
from layerskip_moe.generation.policies.text_lookup import REPEATED
from layerskip_moe.nn import MoEDecoder
from layerskip_moe.nn.compiling import can_compile, compiling
from layerskip_moe.nn.int8_copies import are_made_unasked, why_no_int8
from layerskip_moe.nn.ragged import Stage

# Makes a policy that has learnt nothing yet.
MakePolicy = Callable[[], Policy]

PUBLISHED = ("Heuristic", "DraftVerify", "DEL", "Cascade")

_SECONDS = 16.0  # of timing: all policies are compared by what it comes to
_LENGTHS, _SURE = (7, 15, 23, 31), (0.2, 0.4, 0.8)  # of fixed pairs in stages
_CASCADE_INT8 = 16  # drafts at most of `Cascade` where they are int8, of which more pay


def contenders(
    n_layers: int, cost: RoundCost, int8_cost: RoundCost | None = None, most_int8: int = MOST_DRAFTS
) -> dict[str, list[MakePolicy]]:
    """The policies that are compared, by name; of several settings of one, the fastest is shown. `Adaptive` is among
    them where it can reckon with the cost model itself.

    int8_cost, most_int8: of rounds of int8 drafts, and how many there may be in one; None: there are none. Then those
    policies make them that can (the others are asked in between drafts, which int8 ones are not), and so do pairs that
    never change, in stages, at the end of which what texts repeat may be looked up.
    """
    exits = range(1, n_layers)
    cascades: list[MakePolicy] = [partial(Cascade, n) for n in exits]
    more: dict[str, list[MakePolicy]] = {}
    if int8_cost is None:
        ours = {"Adaptive": cost}
    else:
        ours = {"Adaptive": int8_cost, "Adaptive by the weights": cost}
        longest = min(_CASCADE_INT8, most_int8)
        cascades += [partial(Cascade, n, length=longest, int8_drafts=True) for n in (*exits, n_layers)]
        lengths = sorted({min(length, most_int8) for length in _LENGTHS})
        for name, sure_lookup in (("fixed in stages", 0), ("fixed in stages, with lookup", REPEATED)):
            stages = [Stage(proposing_layers(n_layers), sure, sure_lookup=sure_lookup) for sure in _SURE]
            more[name] = [partial(Fixed, n_layers, n, True, stage) for n in lengths for stage in stages]
    adaptive: dict[str, list[MakePolicy]] = {}
    for name, of in ours.items():
        if isinstance(of, CostModel):
            length = min(MOST_DRAFTS, most_int8) if of.int8_drafts else None
            adaptive[name] = [partial(Adaptive, length=length, cost_model=of)]
            if of.int8_drafts == (int8_cost is not None):  # the default
                adaptive["Adaptive without lookup"] = [partial(Adaptive, length=length, cost_model=of, lookup=False)]
    return {
        **more,
        **adaptive,
        "Heuristic": [partial(Heuristic, n) for n in exits],
        "DraftVerify": [partial(DraftVerify, n) for n in exits],
        "DEL": [DEL],
        "Cascade": cascades,
    }


def cost_fit(model: MoEDecoder) -> CostFit:
    """Of rounds by the weights themselves and, where `Adaptive` makes copies unasked, of int8 drafts."""
    n_layers = model.config.n_layers
    ways: list[tuple[Sequence[int], bool]] = [((), False)]
    with compiling(model, can_compile(model.device)):
        if why_no_int8(model) is None and are_made_unasked(model):
            ways.append(((*candidate_exits(n_layers, deep=True), n_layers), True))  # as `Adaptive` has it fitted
    return CostFit(model, ways)


def fit_costs(model: MoEDecoder) -> tuple[CostModel, CostModel | None]:
    """Their cost models, timed for 16 seconds, more on a machine that does other work."""
    fit = cost_fit(model)
    with compiling(model, can_compile(model.device)):
        fit.time(_SECONDS)
    return both_costs(fit)


def both_costs(fit: CostFit) -> tuple[CostModel, CostModel | None]:
    """The second is None where int8 drafts are not made."""
    cost, *int8_cost = fit.cost_models()
    return cost, int8_cost[0] if int8_cost else None
