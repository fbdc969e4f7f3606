"""Replays against real decoding: the same rounds, and policies are told the same of them."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from layerskip_moe.analysis.record_trace import record_texts
from layerskip_moe.bench.policies import compare_policies
from layerskip_moe.bench.policies_check import WatchedPolicy, check_policies
from layerskip_moe.bench.replay import replay
from layerskip_moe.bench.rounds import TextRounds, repeated_tokens
from layerskip_moe.generation import SelfSpeculative, generate
from layerskip_moe.generation.cost_model import CostModel
from layerskip_moe.generation.policies import DEL, Adaptive, DraftVerify, Fixed, Heuristic
from layerskip_moe.nn.kernels import has_kernels
from layerskip_moe.nn.ragged import MarginRule, Stage

needs_kernels = pytest.mark.skipif(not has_kernels(), reason="int8 drafts are made by kernels")
PROMPTS = [[3, 9, 21], [5], [7, 7, 2, 1]]
NEW = 16


@pytest.fixture(scope="module", params=[0.0, 0.8], ids=["greedy", "sampled"])
def texts(request, small_model):
    return record_texts(
        small_model(), PROMPTS, max_new_tokens=NEW, temperatures=[request.param], seed=6, progress=False
    )


def really(model, texts, policy):
    """What a policy is told when these prompts are decoded."""
    watched, told = WatchedPolicy(policy), []
    for text in texts:
        prompt = text.tokens[: text.prompt_length].tolist()
        generate(
            model,
            [prompt],
            SelfSpeculative(policy=watched),
            max_new_tokens=NEW,
            temperature=text.temperature,
            seed=text.seed,
        )
        told.append(list(watched.rounds))
        watched.rounds.clear()
    return told


def replayed(model, texts, policy, cost):
    """What it is told in a replay, and the rounds."""
    watched = WatchedPolicy(policy)
    rounds = replay([TextRounds(text, model.config, cost, cost) for text in texts], watched, model.config)
    reports = iter(watched.rounds)
    return [[next(reports) for _ in of_text] for of_text in rounds], rounds


@pytest.mark.parametrize(
    ("exit_layer", "length"), [(1, 0), (1, 1), (1, 4), (2, 2), (2, 9), (3, 1), (3, 3), (4, 2)], ids=str
)
def test_fixed_pairs_have_the_very_rounds_of_decoding(small_model, texts, cost_of, exit_layer, length):
    model = small_model()
    policy = Fixed(exit_layer, length)
    told = really(model, texts, policy)
    again, _ = replayed(model, texts, policy, cost_of(4))
    for real, copy in zip(told, again, strict=True):
        assert [report.accepted for report in copy] == [report.accepted for report in real]
        assert [report.drafted for report in copy] == [report.drafted for report in real]
        assert [report.exit_layers for report in copy] == [report.exit_layers for report in real]


@needs_kernels
@pytest.mark.parametrize(("exit_layer", "length"), [(1, 1), (1, 4), (2, 9), (3, 3), (4, 1), (4, 6), (4, 15)], ids=str)
def test_so_have_fixed_pairs_of_int8_drafts(small_model, texts, cost_of, exit_layer, length):
    """Also where a draft is chosen by what drafts before it left in the cache."""
    model = small_model()
    policy = Fixed(exit_layer, length, int8_drafts=True)
    told, (again, rounds) = really(model, texts, policy), replayed(model, texts, policy, cost_of(4, 0.3))
    for real, copy in zip(itertools.chain(*told), itertools.chain(*again), strict=True):
        assert (copy.accepted, copy.drafted, copy.exit_layers) == (real.accepted, real.drafted, real.exit_layers)
        if not real.drafted[0]:
            continue
        assert [right for _, right in copy.judged[0]] == [right for _, right in real.judged[0]]
        margins = [margin for margin, _ in real.judged[0]]
        assert [margin for margin, _ in copy.judged[0]] == [np.float32(margin) for margin in margins]
    flat = list(itertools.chain(*rounds))
    assert any(round.int8 for round in flat)
    assert exit_layer == 4 or any(round.accepted < round.drafted for round in flat)


class InStages:
    """One pair of int8 drafts, made in another way in each round."""

    shadow, should_stop, int8_drafts = False, None, True

    def __init__(self, exit_layer, length, *lookups):
        self.pair, self.lookups, self.count = (exit_layer, length), lookups, 0

    def plan(self, session):
        self.count += 1
        self.stage = Stage(1 + self.count % 2, [0.0, 0.1, 0.4][self.count % 3], *self.lookups)
        self.margin_rule = MarginRule([0.05], 0.4) if self.count % 4 == 0 else None
        return [self.pair]

    def observe(self, round):
        pass


@needs_kernels
@pytest.mark.parametrize("lookups", [(0, 0), (1, 0), (2, 0), (1, 2), (2, 5)], ids=str)
@pytest.mark.parametrize(("exit_layer", "length"), [(3, 4), (4, 14)], ids=str)
def test_stages_do_in_replays_what_they_do_in_decoding(small_model, texts, cost_of, exit_layer, length, lookups):
    """As long as drafts, and proposals, are right: what is proposed behind a wrong one no trace knows."""
    model = small_model()
    made = [InStages(exit_layer, length, *lookups) for _ in range(2)]
    told, (again, rounds) = really(model, texts, made[0]), replayed(model, texts, made[1], StagedCost())
    compared = 0
    flat = [list(itertools.chain(*some)) for some in (told, again, rounds)]
    for real, copy, one in zip(*flat, strict=True):
        assert copy.accepted == real.accepted and (copy.staged is None) == (real.staged is None)
        if real.staged is not None and real.accepted == real.drafted:
            assert copy.staged.choosing == real.staged.choosing and one.seconds == copy.staged.places
            wrong = max(real.staged.places, copy.staged.places) > real.made[0]
            assert copy.staged.looked_up == real.staged.looked_up and (wrong or copy.staged == real.staged)
            compared += real.staged.places > real.staged.choosing or real.staged.looked_up > 0
    assert compared >= 2


class StagedCost:
    """A second for each place that drafts in stages ran over."""

    def round_seconds(self, exit_layers, drafted, experts=None, made=None, staged=None):
        return 0.0 if staged is None else staged.places

    def asking_seconds(self, *, stops, made, shadow):
        return 0.0


@given(text=st.lists(st.integers(0, 2), min_size=1, max_size=20), data=st.data(), least=st.integers(0, 4))
def test_what_followed_before(text, data, least):
    """The latest place where the last tokens stood before, found by its definition."""
    end = data.draw(st.integers(1, len(text)))
    before, after = text[:end], text[end:]
    starts = [at for at in range(end - least) if least and before[at : at + least] == before[end - least :]]
    if not starts:
        assert repeated_tokens(text, end, least) == (0, 0)
        return
    next_ = starts[-1] + least
    longest = max(count for count in range(least, next_ + 1) if before[next_ - count : next_] == before[end - count :])
    longer = list(before)
    for _ in after:
        longer.append(longer[next_ + len(longer) - end])
    assert repeated_tokens(text, end, least) == (longest, [*map(int.__eq__, longer[end:], after), False].index(False))


class LooksFar:
    """A policy that looks up more than there is room for: at odd places what the text says, elsewhere two
    tokens of that and then what it does not say."""

    shadow, should_stop = False, None

    def __init__(self, said):
        self.said = said

    def plan(self, session):
        place = len(session.new_tokens[0])
        right = self.said[place:].tolist()
        later = right[2:] if place % 2 else [1 - min(token, 1) for token in right[2:]]
        self.lookup_drafts = [[*right[:2], *later, 0, 0, 0]]
        return [(1, 1)]

    def observe(self, round):
        pass


def test_lookups_have_the_very_rounds_of_decoding(small_model, texts, cost_of):
    """Also where more is looked up than the text has room for."""
    model = small_model()
    for text in texts:
        said = text.tokens[text.prompt_length :]
        told = really(model, [text], LooksFar(said))
        again, rounds = replayed(model, [text], LooksFar(said), cost_of(4))
        assert [round.accepted for round in rounds[0]] == [report.accepted[0] for report in told[0]]
        for real, copy in zip(told[0], again[0], strict=True):
            assert (copy.drafted, copy.looked_up, copy.made) == (real.drafted, real.looked_up, real.made)
            assert copy.exit_layers == real.exit_layers == [0] and copy.judged is real.judged is None


@needs_kernels
def test_copies_say_other_things_than_the_weights(texts):
    """Or the test above shows nothing."""
    own = [text.agreement[:, text.prompt_length - 1 :] for text in texts]
    assert any((text.int8_right[..., 0] != right).any() for text, right in zip(texts, own, strict=True))


def test_int8_drafts_that_were_not_recorded(small_model, texts, cost_of):
    model, policy = small_model(), Fixed(4, 2, int8_drafts=True)
    with pytest.raises(ValueError, match="planned 2 int8 drafts, and the trace has 0 at most; plan fewer"):
        replay([TextRounds(texts[0], model.config, cost_of(4))], policy, model.config)


def test_there_is_something_to_tell_apart(small_model, texts, cost_of):
    """Some drafts are accepted and some refused, or the tests here show nothing."""
    _, rounds = replayed(small_model(), texts, Fixed(2, 3), cost_of(4))
    accepted = {round.accepted for of_text in rounds for round in of_text}
    assert {0, 3} <= accepted


@pytest.mark.parametrize(
    "make",
    [lambda: Heuristic(2, length=3), lambda: Heuristic(3), lambda: DEL(length=4), lambda: DEL(decay=0.5)],
    ids=["Heuristic(2)", "Heuristic(3)", "DEL", "DEL(0.5)"],
)
def test_policies_that_look_at_no_clock_have_the_rounds_of_decoding(small_model, texts, cost_of, make):
    model = small_model()
    told, (again, _) = really(model, texts, make()), replayed(model, texts, make(), cost_of(4))
    for real, copy in zip(told, again, strict=True):
        assert [report.accepted for report in copy] == [report.accepted for report in real]


class Unsure:
    """Drafts by a margin rule, another one in each round."""

    should_stop = None

    def __init__(self):
        self.count, self.shadow = 0, False

    def plan(self, session):
        self.count += 1
        self.shadow = self.count % 3 == 0
        self.margin_rule = MarginRule([0.1 * (1 + self.count % 4)], 0.2 * (self.count % 5))
        return [(1 + self.count % 3, 3)]

    def observe(self, round):
        pass


def test_margin_rules_have_the_very_rounds_of_decoding(small_model, texts, cost_of):
    model = small_model()
    told, (again, rounds) = really(model, texts, Unsure()), replayed(model, texts, Unsure(), cost_of(4))
    let_go = 0
    for real, copy in zip(itertools.chain(*told), itertools.chain(*again), strict=True):
        assert (copy.accepted, copy.exit_layers) == (real.accepted, real.exit_layers)
        if not max(real.exit_layers):
            continue
        if real.accepted == real.drafted or copy.accepted == copy.drafted:  # (behind a refused one all is different)
            assert copy.drafted == real.drafted
        assert [right for _, right in copy.judged[0]] == [right for _, right in real.judged[0]]
        margins = [margin for margin, _ in copy.judged[0]]
        assert margins == pytest.approx([margin for margin, _ in real.judged[0]], abs=1e-4)
        let_go += len(real.judged[0]) > real.drafted[0]
        if real.shadow is not None:
            there = slice(real.accepted[0] + 1)
            assert torch.allclose(copy.shadow_margins[:, :3, there], real.shadow_margins[:, :3, there], atol=1e-4)
    assert let_go > 0
    for of_text, reports in zip(rounds, again, strict=True):
        for one, report in zip(of_text, reports, strict=True):
            made = max(len(report.judged[0]), one.drafted) if report.judged else 0
            if made > one.drafted == one.accepted and one.exit_layer:
                assert one.seconds == cost_of(4).round_seconds([one.exit_layer], [one.drafted], one.experts, [made])


class Curious:
    """Asks for all there is to know, changes layer and length, and never stops."""

    shadow, experts = True, True

    def __init__(self, exits=None, shadow_places=None):
        self.count, self.shadow_places = 0, shadow_places
        if exits is not None:
            self.exits = exits

    def plan(self, session):
        self.count += 1
        return [(1 + self.count % 3, self.count % 5)] * len(session.row_numbers)

    def should_stop(self, confidence, position):
        return confidence > 2

    def observe(self, round):
        pass


@pytest.mark.parametrize(
    ("moe_layers", "asked"),
    [("all", ()), ("every other", ()), ("all", ((1, 3),)), ("all", ((1, 3), 2))],
)
def test_reports_are_those_of_decoding(small_model, cost_of, moe_layers, asked):
    """Up to the first draft that is refused, beyond which a trace knows nothing; experts where none is."""
    model = small_model(moe_layers=moe_layers)
    texts = record_texts(model, PROMPTS, max_new_tokens=NEW, temperatures=[0.8], progress=False)
    told, (again, _) = really(model, texts, Curious(*asked)), replayed(model, texts, Curious(*asked), cost_of(4))
    compared = 0
    for real, copy in zip(itertools.chain(*told), itertools.chain(*again), strict=True):
        count = real.accepted[0] + 1
        assert (copy.rows, copy.exit_layers, copy.drafted, copy.accepted) == (
            real.rows,
            real.exit_layers,
            real.drafted,
            real.accepted,
        )
        assert copy.tokens.shape == real.tokens.shape
        assert copy.tokens[:, :count].tolist() == real.tokens[:, :count].tolist()
        assert copy.shadow.shape == real.shadow.shape
        assert copy.shadow[..., :count].tolist() == real.shadow[..., :count].tolist()
        assert copy.confidences[0][:count] == real.confidences[0][:count]
        assert len(copy.confidences[0]) == len(real.confidences[0])
        if count == len(copy.tokens[0]):
            assert copy.experts == real.experts
            compared += count > 1
    assert compared >= 3


def test_should_stop_is_asked_as_drafting_asks(small_model, invented_text, cost_of):
    config = small_model().config
    text = invented_text(config, [[True] * 8] * 3)
    asked = []

    def should_stop(confidence, position):
        asked.append((float(confidence), position))
        return torch.tensor([position == 1])

    policy = WatchedPolicy(Fixed(2, 4))
    policy.should_stop = should_stop
    [rounds] = replay([TextRounds(text, config, cost_of(4))], policy, config)
    # 2 drafts are verified of 4; then 2 are left to draft, of which the last is not asked about; then none.
    assert [(round.drafted, round.accepted) for round in rounds] == [(2, 2), (2, 2), (1, 1)]
    first = text.prompt_length - 1
    places = [(0, 0), (1, 1), (3, 0), (4, 1)]
    assert asked == [(float(text.confidence[1, first + place]), position) for place, position in places]


def test_what_a_plan_may_read(small_model, texts, cost_of):
    config, seen = small_model().config, []

    def plan(session):
        seen.append((session.row_numbers, session.remaining[0], int(session.newest), session.model.config))
        assert session.sampling.greedy == (texts[0].temperature == 0)
        return [(1, 0)]

    policy = WatchedPolicy(Fixed(1, 0))
    policy.plan = plan
    replay([TextRounds(texts[0], config, cost_of(4))], policy, config)
    newest = texts[0].tokens[texts[0].prompt_length - 1 : -1].tolist()
    assert seen == [([0], NEW - place, token, config) for place, token in enumerate(newest)]


@pytest.mark.parametrize("plan", [(5, 1), (0, 1), (1, -1)])
def test_plans_that_cannot_be_followed(small_model, texts, cost_of, plan):
    policy = SimpleNamespace(plan=lambda session: [plan], should_stop=None, shadow=False, observe=None)
    with pytest.raises(ValueError, match=f"planned exit layer {plan[0]} and {plan[1]} drafts; exit layers are 1 to 4"):
        replay([TextRounds(texts[0], small_model().config, cost_of(4))], policy, small_model().config)


def test_check_decodes_for_real(small_model, texts, cost_of):
    model = small_model()
    made = {"Heuristic": [lambda: Heuristic(2, length=2)], "DraftVerify": [lambda: DraftVerify(1, length=1)]}
    compared = compare_policies(texts, model.config, cost_of(4), made, progress=False, resamples=5)
    rows = check_policies(model, texts, compared.runs, progress=False)
    assert [row.name for row in rows] == ["plain", "best fixed", "Heuristic", "DraftVerify"]
    for row in rows:
        assert row.same_rounds == row.same_text == row.prompts == 3
        assert row.measured_seconds > 0 and row.measured_over_modelled > 0
    assert rows[0].modelled_speed_up == rows[0].measured_speed_up == 1


def test_adaptive_drafts_where_the_given_costs_say_that_it_pays(small_model, texts):
    """Nothing but its cost model prepares it for a replay."""
    config = small_model().config
    moe = tuple(layer for layer in range(config.n_layers) if config.is_moe(layer))
    top_k = config.top_k if config.num_experts else 0
    for seconds, drafts in [((1e-3, 0, 0, 1e-5, 0, 1e-3, 0, 0, 0), True), ((1e-3, 1, 1, 1, 1, 1e-3, 1, 1, 1), False)]:
        cost = CostModel(config.n_layers, moe, config.num_experts, top_k, seconds)
        rounds = replay([TextRounds(text, config, cost) for text in texts], Adaptive(cost_model=cost), config)
        assert any(round.drafted for of_text in rounds for round in of_text) == drafts
