"""What an ablation changes: named sets of fields of the network and of the recipe, alone or together.

L layers, D width, H heads, F hidden width of an expert, K experts chosen.
Knows nothing of training. Next: `runs.py`.
"""

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from layerskip_moe.nn import ModelConfig
from layerskip_moe.pretrained.config_file import empty_model

BASE = "base"
# Tried together by default, beside every variant alone.
COMBINATIONS = (
    "every-other+all-exits",
    "every-other+shared",
    "every-other+average-0.5",
    "every-other+coherence-0.1",
)


@dataclass(frozen=True)
class Variant:
    """What is changed, and nothing else.

    Attributes:
        network: fields of ModelConfig
        recipe: fields of TrainConfig
    """

    network: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)


def usual_variants(base: ModelConfig) -> dict[str, Variant]:
    """Every variant that is known by name, as changes of that network. Those that it leaves no room for are absent:
    a shared expert where one expert is chosen, depth against width where experts are in layers given by number, and
    more width where the embedding alone then has too many parameters."""
    half = max(base.n_layers // 2, 1)
    variants = {
        BASE: Variant(),
        "paper": Variant(recipe={"exit_weights": "paper", "exit_loss_scale": 0.2}),
        "drafting": Variant(recipe={"exit_weights": "drafting", "exit_curriculum": "all"}),
        "all-exits": Variant(recipe={"exit_curriculum": "all"}),
        "gradual": Variant(recipe={"exit_curriculum": "gradual"}),
        "distilled": Variant(recipe={"exit_distillation": 0.7}),
        "coherence-0.1": Variant(recipe={"router_coherence_weight": 0.1}),
        "coherence-0.5": Variant(recipe={"router_coherence_weight": 0.5}),
        "average-0.5": Variant(network={"router_average": 0.5}),
        "average-0.7": Variant(network={"router_average": 0.7}),
        "hold-2": Variant(network={"router_hold": 2}),
        "hold-4": Variant(network={"router_hold": 4}),
        "every-other": Variant(network={"moe_layers": "every other"}),
        "first-half": Variant(network={"moe_layers": "first half"}),
        "last-half": Variant(network={"moe_layers": "last half"}),
        "expert-dropout": Variant(recipe={"expert_dropout": 0.2}),
    }
    if base.top_k > 1:  # at equal active parameters: the shared expert takes the place of a chosen one
        variants["shared"] = Variant(network={"top_k": base.top_k - 1, "shared_expert_d_ff": base.expert_d_ff})
    if isinstance(base.moe_layers, str) and base.n_layers > 1:
        for name, n_layers in (("deep", 2 * base.n_layers), ("wide", half)):
            changes = _reshaped(base, n_layers)
            if changes is not None:
                variants[name] = Variant(network=changes)
    return variants


def named_variants(names: Sequence[str], known: Mapping[str, Variant]) -> dict[str, Variant]:
    """The variants of these names, the base first, which all are compared with; without names, all of `known` and
    `COMBINATIONS`.

    A name is one of `known`, or several of them joined by +, whose changes are made together. Raises ValueError for
    another name, and for a combination that changes the same field twice.
    """
    usual = [*known, *(name for name in COMBINATIONS if set(name.split("+")) <= known.keys())]
    chosen = dict.fromkeys([BASE, *(names or usual)])
    return {name: _together(name, known) for name in chosen}


def _together(name: str, known: Mapping[str, Variant]) -> Variant:
    network: dict[str, Any] = {}
    recipe: dict[str, Any] = {}
    for part in name.split("+"):
        if part not in known:
            close = difflib.get_close_matches(part, known, n=1)
            advice = f"did you mean {close[0]}?" if close else f"they are {', '.join(known)}, or several joined by +."
            raise ValueError(f"{part!r} is no variant; {advice}")
        twice = (network.keys() & known[part].network.keys()) | (recipe.keys() & known[part].recipe.keys())
        if twice:
            raise ValueError(f"{name!r} changes {', '.join(sorted(twice))} twice; leave out one of its parts.")
        network |= known[part].network
        recipe |= known[part].recipe
    return Variant(network, recipe)


def _reshaped(base: ModelConfig, n_layers: int) -> dict[str, Any] | None:
    """Another depth at the same active parameters, embedding and head among them; None where they are too many.

    Those of the layers are L D^2 and L D F times something, so D goes with 1 / sqrt(L), as a multiple of 2 H, for heads
    of an even width; F then makes up for what that and the embedding change.
    """
    ratio = (base.n_layers / n_layers) ** 0.5
    width = max(round(ratio * base.d_model / (2 * base.n_heads)), 1) * 2 * base.n_heads

    def changes(d_ff: int) -> dict[str, Any]:
        return {
            "n_layers": n_layers,
            "d_model": width,
            "head_dim": width // base.n_heads,
            "d_ff": d_ff,
            "dense_d_ff": max(round(d_ff * (base.dense_d_ff or base.expert_d_ff) / base.expert_d_ff), 1),
            "init_std": None,  # follows from the width
        }

    first = max(round(ratio * base.expert_d_ff), 1)
    few, many = (_active(dataclasses.replace(base, **changes(d_ff))) for d_ff in (first, 2 * first))
    d_ff = first + round(first * (_active(base) - few) / (many - few))  # they grow evenly with F
    return changes(d_ff) if d_ff >= 1 else None


def _active(network: ModelConfig) -> int:
    """The parameters that one token uses."""
    return empty_model(network).parameter_counts()[1]
