"""What trees of drafts would gain, against a plain count of one text."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerskip_moe.bench.oracle import fixed_seconds
from layerskip_moe.bench.policies import compare_policies
from layerskip_moe.bench.rounds import TextRounds
from layerskip_moe.bench.trees import best_tree, tree_rounds
from layerskip_moe.generation.cost_model import CostModel

COST = CostModel(4, (0, 1, 2, 3), 6, 2, (1.0, 0.3, 0.2, 0.5, 0.0, 0.6, 0.05, 0.02, 0.01))


def by_hand(text, exit_layer, length, leaves):
    """Tokens of each round."""
    said, second, tokens, place, rounds = text.said[exit_layer - 1], text.second[exit_layer - 1], text.tokens, 0, []
    while place < len(tokens):
        length = min(length, len(tokens) - place - 1)
        right = 0
        while right < length and said[place + right] == tokens[place + right]:
            right += 1
        has_leaf = right < min(leaves, length)
        rounds.append(right + 1 + (has_leaf and second[place + right] == tokens[place + right]))
        place += rounds[-1]
    return rounds


def half_right(invented_text, config, seed, length=30):
    """Drafts that are right half the time, and leaves half of the others."""
    draws = np.random.default_rng(seed)
    text = invented_text(config, draws.random((3, length)) < 0.5, seed)
    right = draws.random(text.second.shape) < 0.5
    text.second[right] = np.where(text.said == text.said[-1], text.second, text.said[-1])[right]
    return TextRounds(text, config, COST)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 999), exit_layer=st.integers(1, 3), length=st.integers(1, 6), leaves=st.integers(0, 7))
def test_a_leaf_that_is_right_gives_a_token_more(small_model, invented_text, seed, exit_layer, length, leaves):
    text = half_right(invented_text, small_model().config, seed)
    rounds = tree_rounds(text, COST, exit_layer, length, leaves)
    assert [round.accepted + 1 for round in rounds] == by_hand(text, exit_layer, length, leaves)
    assert sum(round.accepted + 1 for round in rounds) == text.length
    if leaves == 0:
        assert sum(round.seconds for round in rounds) == pytest.approx(fixed_seconds(text, exit_layer, length))


def test_a_leaf_costs_a_row_and_its_experts(small_model, invented_text):
    text = half_right(invented_text, small_model().config, 0)
    bare, first = (tree_rounds(text, COST, 2, 3, leaves)[0] for leaves in (0, 2))
    assert first.drafted == bare.drafted + 2
    rows = 2 * (4 * 0.05 + 0.01)  # of all layers, and of the head
    union = [6 * (1 - (4 / 6) ** places) for places in (4, 6, 3)]
    share = sum(read - 2 for read in bare.experts[2:]) / (2 * (union[0] - 2))  # of two layers that verify 4 places
    experts = share * (2 * (union[1] - union[0]) + 2 * (union[2] - 2))  # 6 places instead; and 3, drafting, of one
    assert first.seconds - bare.seconds == pytest.approx(rows + 0.02 * experts)


def test_the_best_is_shown_beside_policies(small_model, invented_text):
    config = small_model().config
    texts = [half_right(invented_text, config, seed) for seed in range(3)]
    words, rounds = best_tree(texts, COST, [1, 2, 3], [0, 1, 2, 3])
    fastest = sum(round.seconds for text in rounds for round in text)
    for exit_layer in (1, 2, 3):
        for leaves in (1, 2, 3):
            some = [tree_rounds(text, COST, exit_layer, 3, leaves) for text in texts]
            assert fastest <= sum(round.seconds for text in some for round in text)
    given = [text.text for text in texts]
    report = compare_policies(given, config, COST, {}, max_draft_length=3, resamples=10, progress=False).as_report()
    [row] = [row for row in report["rows"] if row["name"] == "best tree"]
    assert row["setting"] == words and not row["draftable"]
    assert row["tokens_per_second"] == pytest.approx(sum(text.length for text in texts) / fastest)
