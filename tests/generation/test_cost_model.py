"""The cost model of a round: what it counts, how its costs are found, and that finding them changes nothing."""

import itertools
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layerskip_moe.generation import fit_cost_model as fitting
from layerskip_moe.generation import timed_rounds
from layerskip_moe.generation.cost_model import CostModel
from layerskip_moe.generation.fit_cost_model import CostFit, fit_cost_model
from layerskip_moe.generation.timed_rounds import Block, Kind, kinds_of
from layerskip_moe.nn.compiling import compiling
from layerskip_moe.nn.ragged import Staged

SPARSE = CostModel(n_layers=6, moe_layers=(1, 3, 5), num_experts=4, top_k=2, seconds=(0.0,) * 9)
DENSE = CostModel(n_layers=6, moe_layers=(), num_experts=0, top_k=0, seconds=(0.0,) * 9)


@pytest.mark.parametrize(
    ("empty", "exit_layers", "drafted", "experts", "expected"),
    [
        # Plain decoding of one row: all layers run over its newest token, which reads as many experts as it must.
        (SPARSE, [0], [0], [2, 2, 2], [1, 0, 0, 0, 0, 6, 0, 0, 0]),
        # 2 layers run over the newest token and 3 drafts one by one; 4 over these 4 places at once, reading 2 and 1
        # experts more in their two sparse layers; what layer 1 read does not count.
        (SPARSE, [2], [3], [3, 4, 3], [1, 1, 3, 8, 0, 4, 12, 3, 3]),
        # Drafting by all layers leaves nothing to verify but the head.
        (SPARSE, [6], [1], [4, 4, 4], [1, 1, 1, 12, 0, 0, 0, 0, 1]),
        # Three rows of 0, 2 and 1 drafts: 3 passes of 3 layers over 3 rows, then 3 layers over 6 places.
        (SPARSE, [0, 3, 3], [0, 2, 1], [2, 4, 3], [1, 1, 2, 9, 18, 3, 15, 3, 5]),
        # Without a count of them: of 4 experts, 6 places that choose 2 each read 4 - 4 / 2^6.
        (SPARSE, [0, 3, 3], [0, 2, 1], None, [1, 1, 2, 9, 18, 3, 15, 2 * (2 - 4 / 64), 5]),
        # Two rows of plain decoding.
        (DENSE, [0, 0], [0, 0], None, [1, 0, 0, 0, 0, 6, 6, 0, 1]),
        (DENSE, [2], [3], None, [1, 1, 3, 8, 0, 4, 12, 0, 3]),
    ],
)
def test_what_is_counted(empty, exit_layers, drafted, experts, expected):
    assert empty.features(exit_layers, drafted, experts) == pytest.approx(expected)


def test_a_round_costs_what_it_does():
    cost = CostModel(6, (1, 3, 5), 4, 2, seconds=(1e-3, 2e-3, 3e-4, 1e-5, 2e-6, 3e-5, 4e-6, 5e-7, 6e-8))
    by_hand = 1e-3 + 2e-3 + 3 * 3e-4 + 8 * 1e-5 + 4 * 3e-5 + 12 * 4e-6 + 3 * 5e-7 + 3 * 6e-8
    assert cost.round_seconds([2], [3], [3, 4, 3]) == pytest.approx(by_hand)


def plans(most_rows=4):
    return st.lists(st.tuples(st.integers(1, 6), st.integers(0, 9)), min_size=1, max_size=most_rows)


@given(
    plan=plans(),
    row=st.integers(0, 3),
    costs=st.lists(st.floats(1e-6, 1e-2), min_size=9, max_size=9),
    empty=st.sampled_from([SPARSE, DENSE]),
)
def test_more_drafts_take_longer(plan, row, costs, empty):
    cost = CostModel(empty.n_layers, empty.moe_layers, empty.num_experts, empty.top_k, tuple(costs))
    exit_layers, drafted = ([numbers[index] for numbers in plan] for index in range(2))
    if not any(drafted):  # from none at all to the first one, verification loses layers
        drafted[0] = 1
    more = list(drafted)
    more[row % len(more)] += 1
    assert cost.round_seconds(exit_layers, more) > cost.round_seconds(exit_layers, drafted)


