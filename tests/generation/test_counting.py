"""What is counted and which layers run, on a stub whose draft is right exactly where the test says so.

The stub's text counts on: in row r (prompt token 40 r, and so on) the token at position p is 40 r + p.
"""

import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from layerskip_moe.generation import Autoregressive, SelfSpeculative, Speculative, generate

ROWS, WRONG = 5, 39  # a wrong draft says 39, a position that no test reaches


@pytest.fixture(scope="module")
def counting_model(table_model):
    """counting_model(agreed): agreed[r] holds the positions at which row r's draft is right. `draft_model` is a
    second stub, of two layers, that drafts the same."""

    def build(agreed):
        right_at = torch.zeros(ROWS, 64, dtype=torch.bool)
        for row, positions in enumerate(agreed):
            right_at[row, list(positions)] = True

        def full(tokens, positions):
            return F.one_hot(tokens // 40 * 40 + positions + 1, ROWS * 40).float()

        def draft(tokens, positions):
            rows = tokens // 40
            guess = torch.where(right_at[rows, positions + 1], positions + 1, WRONG)
            return F.one_hot(rows * 40 + guess, ROWS * 40).float()

        model = table_model(ROWS * 40, full, draft, n_layers=4)
        model.draft_model = table_model(ROWS * 40, draft, draft, n_layers=2)
        return model

    return build


def prompt(row, length=1):
    return [40 * row + position for position in range(length)]


def text(row, length, count):
    return [40 * row + position for position in range(length, length + count)]


EVERY, NEVER, ODD = range(64), (), range(1, 64, 2)
# Draft length 3, 10 new tokens after a prompt of one; (generated, rounds, drafted, accepted) counted by hand.
BY_HAND = {
    # 3 + 1 tokens, 3 + 1, then 2 are left: one draft and the token after it.
    "always right": (EVERY, (10, 3, 3 + 3 + 1, 7)),
    # One token a round; with r left, min(3, r - 1) drafts.
    "always wrong": (NEVER, (10, 10, 7 * 3 + 2 + 1 + 0, 0)),
    # Position 1 right, 2 wrong; 3 right, 4 wrong; ... two tokens a round; left 10, 8, 6, 4, 2.
    "every other": (ODD, (10, 5, 3 + 3 + 3 + 3 + 1, 5)),
    # Position 4 wrong: 3 accepted, so it is the full model's own; then 6 left: 5, 6, 7 and 8; then 9 and 10.
    "wrong where not asked": ([p for p in EVERY if p != 4], (10, 3, 7, 7)),
    # Position 3 wrong: 1, 2 accepted; then 4, 5, 6 and 7; then 3 left: two drafts, 8, 9, and 10.
    "wrong at one place": ([p for p in EVERY if p != 3], (10, 3, 3 + 3 + 2, 2 + 3 + 2)),
}


def counts(stats):
    return stats.generated, stats.rounds, stats.drafted, stats.accepted


@pytest.mark.parametrize("drafter", ["its own layers", "a draft model"])
@pytest.mark.parametrize("coupling", ["shared", "rejection"])
@pytest.mark.parametrize("case", BY_HAND)
def test_counts_of_one_row_by_hand(counting_model, case, coupling, drafter):
    agreed, expected = BY_HAND[case]
    model = counting_model([agreed])
    strategy = SelfSpeculative(2, 3, coupling=coupling)
    if drafter == "a draft model":
        strategy = Speculative(model.draft_model, 3, coupling=coupling)
    out = generate(model, [prompt(0)], strategy, max_new_tokens=10)
    assert out.tokens == [text(0, 1, 10)]
    assert counts(out.stats) == counts(out.row_stats[0]) == expected
    assert out.stats.tokens_per_round == 10 / expected[1]
    assert out.stats.acceptance_rate == expected[3] / expected[2]


def test_rows_of_a_batch_count_for_themselves(counting_model):
    model = counting_model([agreed for agreed, _ in BY_HAND.values()])
    prompts = [prompt(row) for row in range(5)]
    out = generate(model, prompts, SelfSpeculative(2, 3), max_new_tokens=10)
    assert out.tokens == [text(row, 1, 10) for row in range(5)]
    expected = [by_hand for _, by_hand in BY_HAND.values()]
    assert [counts(stats) for stats in out.row_stats] == expected
    assert counts(out.stats) == tuple(sum(column) for column in zip(*expected, strict=True))


def simulated(agreed, start, count, draft_length):
    """The same counts by walking along the text with no batch around."""
    position, last = start, start + count - 1
    rounds = drafted = accepted = 0
    while position <= last:
        proposed = range(position, min(position + draft_length, last))
        right = next((i for i, p in enumerate(proposed) if p not in agreed), len(proposed))
        rounds, drafted, accepted = rounds + 1, drafted + len(proposed), accepted + right
        position += right + 1
    return count, rounds, drafted, accepted


@given(
    rows=st.lists(st.tuples(st.sets(st.integers(1, 30)), st.integers(1, 12)), min_size=1, max_size=ROWS),
    draft_length=st.integers(1, 9),
    max_new_tokens=st.integers(1, 18),
    exit_layer=st.integers(1, 3),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_counts_for_any_pattern_and_ragged_prompts(counting_model, rows, draft_length, max_new_tokens, exit_layer):
    model = counting_model([agreed for agreed, _ in rows])
    prompts = [prompt(row, length) for row, (_, length) in enumerate(rows)]
    for strategy in (SelfSpeculative(exit_layer, draft_length), Speculative(model.draft_model, draft_length)):
        out = generate(model, prompts, strategy, max_new_tokens=max_new_tokens)
        assert out.tokens == [text(row, length, max_new_tokens) for row, (_, length) in enumerate(rows)]
        assert out.layers_run == [[4] * max_new_tokens] * len(rows)
        assert [counts(stats) for stats in out.row_stats] == [
            simulated(agreed, length, max_new_tokens, draft_length) for agreed, length in rows
        ]


def test_verification_runs_only_what_the_draft_left_out(counting_model):
    """(first layer, end layer, rows, positions) of every run of the network, in order."""
    model = counting_model([EVERY, NEVER])
    generate(model, [prompt(0), prompt(1, 6)], SelfSpeculative(1, 2), max_new_tokens=3)
    one_round = [(0, 1, 2, 1)] * 3 + [(1, 4, 2, 3)]
    # Row 0 took all three tokens at once. Row 1 has two left: one draft; then one: none.
    two_left, one_left = [(0, 1, 1, 1)] * 2 + [(1, 4, 1, 2)], [(0, 4, 1, 1)]
    assert model.calls == [(0, 4, 2, 5), *one_round, *two_left, *one_left]


def test_a_draft_model_runs_once_for_each_draft(counting_model):
    """The token that an all accepted round left unrun goes through beside the newest, not in a pass of its own."""
    model = counting_model([EVERY, NEVER])
    generate(model, [prompt(0), prompt(1, 6)], Speculative(model.draft_model, 2), max_new_tokens=3)
    # Both rows; then row 1 with two tokens left, one draft; then with one left, none.
    assert model.draft_model.calls == [(0, 2, 2, 5), (0, 2, 2, 2), (0, 2, 2, 1), (0, 2, 1, 2)]
    assert model.calls == [(0, 4, 2, 5), (0, 4, 2, 3), (0, 4, 1, 2), (0, 4, 1, 1)]


def test_drafts_and_acceptances_by_their_place_in_the_round(counting_model):
    """Row 0 of the case "wrong at one place": rounds of 3, 3 and 2 drafts, of which 2, 3 and 2 are right."""
    model = counting_model([BY_HAND["wrong at one place"][0], NEVER])
    for strategy in (SelfSpeculative(2, 3), Speculative(model.draft_model, 3)):
        out = generate(model, [prompt(0), prompt(1)], strategy, max_new_tokens=10)
        first, second = out.row_stats
        assert (first.drafted_by_position, first.accepted_by_position) == ([3, 3, 2], [3, 3, 1])
        assert (second.drafted_by_position, second.accepted_by_position) == ([9, 8, 7], [0, 0, 0])
        assert (out.stats.drafted_by_position, out.stats.accepted_by_position) == ([12, 11, 9], [3, 3, 1])


def test_plain_decoding_counts_one_token_a_round(counting_model):
    model = counting_model([NEVER, NEVER])
    out = generate(model, [prompt(0, 3), prompt(1)], Autoregressive(), max_new_tokens=4)
    assert out.tokens == [text(0, 3, 4), text(1, 1, 4)]
    assert [counts(stats) for stats in out.row_stats] == [(4, 4, 0, 0)] * 2
    assert counts(out.stats) == (8, 8, 0, 0)
    assert (out.stats.tokens_per_round, out.stats.acceptance_rate) == (1.0, 0.0)
    assert model.calls == [(0, 4, 2, 2)] + [(0, 4, 2, 1)] * 4


def test_groups_of_rows_add_up(counting_model):
    model = counting_model([EVERY, NEVER, ODD])
    prompts = [prompt(0), prompt(1, 4), prompt(2)]
    together = generate(model, prompts, SelfSpeculative(2, 3), max_new_tokens=10)
    apart = generate(model, prompts, SelfSpeculative(2, 3), max_new_tokens=10, batch_size=2)
    assert apart.tokens == together.tokens
    assert [counts(stats) for stats in apart.row_stats] == [counts(stats) for stats in together.row_stats]
    assert counts(apart.stats) == counts(together.stats)


def test_times_of_prefill_and_decoding_apart(counting_model, monkeypatch):
    """A clock that advances by one at each look: start, prompts run, done."""
    ticks = iter(range(100))
    monkeypatch.setattr(sys.modules["layerskip_moe.generation.generate"], "now", lambda device: float(next(ticks) ** 2))
    model = counting_model([EVERY, EVERY])
    out = generate(model, [prompt(0), prompt(1)], SelfSpeculative(2, 3), max_new_tokens=9, batch_size=1)
    # The clock's looks are 0, 1, 4 for the first group and 9, 16, 25 for the second.
    assert [(stats.prefill_seconds, stats.decode_seconds) for stats in out.row_stats] == [(1.0, 3.0), (7.0, 9.0)]
    assert (out.stats.prefill_seconds, out.stats.decode_seconds) == (8.0, 12.0)
    assert out.stats.tokens_per_second == 18 / 12
    assert out.row_stats[0].tokens_per_second == 9 / 3


def test_real_times_are_positive(tiny_model):
    out = generate(tiny_model(), [[1, 2, 3], [4]], SelfSpeculative(1, 2), max_new_tokens=4)
    assert out.stats.tokens_per_second > 0 and out.stats.prefill_seconds > 0
    assert 0 <= out.stats.accepted <= out.stats.drafted
