"""The policies that are compared on a trace, and what their rounds cost on this machine.

Knows nothing of traces. Next: `policies.py`, which compares them.
"""

from collections.abc import Callable
from functools import partial

from layerskip_moe.bench.rounds import RoundCost
from layerskip_moe.generation.cost_model import CostModel
from layerskip_moe.generation.fit_cost_model import fit_cost_model
from layerskip_moe.generation.policies import DEL, Adaptive, Cascade, DraftVerify, Heuristic
from layerskip_moe.generation.policies.exits import candidate_exits
from layerskip_moe.generation.policies.policy import Policy
from layerskip_moe.nn import MoEDecoder
from layerskip_moe.nn.compiling import can_compile, compiling
from layerskip_moe.nn.int8_copies import why_no_int8

# Makes a policy that has learnt nothing yet.
MakePolicy = Callable[[], Policy]

PUBLISHED = ("Heuristic", "DraftVerify", "DEL", "Cascade")

_SECONDS = 8.0  # of timing for either cost model: all policies are compared by them
_CASCADE_INT8 = 16  # drafts at most of `Cascade` where they are int8, of which more pay


def contenders(n_layers: int, cost: RoundCost, int8_cost: RoundCost | None = None) -> dict[str, list[MakePolicy]]:
    """The policies that are compared, by name; of several settings of one, the fastest is shown. `Adaptive` is among
    them where it can reckon with the cost model itself. With a cost model of int8 drafts those make them that can: the
    others are asked in between drafts, which int8 ones are not."""
    exits = range(1, n_layers)
    ours: dict[str, list[MakePolicy]] = {}
    if isinstance(int8_cost, CostModel):
        ours["Adaptive"] = [partial(Adaptive, cost_model=int8_cost)]
    if isinstance(cost, CostModel):
        ours["Adaptive" if not ours else "Adaptive by the weights"] = [partial(Adaptive, cost_model=cost)]
    cascades: list[MakePolicy] = [partial(Cascade, n) for n in exits]
    if int8_cost is not None:
        cascades += [partial(_int8_cascade, n) for n in (*exits, n_layers)]
    return ours | {
        "Heuristic": [partial(Heuristic, n) for n in exits],
        "DraftVerify": [partial(DraftVerify, n) for n in exits],
        "DEL": [DEL],
        "Cascade": cascades,
    }


def _int8_cascade(exit_layer: int) -> Cascade:
    policy = Cascade(exit_layer, length=_CASCADE_INT8)
    setattr(policy, "int8_drafts", True)  # noqa: B010 (an attribute that any policy may have)
    return policy


def fit_costs(model: MoEDecoder) -> tuple[CostModel, CostModel | None]:
    """Cost models of rounds by the weights themselves and, where copies can be made, of int8 drafts, in both of which
    plain decoding is as fast."""
    n_layers = model.config.n_layers
    with compiling(model, can_compile(model.device)):
        cost = fit_cost_model(model, seconds=_SECONDS)
        if why_no_int8(model) is not None:
            return cost, None
        exits = (*candidate_exits(n_layers, deep=True), n_layers)  # as `Adaptive` has it fitted
        return cost, fit_cost_model(model, exits=exits, int8_drafts=True, seconds=_SECONDS).beside(cost)
