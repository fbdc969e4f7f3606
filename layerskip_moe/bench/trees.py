"""Whether a tree of drafts would pay: what several candidates for a place would come to, at best, were they drafted.

A tree here is a chain of n drafts and, at its first m places, the second best token beside the best, as leaves. They
cost no drafting, for their logits are there, but a row each in verification. Where the first draft that is wrong has a
leaf beside it that is right, the round gives one token more: the full model's, after that leaf. Which experts a wrong
leaf would read is not known, and it is taken to read none that others do not. So this is what a tree could gain at
most, in hindsight; the library drafts none, as long as that is little.

Knows nothing of policies. Next: `policies.py`, which shows the best tree beside the best fixed pair.
"""

from collections.abc import Sequence

from layerskip_moe.bench.replay import ReplayedRound
from layerskip_moe.bench.rounds import TextRounds
from layerskip_moe.generation.cost_model import CostModel


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
        later = sum(read - cost.top_k for moe_layer, read in pairs if moe_layer >= layer)
        seconds = cost.seconds_of(cost.amounts(layer, n, 1, n + m + 1, later))
        rounds.append(ReplayedRound(layer, n + m, accepted + by_a_leaf, experts, seconds))
        place += accepted + by_a_leaf + 1
    return rounds


def _seconds(rounds: Sequence[ReplayedRound]) -> list[float]:
    return [round.seconds for round in rounds]
