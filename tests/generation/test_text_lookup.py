"""What texts that repeat themselves tell: how it is found and trusted, and that it changes no token."""

import copy
import random
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from layerskip_moe.generation import Autoregressive, Sampling, SelfSpeculative, Session, generate
from layerskip_moe.generation.cost_model import CostModel, moe_layers
from layerskip_moe.generation.ngrams import Text
from layerskip_moe.generation.policies import Adaptive
from layerskip_moe.generation.policies.text_lookup import REPEATED, TextLookup, expected_right
from layerskip_moe.nn import ModelConfig, MoEDecoder
from layerskip_moe.nn.kernels import has_kernels
from layerskip_moe.nn.ragged import MOST_PER_REPEATED

PROMPTS = [[4, 5, 6] * 5, [3, 9, 21], [7, 2] * 6]


@given(st.lists(st.integers(0, 2), max_size=25), st.integers(1, 4), st.integers(0, 6))
def test_a_text_knows_how_long_it_has_repeated_itself(tokens, count, wanted):
    """By the definition: the latest place where its last tokens stood before, and all that stood there before these."""
    text = Text(tokens, count, count)
    found, repeated = text.continuation(wanted), text.repeated(99)
    starts = [at for at in range(len(tokens) - count) if tokens[at : at + count] == tokens[len(tokens) - count :]]
    if not starts:
        assert repeated == 0 and found == []
        return
    next_ = starts[-1] + count
    ends = (size for size in range(count, next_ + 1) if tokens[next_ - size : next_] == tokens[len(tokens) - size :])
    assert repeated == max(ends) and text.repeated(count) == count
    longer = list(tokens)
    for _ in range(wanted):
        longer.append(longer[next_ + len(longer) - len(tokens)])
    assert found == longer[len(tokens) :]


@pytest.fixture(scope="module")
def looping_model():
    """A model whose greedy texts repeat themselves: each of its tokens is followed by the next but two."""
    torch.manual_seed(0)
    model = MoEDecoder(ModelConfig(23, n_layers=4, d_model=32, n_heads=2, num_experts=4, max_seq_len=128), seed=1)
    tokens = (torch.arange(40) * 3) % 23
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(60):
        text = tokens[step % 23 :][:16].repeat(4, 1)
        logits = model(text[:, :-1])
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


class Rows(SimpleNamespace):
    """A session's part that is asked: rows of a text each, `new` tokens of which are new."""

    @classmethod
    def of(cls, texts, new, left=100):
        return cls(
            tokens=texts,
            row_numbers=list(range(len(texts))),
            new_tokens=[text[len(text) - new :] for text in texts],
            remaining=[left] * len(texts),
        )

    def texts(self):
        return self.tokens


def test_what_is_looked_up():
    repeating, fresh = [*range(REPEATED), *range(REPEATED)], list(range(50))
    lookup = TextLookup()
    found = lookup.drafts(Rows.of([repeating, fresh, repeating[:-1]], 0), 31)
    assert found == [(REPEATED, [0, 1, 2, 3]), (0, []), (0, [])]  # as many as the budget
    lookup.see(0, 4, 4)
    longer = [*repeating, 0, 1, 2]
    assert lookup.drafts(Rows.of([longer, [*fresh, 0], fresh], 3), 5)[0] == (REPEATED + 3, [3, 4, 5, 6, 7])
    assert lookup.drafts(Rows.of([longer, fresh, fresh], 3, left=3), 5)[0] == (REPEATED + 3, [3, 4])
    assert lookup.drafts(Rows.of([longer, fresh, fresh], 3, left=1), 5)[0] == (0, [])


