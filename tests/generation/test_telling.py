"""What texts that repeat themselves tell: how it is found and trusted, and that it changes no token."""

import copy
import random
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerskip_moe.bench.rounds import repeated_tokens
from layerskip_moe.generation import Autoregressive, SelfSpeculative, generate
from layerskip_moe.generation.cost_model import CostModel, moe_layers
from layerskip_moe.generation.ngrams import Text
from layerskip_moe.generation.policies import Adaptive
from layerskip_moe.generation.policies.telling import REPEATED, Telling, expected_right
from layerskip_moe.nn.kernels import has_kernels
from layerskip_moe.nn.ragged import TOLD_PER_REPEATED

PROMPTS = [[4, 5, 6] * 5, [3, 9, 21], [7, 2] * 6]


@given(st.lists(st.integers(0, 2), max_size=25), st.integers(1, 4), st.integers(0, 6))
def test_a_text_knows_how_long_it_has_repeated_itself(tokens, count, wanted):
    """By the definition of the other place where that is looked for, which reads the text from its end."""
    text = Text(tokens, count, count)
    repeated = text.repeated()
    assert repeated == repeated_tokens(tokens, len(tokens), count)[0]
    found = text.continuation(wanted)
    assert len(found) == (wanted if repeated else 0)
    assert not repeated or repeated_tokens([*tokens, *found], len(tokens), count) == (repeated, wanted)


class Rows(SimpleNamespace):
    """A session's part that is asked: rows of a text each, `new` tokens of which are new."""

    @classmethod
    def of(cls, texts, new, left=100):
        return cls(
            texts=texts,
            row_numbers=list(range(len(texts))),
            new_tokens=[text[len(text) - new :] for text in texts],
            remaining=[left] * len(texts),
        )

    def text(self, index):
        return self.texts[index]


def test_what_is_told():
    repeating, fresh = [*range(REPEATED), *range(REPEATED)], list(range(50))
    telling = Telling()
    found = telling.tell(Rows.of([repeating, fresh, repeating[:-1]], 0), 31)
    assert found == [(REPEATED, list(range(REPEATED))), (0, []), (0, [])]  # as many as the budget
    longer = [*repeating, 0, 1, 2]
    assert telling.tell(Rows.of([longer, [*fresh, 0], fresh], 3), 5)[0] == (REPEATED + 3, [3, 4, 5, 6, 7])
    assert telling.tell(Rows.of([longer, fresh, fresh], 3, left=3), 5)[0] == (REPEATED + 3, [3, 4])
    assert telling.tell(Rows.of([longer, fresh, fresh], 3, left=1), 5)[0] == (0, [])


def test_a_row_is_asked_less_where_it_was_wrong_and_for_more_where_it_was_right():
    telling, text = Telling(), [*range(REPEATED)] * 12

    def told(new):
        return len(telling.tell(Rows.of([text[: 16 + new]], new), 64)[0][1])

    assert told(0) == 8
    telling.see(0, 8, 8)
    assert told(9) == 16
    telling.see(0, 16, 5)  # right often enough
    assert told(15) == 16
    telling.see(0, 16, 1)
    assert [told(16), told(15 + 15), told(15 + 16)] == [0, 0, 8]
    assert not telling.pays(0, 30) and telling.pays(0, 31) and telling.pays(1, 0)
    telling.see(0, 8, 0)
    assert [told(31 + 31), told(31 + 32)] == [0, 4], "twice as long"
    for _ in range(9):
        telling.see(0, 4, 0)
    assert telling.pays(0, 63 + 256), "no longer than that"
    telling.begin()
    assert told(0) == 8


@pytest.mark.parametrize(("repeated", "told"), [(8, 1), (9, 4), (20, 40)])
def test_expected_right(repeated, told):
    """A text that has gone on for m tokens goes on for k more with probability m / (m + k)."""
    by_hand, goes_on = 0.0, 1.0
    for at in range(repeated, repeated + told):
        goes_on *= at / (at + 1)
        by_hand += goes_on
    assert expected_right(repeated, told) == pytest.approx(by_hand)
    assert repeated / (repeated + TOLD_PER_REPEATED * repeated) == pytest.approx(1 / 3)