@settings(deadline=None)
@given(
    costs=st.lists(st.one_of(st.just(0.0), st.floats(1e-3, 1.0)), min_size=4, max_size=4),
    seed=st.integers(0, 2**32 - 1),
)
def test_nonnegative_costs_are_found_again(costs, seed):
    drawn = torch.rand(30, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    found = fitting._nonnegative_least_squares(drawn, drawn @ torch.tensor(costs, dtype=torch.float64))
    assert found.tolist() == pytest.approx(costs, abs=1e-6)


@settings(deadline=None)
@given(seed=st.integers(0, 2**32 - 1), columns=st.integers(1, 5))
def test_no_other_nonnegative_costs_are_nearer(seed, columns):
    """Where the nearest are negative: no slope leads down, save where a cost is 0 already."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.rand(30, columns, dtype=torch.float64, generator=generator)
    target = torch.randn(30, dtype=torch.float64, generator=generator)
    found = fitting._nonnegative_least_squares(matrix, target)
    slopes = matrix.T @ (matrix @ found - target)
    assert bool((found >= 0).all())
    assert bool((slopes >= -1e-6).all()) and bool((slopes[found > 0].abs() < 1e-6).all())


def test_costs_of_rounds_that_lasted_what_they_should():
    """The median of rounds of a kind counts, so that one that was disturbed moves nothing."""
    true = CostModel(6, (1, 3, 5), 4, 2, seconds=(1e-3, 5e-4, 3e-4, 1e-4, 2e-5, 3e-4, 4e-5, 5e-5, 1.2e-4))
    kinds = [(layer, drafts, drafts, rows) for layer in (1, 3) for drafts in (1, 2, 4, 8) for rows in (1, 2, 3)]
    kinds += [(0, 0, 0, rows) for rows in (1, 2, 3)] + [(3, 0, 1, 1), (1, 0, 1, 2)]  # with a draft that is let go
    blocks = []
    for index, (exit_layer, drafted, made, rows) in enumerate(kinds):
        experts = [2 + index % 3, 4 - index % 2, 2 + index % 2]
        seconds = true.round_seconds([exit_layer] * rows, [drafted] * rows, experts, [made] * rows)
        kind, times = Kind(exit_layer, made), [seconds, seconds, 10 * seconds]
        block = Block(kind, (drafted,) * rows, (made,) * rows, experts, False, times)
        blocks += [block, block]
    found = fitting._fitted_to(SPARSE, blocks, head=3.0)  # which the head's costs are of a layer's
    for exit_layer, drafted, made, rows in (*kinds, (2, 3, 3, 2), (2, 2, 3, 1)):
        round_ = [exit_layer] * rows, [drafted] * rows, [3, 3, 3], [made] * rows
        assert found.round_seconds(*round_) == pytest.approx(true.round_seconds(*round_), rel=0.01)


def test_a_draft_that_is_let_go_costs_its_choice():
    cost = CostModel(6, (1, 3, 5), 4, 2, seconds=(1e-3, 5e-4, 3e-4, 1e-4, 2e-5, 3e-4, 4e-5, 5e-5, 6e-5))
    assert cost.round_seconds([2], [3], made=[4]) == pytest.approx(cost.round_seconds([2], [3]) + 3e-4)
    # Of none at all: a step of plain decoding, and what drafting costs beside its layers.
    alone = cost.round_seconds([2], [0], made=[1]) - cost.round_seconds([0], [0])
    assert alone == pytest.approx(5e-4 + 3e-4 + 2 * (1e-4 - 3e-4))


@pytest.mark.parametrize(
    ("sizes", "rows", "compiled"),
    [({}, 1, True), ({}, 3, False), ({"num_experts": 0}, 2, True), ({"max_seq_len": 6}, 1, False)],
    ids=str,
)
def test_fitting_leaves_the_model_as_it_was(tiny_model, sizes, rows, compiled):
    model = tiny_model(**sizes).train()
    model.blocks[1].eval()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    with compiling(model, compiled):
        found = fit_cost_model(model, rows, seconds=0.3)
        assert model.compiled == compiled
    assert len(found.seconds) == 9 and all(math.isfinite(cost) and cost >= 0 for cost in found.seconds)
    assert sum(found.seconds) > 0
    assert found.moe_layers == (() if sizes.get("num_experts") == 0 else (0, 1, 2))
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_rounds_are_timed_once_for_each_way_to_decode(tiny_model, monkeypatch):
    timed = []
    monkeypatch.setattr(
        fitting,
        "_fit",
        lambda model, rows, exits, int8, seconds: timed.append((rows, model.compiled, int8)) or len(timed),
    )
    model, other = tiny_model(), tiny_model()
    assert [fit_cost_model(model), fit_cost_model(model), fit_cost_model(model, 2), fit_cost_model(other)] == [
        1,
        1,
        2,
        3,
    ]
    with compiling(model):
        assert fit_cost_model(model) == fit_cost_model(model) == 4
        assert fit_cost_model(model, int8_drafts=True) == 5
    assert timed == [(1, False, False), (2, False, False), (1, False, False), (1, True, False), (1, True, True)]


def test_where_rounds_take_long_few_are_timed(tiny_model, monkeypatch):
    """As where other work holds the processors: a clock that runs."""
    clock = itertools.count(step=1.0)
    monkeypatch.setattr(timed_rounds.time, "perf_counter", lambda: float(next(clock)))
    blocks, own = [], fitting._fitted_to

    def noted(empty, some, *, head):
        blocks.extend(some)
        return own(empty, some, head=head)

    monkeypatch.setattr(fitting, "_fitted_to", noted)
    found = fit_cost_model(tiny_model())
    assert 1 <= len(blocks) <= 4 and next(clock) < 40
    assert all(math.isfinite(cost) and cost >= 0 for cost in found.seconds)


def test_what_stages_do():
    """12 drafts by all 6 layers: the first 2 ran 9 times, the others 4 times, over 13 places, and the head
    11 times."""
    empty = replace(SPARSE, int8_drafts=True)
    alone = empty.features([6], [12], [2, 2, 2])
    staged = empty.features([6], [12], [2, 2, 2], staged=Staged(2, 9, 4, 13, 11))
    assert alone[:5] == [1, 1, 12, 72, 0]
    assert staged[:5] == [1, 1, 11, 2 * 9 + 4 * 4, 2 * (13 - 9) + 4 * (13 - 4)]
    assert staged[5:] == alone[5:]
    assert empty.features([0], [0], [2, 2, 2], staged=Staged(2, 0, 0, 0, 0)) == empty.features([0], [0], [2, 2, 2])


def test_costs_beside_others_have_plain_decoding_in_common():
    """And all else in proportion, so that a busy machine's are not taken for slow drafts."""
    one = replace(SPARSE, seconds=(1.0, 0.1, 0.2, 0.3, 0.0, 0.5, 0.05, 0.02, 0.01), int8_drafts=True)
    other = replace(SPARSE, seconds=(3.0, 0.0, 0.2, 0.3, 0.0, 0.5, 0.05, 0.02, 0.01))
    beside = one.beside(other)
    assert beside.round_seconds([0], [0]) == pytest.approx(other.round_seconds([0], [0]))
    ratio = one.round_seconds([3], [4]) / one.round_seconds([0], [0])
    assert beside.round_seconds([3], [4]) / beside.round_seconds([0], [0]) == pytest.approx(ratio)
    assert beside.int8_drafts and SPARSE.beside(other) == SPARSE and one.beside(SPARSE) == one


def test_no_time_is_none_to_fit_by(tiny_model):
    with pytest.raises(ValueError, match="seconds=0 must be above 0"):
        fit_cost_model(tiny_model(), seconds=0)


@pytest.mark.parametrize("rows", [1, 2, 8, 11, 16, 21, 31, 40, 64])
def test_rounds_are_timed_at_several_lengths_where_there_is_room(tiny_model, rows):
    kinds = kinds_of(tiny_model().config, rows, (), True)
    lengths, room = {kind.drafts for kind in kinds if kind.exit_layer}, 64 // rows - 1
    assert min(lengths) == 1 and max(lengths) <= max(room, 1) and (len(lengths) > 1) == (room > 1)


def test_every_size_of_a_batch_is_timed_in_every_way(tiny_model, monkeypatch):
    """However little of the time falls to few rows."""
    found = []
    monkeypatch.setattr(fitting, "_AT_MOST", math.inf)
    monkeypatch.setattr(fitting, "_cost_model", lambda model, blocks, int8: found.extend(blocks))
    model = tiny_model()
    fitting._fit(model, 8, (), False, 0.05)
    for rows in (2, 8):
        assert {block.kind for block in found if len(block.made) == rows} == {*kinds_of(model.config, 8, (), False)}


def test_what_is_asked_for_is_found_again():
    """Beside rounds of the same kinds that ask for nothing."""
    asking = (2e-3, 1e-3, 5e-4, 1e-4)
    true = replace(SPARSE, seconds=(1e-3, 5e-4, 3e-4, 1e-4, 2e-5, 3e-4, 4e-5, 5e-5, 6e-5), asking=asking)
    blocks = []
    for kind in (Kind(2, 1, stops=True), Kind(2, 5, stops=True), Kind(0, 0, shadow=True), Kind(3, 4, shadow=True)):
        drafted, experts = (kind.drafts,), [2, 3, 4]
        asked = dict(stops=kind.stops, made=kind.drafts, shadow=kind.shadow * 5 * (kind.drafts + 1))
        seconds = true.round_seconds([kind.exit_layer], drafted, experts) + true.asking_seconds(**asked)
        blocks.append(Block(kind, drafted, drafted, experts, False, [seconds] * 3))
    assert fitting._asking(replace(true, asking=(0.0,) * 4), blocks) == pytest.approx(asking)
    assert fitting._asking(true, []) == asking, "nothing was timed"


def test_drafts_that_are_looked_up_are_timed(tiny_model, monkeypatch):
    """No layer makes them; all layers verify them, and it is told how many experts that reads."""
    found = []
    monkeypatch.setattr(fitting, "_AT_MOST", math.inf)
    monkeypatch.setattr(fitting, "_cost_model", lambda model, blocks, int8: found.extend(blocks))
    fitting._fit(tiny_model(max_seq_len=64), 1, (), False, 0.3)
    looked_up = [block for block in found if block.drafted != (0,) and not block.kind.exit_layer]
    assert {block.drafted[0] for block in looked_up} == {5, 31}
    for block in looked_up:
        assert block.made == (0,) and all(2 <= read <= 5 for read in block.experts)


def test_rounds_of_several_ways_to_draft_are_timed_in_turn(tiny_model, monkeypatch):
    monkeypatch.setattr(fitting, "_AT_MOST", math.inf)  # however busy the machine is
    fit = CostFit(tiny_model(), [((), False), ((3,), True)])
    with compiling(fit._model):
        fit.time(0.2)
        fit.time(0.2)
    own, int8 = fit.cost_models()
    assert (own.int8_drafts, int8.int8_drafts) == (False, True)
    assert own.round_seconds([0], [0]) == pytest.approx(int8.round_seconds([0], [0]))
    ways = [{*kinds_of(fit._model.config, 1, *way, asking=True)} for way in fit._ways]
    assert {block.kind for block in fit._blocks} == {*fit._kinds} == ways[0] | ways[1]
    assert len(fit._kinds) < len(ways[0]) + len(ways[1]), "plain steps are both ways'"


@pytest.fixture
def ticking(monkeypatch):
    """A clock that is a second later whenever it is asked."""
    clock = itertools.count(step=1.0)
    monkeypatch.setattr(timed_rounds, "time", SimpleNamespace(perf_counter=lambda: float(next(clock))))


def test_what_is_cut_short_counts_all_that_was_timed(tiny_model, ticking):
    """As where rounds take long: the first rounds of a kind are left aside only where there are others."""
    model, found = tiny_model(), [0]
    kinds = kinds_of(model.config, 1, (), False)
    while found[-1] < len(kinds):
        at_most = 40.0 * len(found)
        timed = timed_rounds.time_rounds(model, 1, kinds, 1.0, at_most)
        found.append(len({block.kind for some in timed for block in some}))
        assert at_most < 4000, "all have their turn"
    assert found == sorted(found) and 1 <= found[1] < len(kinds)


def test_a_fit_that_is_cut_short_goes_on_where_it_stopped(tiny_model, ticking):
    fit, found = CostFit(tiny_model(), [((), False), ((3,), False)]), [0]
    while found[-1] < len(fit._kinds):
        fit.time(40.0)
        found.append(len({block.kind for block in fit._blocks}))
        assert found[-1] > found[-2], "each call has kinds that none before it had"
    assert len(found) > 3


def test_short_texts_are_timed_by_steps_that_follow_others(tiny_model):
    """Though they have room for one round of the longest drafts."""
    model = tiny_model(max_seq_len=33)
    kinds = kinds_of(model.config, 1, (), False)
    timed = timed_rounds.time_rounds(model, 1, kinds, 1.0, math.inf)
    steps = {kind: max(len(block.seconds) for some in timed for block in some if block.kind == kind) for kind in kinds}
    assert all(count > 1 for kind, count in steps.items() if kind.drafts <= 2)
