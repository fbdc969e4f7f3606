"""Drafts from int8 copies of the weights: the text is the model's all the same."""

import copy
import dataclasses
import math
import threading

import pytest
import torch

from layerskip_moe import Autoregressive, SelfSpeculative, generate
from layerskip_moe.generation import Sampling, Session, self_speculative
from layerskip_moe.generation.cost_model import CostModel, moe_layers
from layerskip_moe.generation.policies import Adaptive, Fixed
from layerskip_moe.generation.policies.exits import candidate_exits, proposing_layers
from layerskip_moe.nn import int8_copies as int8_file
from layerskip_moe.nn.compiling import compiling
from layerskip_moe.nn.kernels import has_kernels
from layerskip_moe.nn.modes import evaluating
from layerskip_moe.nn.ragged import MarginRule, Stage
from layerskip_moe.pretrained import quantize

PROMPTS = [[3, 9, 21, 4], [5], [7, 7, 2]]
pytestmark = pytest.mark.skipif(not has_kernels(), reason="they are read by kernels")


@pytest.fixture
def drafted_by(monkeypatch):
    """What drafted in each round: (exit layer, whether from copies, which takes a round that is one call)."""
    seen, own = [], self_speculative.draft_and_verify

    def noted(session, round_, exit_layer, watch, rule, copies, *how):
        tokens, accepted, judged, *more = own(session, round_, exit_layer, watch, rule, copies, *how)
        seen.append((exit_layer, copies is not None and judged is not None))
        return tokens, accepted, judged, *more

    monkeypatch.setattr(self_speculative, "draft_and_verify", noted)
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("exit_layer", [1, 2, 3])
def test_the_text_is_the_model_s(trained_model, drafted_by, exit_layer, temperature, dtype):
    model = copy.deepcopy(trained_model(n_layers=3, max_seq_len=64)).to(dtype)
    how = dict(max_new_tokens=30, temperature=temperature, seed=4)
    plain = generate(model, PROMPTS, Autoregressive(), **how)
    fast = generate(model, PROMPTS, SelfSpeculative(exit_layer, 5, int8_drafts=True), **how)
    assert fast.tokens == plain.tokens
    assert drafted_by and all(by == (exit_layer, True) for by in drafted_by)
    if exit_layer == 3 and dtype == torch.float32:  # the whole model, in fewer bits, is nearly always right
        assert fast.stats.acceptance_rate > 0.8


