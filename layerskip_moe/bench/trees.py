"""Whether a tree of drafts would pay: what several candidates for a place would come to, were they drafted.

A tree here is a chain of n drafts and, at its first m places, the second best token beside the best, as leaves. They
cost no drafting, for their logits are there, but a row each in verification, and in the last pass of the layers that
draft. Where the first draft that is wrong has a leaf beside it that is right, the round gives one token more: the full
model's, after that leaf. Which experts a leaf would read is not known; it is taken to read as many further ones as a
further place of this text. The library drafts no trees, as long as the best in hindsight gains little.

Knows nothing of policies. Next: `policies.py`, which shows the best tree beside the best fixed pair.
"""

from collections.abc import Sequence

from layerskip_moe.bench.replay import ReplayedRound
from layerskip_moe.bench.rounds import TextRounds
from layerskip_moe.generation.cost_model import CostModel

_ROWS_OF_LATE_LAYERS = 6  # among `CostModel.amounts`


def best_tree(
    texts: Sequence[TextRounds], cost: CostModel, exits: Sequence[int], lengths: Sequence[int]
) -> tuple[str, list[list[ReplayedRound]]]:
    """The fastest tree of all exits, drafts n of `lengths` and leaves at the first, the first two or all places: it in
    words, and its rounds of each text."""
    shapes = [(layer, n, m) for layer in exits for n in lengths if n for m in sorted({1, min(2, n), n})]
    layer, n, m = min(shapes, key=lambda shape: sum(sum(_seconds(tree_rounds(text, cost, *shape))) for text in texts))
    return f"exit layer {layer}, {n} drafts, {m} leaves", [tree_rounds(text, cost, layer, n, m) for text in texts]


def tree_rounds(text: TextRounds, cost: CostModel, exit_layer: int, length: int, leaves: int) -> list[ReplayedRound]:
    """The rounds of one text: chains of `length` drafts, or as many as the rest has use for, with leaves beside the
    first of them."""
    rounds: list[ReplayedRound] = []
    place = 0
    while place < text.length:
        n = min(length, text.length - place - 1)
        m, layer = min(leaves, n), exit_layer if n else 0
        accepted, experts = text.accepted(place, layer, n), text.experts(place, layer, n)
        by_a_leaf = accepted < m and int(text.second[layer - 1, place + accepted]) == int(text.tokens[place + accepted])
        pairs = zip(cost.moe_layers, experts, strict=True)
        later = float(sum(read - cost.top_k for moe_layer, read in pairs if moe_layer >= layer))
        later += _of_leaves(cost, layer, n, m, later)
        seconds = cost.seconds_of(cost.amounts(layer, n, n, 1, n + m + 1, later)) + cost.seconds_of(
            _early(cost, layer, m)
        )
        rounds.append(ReplayedRound(layer, n + m, accepted + by_a_leaf, experts, seconds))
        place += accepted + by_a_leaf + 1
    return rounds


def _of_leaves(cost: CostModel, exit_layer: int, n: int, m: int, later: float) -> float:
    """Further experts that m leaves read beside n drafts that read `later`: those of independent choices, by as much
    fewer as the drafts' are."""
    if not m or not cost.more_experts(exit_layer, n + 1):
        return 0.0
    verifying = cost.more_experts(exit_layer, n + m + 1) - cost.more_experts(exit_layer, n + 1)
    drafting = cost.more_experts(0, m + 1) - cost.more_experts(exit_layer, m + 1)
    return (verifying + drafting) * later / cost.more_experts(exit_layer, n + 1)


def _early(cost: CostModel, exit_layer: int, m: int) -> list[float]:
    """`CostModel.amounts` of m rows more in the layers that draft; a row costs there what it costs in the others."""
    amounts = [0.0] * len(cost.seconds)
    amounts[_ROWS_OF_LATE_LAYERS] = float(exit_layer * m)
    return amounts


def _seconds(rounds: Sequence[ReplayedRound]) -> list[float]:
    return [round.seconds for round in rounds]
