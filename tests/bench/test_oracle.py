"""The oracle against every way there is to make a short text, and fixed pairs against their replay."""

import functools
import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerskip_moe.bench.oracle import fixed_seconds, oracle
from layerskip_moe.bench.replay import replay
from layerskip_moe.bench.rounds import TextRounds
from layerskip_moe.bench.staging import foreseen_drafts, staged_drafts
from layerskip_moe.generation.cost_model import CostModel, moe_layers
from layerskip_moe.generation.policies import Adaptive, Fixed
from layerskip_moe.nn.ragged import Stage


def rows(length):
    """Where three layers are right."""
    return st.lists(st.lists(st.booleans(), min_size=length, max_size=length), min_size=3, max_size=3)


def by_brute_force(text, drafters, *, pairs=False):
    """Least seconds, over drafts of all lengths, longer than what is accepted, too; one by one, if of pairs."""

    @functools.cache
    def least(place):
        if place == text.length:
            return 0.0
        looked_up = 0 if pairs else min(text.foretold(place), text.length - place - 1)  # no layer is asked for these
        found = [text.seconds(place, 0, drafted) + least(place + drafted + 1) for drafted in range(looked_up + 1)]
        for layer, int8 in drafters:
            for drafted in range(1, min(text.length - place, text.most_int8 + 1 if int8 else text.length)):
                after = place + text.accepted(place, layer, drafted, int8=int8) + 1
                found.append(text.seconds(place, layer, drafted, int8=int8) + least(after))
                for asked in range(drafted + 1) if int8 and layer >= 2 and not pairs else ():
                    looked_up = drafted - asked
                    right = text.accepted(place, layer, asked, int8=True) == asked
                    if right and (not looked_up or text.foretold(place + asked) >= looked_up):
                        way = foreseen_drafts(text, place, asked, looked_up, 1)
                        seconds = text.seconds(place, layer, drafted, int8=True, staged=way)
                        found.append(seconds + least(place + drafted + 1))
        return min(found)

    return least(0)


@settings(deadline=None, max_examples=40)
@given(
    right=st.integers(1, 12).flatmap(rows),
    seed=st.integers(0, 99),
    exits=st.sampled_from([[1, 2, 3], [2], [3, 1], []]),
    int8_exits=st.sampled_from([[], [4], [2, 4]]),
    pairs=st.booleans(),
)
def test_oracle_is_the_best_of_all_ways(small_model, invented_text, cost_of, right, seed, exits, int8_exits, pairs):
    invented = invented_text(small_model().config, right, seed, int8_drafts=6)
    text = TextRounds(invented, small_model().config, cost_of(4), cost_of(4, 0.3))
    rounds, place, seconds = oracle(text, exits, int8_exits, proposing=1 - pairs, lookup=not pairs), 0, 0.0
    for layer, drafted, int8, staged in rounds:
        looked_up = staged.looked_up if staged else drafted if layer == 0 else 0
        asked = drafted - looked_up
        assert not (pairs and (staged or looked_up))
        assert layer in (int8_exits if int8 else exits) or not asked
        assert not looked_up or text.foretold(place + asked) >= looked_up
        assert text.accepted(place, layer, asked, int8=int8) == asked
        seconds += text.seconds(place, layer, drafted, int8=int8, staged=staged)
        place += drafted + 1
    assert place == text.length
    drafters = [(layer, False) for layer in exits] + [(layer, True) for layer in int8_exits]
    assert seconds == pytest.approx(by_brute_force(text, drafters, pairs=pairs))


@settings(deadline=None, max_examples=30)
@given(
    right=rows(9),
    layer=st.integers(1, 3),
    length=st.integers(0, 12),
    int8=st.booleans(),
)
def test_fixed_pairs_take_what_their_replay_takes(small_model, invented_text, cost_of, right, layer, length, int8):
    config = small_model().config
    text = TextRounds(invented_text(config, right, int8_drafts=12), config, cost_of(4), cost_of(4, 0.3))
    [rounds] = replay([text], Fixed(layer, length, int8), config)
    assert fixed_seconds(text, layer, length, int8=int8) == pytest.approx(sum(round.seconds for round in rounds))
    assert all(round.int8 == (int8 and round.drafted > 0) for round in rounds)
    assert sum(round.accepted + 1 for round in rounds) == 9