def test_a_row_is_asked_less_where_it_was_wrong_and_for_more_where_it_was_right():
    lookup, text = TextLookup(), [*range(REPEATED)] * 14

    def drafts(new):
        return len(lookup.drafts(Rows.of([text[: 16 + new]], new), 64)[0][1])

    assert drafts(0) == 4
    lookup.see(0, 4, 4)
    assert drafts(5) == 8
    lookup.see(0, 8, 8)
    assert drafts(14) == 16
    lookup.see(0, 16, 8)  # right often enough
    assert drafts(15) == 16
    lookup.see(0, 16, 7)
    assert [drafts(16), drafts(15 + 31), drafts(15 + 32)] == [0, 0, 8]
    assert not lookup.pays(0, 46) and lookup.pays(0, 47) and lookup.pays(1, 0)
    lookup.see(0, 8, 0)
    assert [drafts(47 + 63), lookup.pays(0, 47 + 64)] == [0, True], "twice as long"
    for _ in range(9):
        lookup.see(0, 4, 0)
    assert not lookup.pays(0, 111 + 255) and lookup.pays(0, 111 + 256), "no longer than that"
    lookup.begin()
    assert drafts(0) == 4
    lookup.see(0, 4, 0)
    assert not lookup.pays(0, 255) and lookup.pays(0, 256), "no sooner in the next text"
    lookup.see(0, 4, 4)
    lookup.begin()
    assert drafts(0) == 4
    lookup.see(0, 4, 0)
    assert not lookup.pays(0, 31) and lookup.pays(0, 32), "but where they have been right since"
    lookup.begin()
    assert drafts(0) == 4
    lookup.see(0, 4, 0)
    assert not lookup.pays(0, 63) and lookup.pays(0, 64), "twice as long as in the text before"


@pytest.mark.parametrize("wrong", [0, 1])
def test_the_row_that_was_right_says_how_long_the_next_texts_wait(wrong):
    lookup = TextLookup()
    for row in (0, 1):
        assert lookup.pays(row, 0) and lookup.pays(2, 0)
        lookup.see(row, 4, 0 if row == wrong else 4)
    lookup.begin()
    assert lookup.pays(0, 0)
    lookup.see(0, 4, 0)
    assert not lookup.pays(0, 31) and lookup.pays(0, 32)


@pytest.mark.parametrize(("repeated", "told"), [(8, 1), (9, 4), (20, 40)])
def test_expected_right(repeated, told):
    """A text that has gone on for m tokens goes on for k more with probability m / (m + k)."""
    by_hand, goes_on = 0.0, 1.0
    for at in range(repeated, repeated + told):
        goes_on *= at / (at + 1)
        by_hand += goes_on
    assert expected_right(repeated, told) == pytest.approx(by_hand)
    assert repeated / (repeated + MOST_PER_REPEATED * repeated) == pytest.approx(1 / 3)


class LooksUp:
    """A policy whose lookups are right or wrong by chance, in some rows, alone or beside int8 drafts."""

    shadow, should_stop, experts = True, None, True

    def __init__(self, seed, beside, expected):
        self.draws, self.int8_drafts, self.expected, self.rounds = random.Random(seed), beside, expected, []
        self.shadow = self.experts = seed % 2 == 0

    def plan(self, session):
        self.lookup_drafts = []
        for row, new, left in zip(session.row_numbers, session.new_tokens, session.remaining, strict=True):
            right = self.expected[row][len(new) : len(new) + min(self.draws.choice([0, 0, 1, 3, 7]), left)]
            self.lookup_drafts.append([token if self.draws.random() < 0.8 else 1 for token in right])
        return [(3, 2)] * len(session.row_numbers)

    def observe(self, round):
        self.rounds.append((round, self.lookup_drafts))


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside others"])
@pytest.mark.parametrize(
    "how", [{}, {"temperature": 0.9}, {"temperature": 0.8, "top_k": 5}, {"repetition_penalty": 1.2}]
)
@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:1]], ids=["three", "one"])
@pytest.mark.parametrize(("compile", "seed"), [(True, 4), (True, 5), (False, 5)])
def test_whatever_is_looked_up_the_text_is_the_model_s(trained_model, beside, how, prompts, compile, seed):
    model = copy.deepcopy(trained_model(n_layers=3, max_seq_len=64))
    how = dict(max_new_tokens=30, seed=3, compile=compile, **how)
    plain = generate(model, prompts, Autoregressive(), **how).tokens
    policy = LooksUp(seed, beside, plain)
    assert generate(model, prompts, SelfSpeculative(policy=policy), **how).tokens == plain
    one_call = beside and has_kernels() and compile and not {"top_k", "repetition_penalty"} & {*how}
    together = False
    for round, drafts in policy.rounds:
        assert len(round.looked_up) == len(drafts)
        by_row = zip(drafts, round.looked_up, round.drafted, round.made, round.exit_layers, strict=True)
        for known, looked_up, drafted, made, exit_layer in by_row:
            assert looked_up == (drafted if known else 0) and made + looked_up == drafted
            assert exit_layer == (3 if made else 0)
            together |= bool(any(drafts) and made)
            assert not known or made == 0
        if any(drafts) and round.judged is not None:
            assert all(judged == [] for judged, known in zip(round.judged, drafts, strict=True) if known)
    assert together == bool(one_call and len(prompts) > 1)
    rights = [zip(round.accepted, round.looked_up, strict=True) for round, _ in policy.rounds]
    assert max(right for of_round in rights for right, known in of_round if known) >= 3, "several at a time"