class InStages:
    """The same pair in every round, whose drafts are made in stages, of other numbers of layers in turn."""

    shadow, should_stop, int8_drafts = False, None, True

    def __init__(self, exit_layer, length, lookup=1, sure_lookup=0):
        self.pair, self.lookups, self.rounds = (exit_layer, length), (lookup, sure_lookup), []

    def plan(self, session):
        count = len(self.rounds)
        self.stage = Stage(1 + count % 2, [0.0, 0.2, 1.0][count % 3], *self.lookups)
        return [self.pair] * len(session.row_numbers)

    def observe(self, round):
        self.rounds.append(round)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("lookup", [0, 1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stages_change_nothing_but_the_time(trained_model, lookup, temperature, dtype):
    """Texts and rounds are those of drafts one by one; of several rows, or of no later layers, they are made so."""
    model = copy.deepcopy(trained_model(n_layers=3, max_seq_len=64)).to(dtype)
    for exit_layer, prompts in ((3, PROMPTS[:1]), (2, PROMPTS[:1]), (3, PROMPTS)):
        how = dict(max_new_tokens=40, temperature=temperature, seed=4)
        staged = InStages(exit_layer, 12, lookup)
        expected = generate(model, prompts, SelfSpeculative(exit_layer, 12, int8_drafts=True), **how)
        found = generate(model, prompts, SelfSpeculative(policy=staged), **how)
        plain = generate(model, prompts, Autoregressive(), **how)
        assert found.tokens == expected.tokens == plain.tokens
        assert (found.stats.drafted, found.stats.accepted) == (expected.stats.drafted, expected.stats.accepted)
        in_stages = [round.staged is not None for round in staged.rounds if max(round.drafted)]
        if len(prompts) > 1:
            assert not any(in_stages)
        else:
            assert in_stages == [1 + index % 2 < exit_layer for index in range(len(in_stages))] and any(in_stages)
            for round in staged.rounds:
                if round.staged is not None:
                    assert round.staged.places >= round.made[0] >= round.staged.choosing >= 1


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("least", [None, 0.3])
def test_what_is_looked_up_is_drafted_and_verified(trained_model, temperature, least):
    """The text stays the model's; of what was looked up there are no margins."""
    model = copy.deepcopy(trained_model(n_layers=3, max_seq_len=64))
    how = dict(max_new_tokens=40, temperature=temperature, seed=4)
    policy = InStages(3, 12, 1, 2)
    policy.margin_rule = None if least is None else MarginRule([0.1], least)
    prompt = [[4, 5, 6] * 5]
    found = generate(model, prompt, SelfSpeculative(policy=policy), **how)
    assert found.tokens == generate(model, prompt, Autoregressive(), **how).tokens
    told = [round for round in policy.rounds if round.staged is not None and round.staged.looked_up]
    assert told and any(round.staged.looked_up == round.drafted[0] for round in told)  # no layer was asked
    for round in told:
        asked = int(round.drafted[0] - round.staged.looked_up)
        assert round.made == [asked] and len(round.judged[0]) == min(round.accepted[0] + 1, asked)
        assert not any(math.isnan(margin) for margin, _ in round.judged[0])


def test_a_stage_that_is_none_is_refused(trained_model):
    model, policy = trained_model(n_layers=3, max_seq_len=64), InStages(3, 4)
    policy.plan = lambda session: setattr(policy, "stage", 2) or [(3, 4)]
    with pytest.raises(ValueError, match="stage=2 is no stage; give a Stage, or None"):
        generate(model, PROMPTS[:1], SelfSpeculative(policy=policy), max_new_tokens=9)
    for arguments in ((0, 0.1), (1, -1.0), (1, 0.1, -1), (1, float("nan")), (1, 0.1, 1024)):
        with pytest.raises(ValueError, match=r"exit_layer=.* must be 1 or more, sure=.* 0 or more, and lookup=.* 0 to"):
            Stage(*arguments)
    for arguments in ((1, 0.1, 4, -1), (1, 0.1, 4, 3), (1, 0.1, 0, 8), (1, 0.1, 4, 1024)):
        with pytest.raises(
            ValueError, match=r"sure_lookup=.* must be 0, or from lookup=.*, which then is 1 or more, to"
        ):
            Stage(*arguments)
    for arguments in ((1.5, 0.1), (1, 0.1, 2.5), (1, 0.1, 4, 0.5)):
        with pytest.raises(ValueError, match="whole number"):
            Stage(*arguments)


def test_adaptive_drafts_in_stages_for_one_row(trained_model, monkeypatch):
    """By as many layers as `proposing_layers` says, and tells the cost model what was done."""
    model, seen = trained_model(n_layers=4, max_seq_len=64), []
    cost = CostModel(4, (), 0, 0, (1e-3, 0, 0, 1e-5, 1e-6, 1e-3, 0, 0, 0), True)
    cost = dataclasses.replace(cost, moe_layers=moe_layers(model.config), num_experts=model.config.num_experts, top_k=2)
    policy = Adaptive(cost_model=cost)
    observe = policy.observe
    monkeypatch.setattr(policy, "observe", lambda round: (seen.append(round), observe(round)))
    generate(model, PROMPTS[:1], SelfSpeculative(policy=policy), max_new_tokens=40)
    staged = [round.staged for round in seen if round.staged is not None]
    assert staged and {did.exit_layer for did in staged} == {1} and policy.stage.exit_layer == 1
    assert policy._reckoning._staged
    seen.clear()
    generate(model, PROMPTS, SelfSpeculative(policy=policy), max_new_tokens=20)
    assert all(round.staged is None for round in seen if len(round.rows) > 1)


def test_a_head_whose_rows_do_not_lie_together(trained_model):
    """Decodes as any other."""
    model = copy.deepcopy(trained_model(n_layers=3, max_seq_len=64))
    strategy, how = SelfSpeculative(3, 5, int8_drafts=True), dict(max_new_tokens=12, temperature=0.8)
    expected = generate(model, PROMPTS, strategy, **how).tokens
    weight = model.head_weight.detach()
    model.head.weight = torch.nn.Parameter(weight.t().contiguous().t())
    assert not model.head_weight.is_contiguous()
    assert generate(model, PROMPTS, strategy, **how).tokens == expected


@pytest.mark.parametrize(
    ("n_layers", "proposing"), [(1, 0), (2, 1), (4, 1), (6, 2), (12, 4), (16, 4), (32, 8), (48, 16)]
)
def test_the_layers_that_propose_are_an_exit_that_is_known(n_layers, proposing):
    assert proposing_layers(n_layers) == proposing
    assert not proposing or proposing in candidate_exits(n_layers)


def test_weights_that_change_are_followed(trained_model):
    model, strategy = copy.deepcopy(trained_model(n_layers=3, max_seq_len=64)), SelfSpeculative(3, 5, int8_drafts=True)
    generate(model, PROMPTS, strategy, max_new_tokens=20)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(
                0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
            )
    plain = generate(model, PROMPTS, max_new_tokens=20)
    fast = generate(model, PROMPTS, strategy, max_new_tokens=20)
    assert fast.tokens == plain.tokens and fast.stats.acceptance_rate > 0.8


def test_adaptive_drafts_by_them_where_it_can(trained_model, drafted_by, monkeypatch):
    model = trained_model(n_layers=3, max_seq_len=64)
    cases = [
        (SelfSpeculative(), {}, True),
        (SelfSpeculative(int8_drafts=False), {}, False),
        (SelfSpeculative(policy=Adaptive(int8_drafts=True)), {}, True),
        (SelfSpeculative(), {"top_k": 5}, False),
        (SelfSpeculative(), {"compile": False}, False),
        (SelfSpeculative(coupling="rejection"), {}, False),
    ]
    for strategy, how, int8 in cases:
        drafted_by.clear()
        how = dict(max_new_tokens=30, temperature=0.8, **how)
        expected = generate(model, PROMPTS[:1], **how).tokens
        found = generate(model, PROMPTS[:1], strategy, **how).tokens
        assert found == expected or strategy.coupling == "rejection"
        assert strategy.policy.int8_drafts == int8
        assert {by for _, by in drafted_by} <= {int8}
        assert strategy.policy.exits == ((1, 2) if int8 else (1,))
    monkeypatch.setattr(int8_file, "MOST_BYTES", 10)
    too_large = SelfSpeculative()
    generate(model, PROMPTS[:1], too_large, max_new_tokens=5)
    assert not too_large.policy.int8_drafts
    asked_for = SelfSpeculative(int8_drafts=True)
    generate(model, PROMPTS[:1], asked_for, max_new_tokens=5)
    assert asked_for.policy.int8_drafts


@pytest.mark.parametrize(("rows", "int8"), [(5, True), (32, True), (33, False)])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_so_it_does_for_as_many_rows_as_may_draft(trained_model, drafted_by, rows, int8, temperature):
    model, strategy = trained_model(n_layers=3, max_seq_len=64), SelfSpeculative()
    prompts = [[(3 * row + place) % 23 for place in range(1 + row % 4)] for row in range(rows)]
    how = dict(max_new_tokens=24, temperature=temperature)
    expected = generate(model, prompts, **how).tokens
    for _ in range(2):  # it goes on learning
        assert generate(model, prompts, strategy, **how).tokens == expected
    assert strategy.policy.int8_drafts == int8 and {by for _, by in drafted_by} <= {int8}


def test_a_strategy_takes_texts_of_both_kinds_in_turn(trained_model):
    model, strategy = trained_model(n_layers=3, max_seq_len=64), SelfSpeculative()
    for how in ({}, {"top_p": 0.9}, {}, {"compile": False}, {"top_k": 3}, {}):
        how = dict(max_new_tokens=25, temperature=0.7, seed=2, **how)
        assert generate(model, PROMPTS, strategy, **how).tokens == generate(model, PROMPTS, **how).tokens


def test_what_cannot_be_is_refused(trained_model):
    model = trained_model(n_layers=3, max_seq_len=64)
    strategy = SelfSpeculative(2, 4, int8_drafts=True)
    for of, how, reason in [
        (model, {"top_k": 3, "temperature": 1.0}, "top_k, top_p or a penalty"),
        (model, {"compile": False}, "not compiled"),
        (quantize(model, "int8"), {}, "quantised"),
        (copy.deepcopy(model).double(), {}, "float64"),
        (model, {"prompts": [[1]] * 13}, "13 prompts times 4 drafts . 1 are more than 64"),
    ]:
        prompts = how.pop("prompts", PROMPTS)
        with pytest.raises(ValueError, match=reason):
            generate(of, prompts, strategy, max_new_tokens=3, **how)
    for arguments in (
        {"policy": Fixed(1, 2), "int8_drafts": True},
        {"exit_layer": 1, "draft_model": model, "int8_drafts": True},
        {"exit_layer": 1, "coupling": "rejection", "int8_drafts": True},
        {"int8_drafts": "yes"},
        {"exit_layer": 1, "int8_drafts": "yes"},
    ):
        with pytest.raises(ValueError, match="int8"):
            SelfSpeculative(**arguments)
    of_weights = CostModel(3, (), 0, 0, (1.0,) * 9)
    for arguments in ({"cost_model": of_weights, "int8_drafts": True}, {"int8_drafts": 3}):
        with pytest.raises(ValueError, match="int8_drafts"):
            Adaptive(**arguments)


def test_threads_whose_texts_are_of_both_kinds_share_a_strategy(trained_model):
    """One begins between the other's prompt and its first round."""
    model, strategy = trained_model(n_layers=3, max_seq_len=64), SelfSpeculative()
    ways = [dict(top_k=3, temperature=0.7), {}]
    alone = [generate(model, PROMPTS, max_new_tokens=25, seed=3, **how).tokens for how in ways]
    meet, found = threading.Barrier(2, timeout=60), {}

    class Meeting:
        """Waits for the other thread before its first round."""

        def __init__(self):
            self.check, self.prepare, self.rounds = strategy.check, strategy.prepare, 0

        def start(self, session):
            strategy.start(session)

        def step(self, session):
            self.rounds += 1
            if self.rounds == 1:
                meet.wait()
            strategy.step(session)

    def decode(index):
        found[index] = generate(model, PROMPTS, Meeting(), max_new_tokens=25, seed=3, **ways[index]).tokens

    threads = [threading.Thread(target=decode, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict(enumerate(alone))


def test_what_is_cached_is_the_model_s(trained_model):
    """Up to what was accepted, and though drafts were refused."""
    model = trained_model(n_layers=3, max_seq_len=64)
    held = []
    for strategy in (Autoregressive(), SelfSpeculative(1, 4, int8_drafts=True)):
        session = Session(model, PROMPTS, Sampling(0.9, seed=1), max_new_tokens=20)
        with torch.no_grad(), compiling(model), evaluating(model):
            strategy.start(session)
            while min(map(len, session.outputs)) < 8:
                strategy.step(session)
        length = int(session.cache.lengths.min())
        held.append((session.cache.keys[..., :length, :], session.cache.values[..., :length, :]))
    length = min(keys.shape[-2] for keys, _ in held)
    (keys, values), (others, other_values) = [tuple(part[..., :length, :] for part in parts) for parts in held]
    assert torch.equal(keys, others) and torch.equal(values, other_values)