class Tells:
    """A policy of which anything may be told, right or wrong; it notes how right it was."""

    shadow, should_stop, int8_drafts = False, None, True

    def __init__(self, seed, alone, expected):
        self.draws, self.alone, self.expected, self.told_of, self.rounds = random.Random(seed), alone, expected, [], []
        self.given, self.at = (), []

    def _drafts(self, session):
        self.at = [len(new) for new in session.new_tokens]
        drafts = []
        for row, new, left in zip(session.row_numbers, session.new_tokens, session.remaining, strict=True):
            count = min(self.draws.choice([0, 0, 1, 3, 7]), left - 1)
            right = self.expected[row][len(new) : len(new) + count]
            drafts.append([token if self.draws.random() < 0.8 else 1 for token in right])
        return drafts

    def tells(self, session):
        return self._drafts(session) if self.alone and self.draws.random() < 0.7 else []

    def told(self, rows, drafted, accepted):
        self.told_of.append((rows, drafted, accepted))

    def plan(self, session):
        self.given = [] if self.alone else self._drafts(session)
        return [(3, len(drafts) or 2) for drafts in self.given] or [(3, 2)] * len(session.row_numbers)

    def observe(self, round):
        self.rounds.append(round)


@pytest.mark.parametrize("alone", [True, False], ids=["alone", "beside others"])
@pytest.mark.parametrize(
    "how", [{}, {"temperature": 0.9}, {"temperature": 0.8, "top_k": 5}, {"repetition_penalty": 1.2}]
)
@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:1]], ids=["three", "one"])
@pytest.mark.parametrize("compile", [True, False])
def test_whatever_is_told_the_text_is_the_model_s(trained_model, alone, how, prompts, compile):
    model = copy.deepcopy(trained_model(n_layers=3, max_seq_len=64))
    how = dict(max_new_tokens=30, seed=3, compile=compile, **how)
    plain = generate(model, prompts, Autoregressive(), **how).tokens
    policy = Tells(5, alone, plain)
    assert generate(model, prompts, SelfSpeculative(policy=policy), **how).tokens == plain
    if alone:
        accepted = [right for _, _, rights in policy.told_of for right in rights]
        assert max(accepted) >= 3, "several at a time"
    elif has_kernels() and compile and not {"top_k", "repetition_penalty"} & {*how}:
        beside = [round for round in policy.rounds if any(round.told)]
        assert beside and any(0 in round.told for round in beside) == (len(prompts) > 1)
        for round in beside:
            for told, drafted, made, judged in zip(round.told, round.drafted, round.made, round.judged, strict=True):
                assert told in (0, drafted) and (made, judged) == (0, []) if told else made == drafted
    else:  # left aside
        assert not any(sum(round.told) for round in policy.rounds)


def test_nothing_is_told_where_drafts_are_another_model_s_or_may_be_rejected(trained_model, monkeypatch):
    model = trained_model(n_layers=3, max_seq_len=64)
    policy = Tells(1, True, [])
    policy.tells = lambda session: pytest.fail("it was asked")
    generate(model, PROMPTS, SelfSpeculative(policy=policy, coupling="rejection"), max_new_tokens=5, temperature=0.7)


@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:1]], ids=["three", "one"])
@pytest.mark.parametrize("int8", [True, False])
def test_adaptive_tells(trained_model, monkeypatch, prompts, int8):
    """Where that is fast by the cost model, and no more of it is wrong than pays."""
    model = copy.deepcopy(trained_model(n_layers=4, max_seq_len=128))
    seconds = (1e-3, 0, 0, 1.0 if not int8 else 1e-5, 1e-6, 1e-3, 0, 0, 0)
    cost = CostModel(4, moe_layers(model.config), model.config.num_experts, 2, seconds, int8)
    policy, seen = Adaptive(cost_model=cost), []
    see = policy._telling.see
    monkeypatch.setattr(
        policy._telling, "see", lambda row, told, right: (seen.append((told, right)), see(row, told, right))
    )
    how = dict(max_new_tokens=80, seed=4)
    assert (
        generate(model, prompts, SelfSpeculative(policy=policy), **how).tokens == generate(model, prompts, **how).tokens
    )
    assert seen and all(0 <= right <= told for told, right in seen)