@pytest.mark.parametrize("compile", [True, False])
def test_experts_that_verifying_lookups_reads_are_told(trained_model, compile):
    """Those that the model itself, over the whole text at once, sends these places to."""
    model = trained_model(n_layers=3, max_seq_len=64)
    prompt, how = PROMPTS[0], dict(max_new_tokens=30, compile=compile)
    new = generate(model, [prompt], Autoregressive(), **how).tokens[0]
    text = torch.tensor([[*prompt, *new]])
    with torch.no_grad():
        positions = torch.arange(text.shape[1])[None]
        chosen = model.run(model.embed(text), range(3), positions=positions, choices=True).chosen
    policy, reports = LooksUp(4, False, [new]), []
    policy.plan = lambda session: (
        setattr(policy, "lookup_drafts", [new[len(session.new_tokens[0]) :][:5]]) or [(1, 0)] * len(session.row_numbers)
    )
    policy.observe = reports.append
    generate(model, [prompt], SelfSpeculative(policy=policy), **how)
    place, told = len(prompt) - 1, []
    for report in reports:
        places = slice(place, place + report.drafted[0] + 1)
        told.append([len(chosen[layer][places].unique()) for layer in range(3)])
        place += report.accepted[0] + 1
    assert [report.experts for report in reports] == told and max(map(max, told)) > 2
    assert max(report.looked_up[0] for report in reports) == 5


def test_texts_that_end_in_what_was_looked_up(trained_model):
    """At a stop token among the drafts, at the last token there may be, and row by row."""
    model = copy.deepcopy(trained_model(n_layers=3, max_seq_len=64))
    whole = generate(model, PROMPTS, Autoregressive(), max_new_tokens=30).tokens
    for how in ({"stop_tokens": [whole[0][9], whole[1][4]], "max_new_tokens": 30}, {"max_new_tokens": 1}):
        plain = generate(model, PROMPTS, Autoregressive(), **how).tokens
        for beside in (False, True):
            policy = LooksUp(1, beside, [[*tokens, *[0] * 30] for tokens in whole])
            assert generate(model, PROMPTS, SelfSpeculative(policy=policy), **how).tokens == plain


def test_lookups_are_left_aside_where_drafts_may_be_rejected(trained_model):
    model, policy = trained_model(n_layers=3, max_seq_len=64), LooksUp(1, False, [[2] * 40] * 3)
    strategy = SelfSpeculative(policy=policy, coupling="rejection")
    generate(model, PROMPTS, strategy, max_new_tokens=9, temperature=0.7)
    assert any(any(drafts) for _, drafts in policy.rounds)
    assert not any(sum(round.looked_up) for round, _ in policy.rounds)


@pytest.mark.parametrize(
    ("drafts", "says"),
    [([[1]], "looked up drafts for 1 rows, and 3 are active"), ([[], [997], []], "token 997, and there are 0 to")],
)
def test_lookups_that_cannot_be(trained_model, drafts, says):
    policy = LooksUp(1, False, [])
    policy.plan = lambda session: setattr(policy, "lookup_drafts", drafts) or [(1, 1)] * 3
    with pytest.raises(ValueError, match=says):
        generate(trained_model(n_layers=3, max_seq_len=64), PROMPTS, SelfSpeculative(policy=policy), max_new_tokens=4)