@settings(deadline=None, max_examples=30)
@given(right=rows(20), seed=st.integers(0, 99), sure=st.floats(0, 2), lookup=st.integers(0, 3))
def test_nothing_is_made_in_stages_by_less_than_is_foreseen(
    small_model, invented_text, cost_of, right, seed, sure, lookup
):
    """Where all drafts are right, of which it is known beforehand what proposes them."""
    text = invented_text(small_model().config, right, seed, int8_drafts=15)
    text.int8_right[3] = text.int8_right[3] | True
    of_text = TextRounds(text, small_model().config, cost_of(4), cost_of(4, 0.3))
    for place in (0, 2, 4):
        for drafted in (1, 7, 8, 15):
            found = staged_drafts(of_text, place, 4, drafted, drafted, drafted, Stage(1, sure, lookup, 0))
            assert found[:3] == (drafted, drafted, drafted)
            foreseen = foreseen_drafts(of_text, place, drafted, 0, 1, lookup)
            assert foreseen.places == drafted <= found.staged.places and foreseen.choosing <= found.staged.choosing
            assert 1 <= foreseen.choosing <= foreseen.proposing <= drafted


def test_rounds_by_hand(small_model, invented_text, cost_of):
    """Layer 2 is right at places 0, 1 and 3; experts of layers 2 and 3 (from 0) are those of all places, of the others
    those of one."""
    config = small_model().config
    text = invented_text(config, [[False] * 5, [True, True, False, True, False], [True] * 5])
    rounds = TextRounds(text, config, cost_of(4))
    assert [rounds.accepted(place, 2, 3) for place in range(5)] == [2, 1, 0, 1, 0]
    assert [rounds.accepted(0, layer, 4) for layer in (1, 3, 4)] == [0, 4, 4]
    assert rounds.accepted(0, 3, 2) == 2 and rounds.accepted(0, 0, 0) == 0
    first = text.prompt_length - 1
    unions = [len(np.unique(text.experts[layer, first + 1 : first + 4])) for layer in (2, 3)]
    assert rounds.experts(1, 2, 2) == [2, 2, *unions] and rounds.experts(1, 0, 0) == [2] * 4
    assert rounds.seconds(1, 2, 2) == pytest.approx(3 * 2 + 0.5 * 2 + 2 + 0.5 + 0.1 * (4 + sum(unions)))
    assert rounds.seconds(4, 0, 0) == pytest.approx(4 + 0.5 + 0.8)


@settings(deadline=None, max_examples=30)
@given(
    right=rows(40),
    seed=st.integers(0, 99).map(lambda half: 2 * half + 1),
    sure=st.floats(0, 2),
    sure_lookup=st.integers(4, 9),
    length=st.integers(1, 12),
    drafting=st.sampled_from([1e-5, 1.0]),
)
def test_no_policy_takes_less_than_the_oracle(
    small_model, invented_text, right, seed, sure, sure_lookup, length, drafting
):
    """Nor does one that looks up what texts repeat, in rounds in stages or in rounds of their own."""
    config = small_model().config
    cost = CostModel(4, moe_layers(config), config.num_experts, config.top_k, (1e-3, 0, 0, drafting, 0, 1e-3, 0, 0, 0))
    int8_cost = replace(cost, int8_drafts=True)
    text = TextRounds(invented_text(config, right, seed, int8_drafts=12), config, cost, int8_cost)
    best = sum(
        text.seconds(place, way.exit_layer, way.drafted, int8=way.int8, staged=way.staged)
        for place, way in placed(oracle(text, [1, 2, 3], [1, 2, 3, 4], proposing=1))
    )
    for policy in (
        Fixed(4, length, True, Stage(1, sure, 4, sure_lookup)),
        Adaptive(cost_model=cost),
        Adaptive(cost_model=int8_cost, length=12),
    ):
        [rounds] = replay([text], policy, config)
        assert best <= sum(round.seconds for round in rounds) * (1 + 1e-9)


def placed(ways):
    """Each with the place where it begins."""
    starts = itertools.accumulate((way.drafted + 1 for way in ways), initial=0)
    return zip(starts, ways, strict=False)