class Watched(Adaptive):
    """`Adaptive`, whose rounds are kept."""

    def __init__(self, **how):
        super().__init__(**how)
        self.rounds = []

    def observe(self, round):
        self.rounds.append(round)
        super().observe(round)


# Seconds of a layer that drafts, drafts' bits, and how many rows: where drafting pays, and where it never does.
@pytest.mark.parametrize("drafting", [1e-5, 1.0], ids=["drafts", "rests"])
@pytest.mark.parametrize("int8", [False, True], ids=["by the weights", "int8"])
@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:1]], ids=["three", "one"])
def test_adaptive_looks_up(looping_model, prompts, int8, drafting):
    """In every way that it decodes, the text stays the model's, and takes fewer rounds."""
    if int8 and not has_kernels():
        return
    model = looping_model
    seconds = (1e-3, 0, 0, drafting, 1e-6, 1e-3, 0, 0, 0)
    cost = CostModel(4, moe_layers(model.config), model.config.num_experts, 2, seconds, int8)
    how = dict(max_new_tokens=90, seed=4)
    plain = generate(model, prompts, Autoregressive(), **how).tokens
    rounds = []
    for lookup in (True, False):
        policy = Watched(cost_model=cost, lookup=lookup)
        out = generate(model, prompts, SelfSpeculative(policy=policy), **how)
        assert out.tokens == plain
        looked_up = [round for round in policy.rounds if sum(round.looked_up)]
        rounds.append(out.stats.rounds)
        if not lookup:
            assert not looked_up
        elif drafting == 1.0:
            assert all(not max(round.exit_layers) for round in looked_up)
            assert sum(sum(round.accepted) for round in looked_up) > 20
        elif int8:
            in_stages = [round for round in looked_up if round.staged is not None]
            assert in_stages or len(prompts) > 1
            assert all(len(round.rows) == 1 for round in in_stages), "or of the last of several that goes on alone"
            assert sum(sum(round.accepted) for round in looked_up) > (20 if len(prompts) == 1 else 10), (
                "seldom looked up"
            )
            assert len(prompts) == 1 or any(max(round.exit_layers) for round in looked_up), "beside rows that draft"
    assert drafting < 1 or rounds[0] < rounds[1]


def test_texts_that_take_turns_have_their_own_lookups(looping_model):
    """Two sessions of one `Adaptive` at once, as two threads would have: a plan is for the session that asks."""
    cost = CostModel(4, moe_layers(looping_model.config), looping_model.config.num_experts, 2, (1e-3,) * 9, False)
    policy = Adaptive(cost_model=cost)
    one, two = (Session(looping_model, prompts, Sampling(), max_new_tokens=40) for prompts in (PROMPTS, PROMPTS[:1]))
    for session in (one, two):
        policy.prepare(looping_model, len(session.row_numbers))
        session.prefill()
    for _ in range(6):
        for session in (one, two, two, one):
            resting = policy.rests(session)
            other = two if session is one else one
            policy.rests(other)
            if not resting:
                assert len(policy.plan(session)) == len(session.row_numbers)
                assert len(policy.lookup_drafts) in (0, len(session.row_numbers))
            Autoregressive().step(session)


def test_a_text_that_does_not_repeat_itself_is_hardly_asked_at_rest(trained_model, monkeypatch):
    """To ask takes time, and a rest is to be as fast as plain decoding."""
    model = trained_model(n_layers=3, max_seq_len=64)
    cost = CostModel(3, moe_layers(model.config), model.config.num_experts, 2, (1e-3, 0, 0, 1.0, 0, 1e-3, 0, 0, 0))
    policy, asked = Adaptive(cost_model=cost), []
    drafts = TextLookup.drafts
    monkeypatch.setattr(TextLookup, "drafts", lambda *how: asked.append(how) or drafts(*how))
    how = dict(max_new_tokens=40, temperature=2.0, seed=1)
    out = generate(model, [[5]], SelfSpeculative(policy=policy), **how)
    assert out.tokens == generate(model, [[5]], **how).tokens and out.stats.rounds == 40
    assert 1 <= len(asked) <= 5
