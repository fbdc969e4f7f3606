"""Each policy's rule against sequences worked out by hand, told of rounds that never were; and the README's policy."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from layerskip_moe.generation import SelfSpeculative, generate
from layerskip_moe.generation.policies import DEL, Cascade, DraftVerify, Fixed, Heuristic, RoundReport
from layerskip_moe.generation.policies.dynamic_exit_layer import best_pair

README = Path(__file__).parents[2] / "README.md"


class Text(SimpleNamespace):
    """A session's part that policies look at; a class of its own, because they refer to it weakly."""

    def of(self, *rows):
        """The same text, of whose rows these are left."""
        self.row_numbers = list(rows)
        return self


def session(*rows, n_layers=4, greedy=True):
    config = SimpleNamespace(n_layers=n_layers)
    model, sampling = SimpleNamespace(config=config), SimpleNamespace(greedy=greedy)
    return Text(row_numbers=list(rows), model=model, sampling=sampling)


def report(drafted, accepted, *, rows=None, seconds=1.0, confidences=None, shadow=None, tokens=None):
    places = max(drafted) + 1
    return RoundReport(
        rows=list(range(len(drafted))) if rows is None else rows,
        exit_layers=[1] * len(drafted),
        drafted=drafted,
        accepted=accepted,
        confidences=[[] for _ in drafted] if confidences is None else confidences,
        seconds=seconds,
        tokens=torch.zeros(len(drafted), places, dtype=torch.int64) if tokens is None else torch.tensor(tokens),
        shadow=None if shadow is None else torch.tensor(shadow),
    )


def test_fixed():
    policy = Fixed(3, 2)
    assert policy.plan(session(0, 7)) == [(3, 2), (3, 2)]
    policy.observe(report([2, 2], [0, 2]))
    assert policy.plan(session(7)) == [(3, 2)]


def test_exit_layer_and_draft_length_are_short_for_fixed(trained_model):
    def counts(strategy):
        out = generate(trained_model(), [[3, 9, 21], [5]], strategy, max_new_tokens=10)
        return out.tokens, out.stats.rounds, out.stats.accepted_by_position

    assert counts(SelfSpeculative(2, 3)) == counts(SelfSpeculative(policy=Fixed(2, 3)))
    assert SelfSpeculative(2).draft_length == 4 and SelfSpeculative(2) == SelfSpeculative(2, 4)


def test_heuristic_by_hand():
    policy, text = Heuristic(2, length=3), session(5)
    assert policy.plan(text) == [(2, 3)]
    lengths = []
    for drafted, accepted in ((3, 3), (5, 4), (4, 0), (1, 1), (0, 0), (5, 0), (4, 0), (3, 0), (2, 0), (1, 0), (1, 0)):
        policy.observe(report([drafted], [accepted], rows=[5]))
        lengths += [length for _, length in policy.plan(text)]
    # All accepted (also of fewer than planned): 2 more. Nothing drafted, nothing learnt. Never below 1.
    assert lengths == [5, 4, 3, 5, 5, 4, 3, 2, 1, 1, 1]
    assert policy.plan(text.of(5, 6)) == [(2, 1), (2, 3)]  # row 6 has had no round
    assert policy.plan(session(5, 6)) == [(2, 3), (2, 3)]  # the rows of another text are others
    assert policy.should_stop(torch.tensor([0.39, 0.41]), 0).tolist() == [True, False]
    assert Heuristic(1).plan(session(0)) == [(1, 20)]


def test_draft_and_verify_by_hand():
    policy = DraftVerify(1, length=8)
    text = session(0)
    assert policy.plan(text) == [(1, 8)]
    assert policy.should_stop(torch.tensor([0.79, 0.81]), 3).tolist() == [True, False]
    thresholds = []
    # AR: 1, then (1 + 1/2) / 2 = 0.75, then (0.75 + 1) / 2 = 0.875, then 0.9375, then 0.96875.
    for drafted, accepted in ((8, 8), (4, 2), (3, 3), (2, 2), (8, 8), (0, 0)):
        policy.observe(report([drafted], [accepted]))
        thresholds.append(policy.thresholds[True])
        policy.plan(text)
    # All 8 drafted: as it was. Below 0.9: up by a tenth of 0.01, twice. Above, and stopped: down. All drafted; nothing.
    assert thresholds == pytest.approx([0.8, 0.801, 0.802, 0.801, 0.801, 0.801])
    given = DraftVerify(1, threshold=0.3)
    for greedy in (True, False):
        given.plan(session(0, greedy=greedy))
        assert given.should_stop(torch.tensor([0.29, 0.31]), 0).tolist() == [True, False]


def test_draft_and_verify_has_a_threshold_for_each_kind_of_text_and_keeps_it():
    def told(policy, greedy):
        """A text's two rounds, the second refused: AR = 1, then 1/2; by as much the threshold rises."""
        text = session(0, greedy=greedy)
        for accepted in (8, 0):
            policy.plan(text)
            policy.observe(report([8], [accepted]))

    policy = DraftVerify(1)
    told(policy, True)
    assert policy.thresholds == pytest.approx({True: 0.801, False: 0.5})
    told(policy, False)
    assert policy.should_stop(torch.tensor([0.5, 0.502]), 0).tolist() == [True, False]
    # The rate of the last text's row 0, 1/2, is not this one's: its first round is its own average, 1, and no rise.
    told(policy, True)
    assert policy.thresholds == pytest.approx({True: 0.802, False: 0.501})


def test_del_s_best_pair_by_formula():
    def promised(rate, layer, drafts, n_layers):
        return sum(rate**k for k in range(drafts + 1)) / (drafts * layer + n_layers)

    for rates in ([0.2, 0.5, 0.9, 1.0], [0.8, 0.8, 0.8, 1.0], [0.0, 0.3, 0.6, 1.0], [0.1, 0.1, 0.1, 1.0], [0.9, 0.95]):
        pairs = [(layer, drafts) for layer in range(1, len(rates)) for drafts in range(1, 6)]
        values = {pair: promised(rates[pair[0] - 1], *pair, len(rates)) for pair in pairs}
        best = max(values, key=values.get)
        assert best_pair(rates, 5) == (best if values[best] > 1 / len(rates) else (1, 0))
    assert best_pair([1.0], 5) == (1, 0)


def test_del_counts_up_to_the_first_mismatch():
    """3 layers; row 0 has the right text 5 6 7 8 and 2 of 3 drafts accepted, so that places 0, 1 and 2 count."""
    policy, text = DEL(decay=0.5), session(0, n_layers=3)
    assert policy.plan(text) == [best_pair([0.5] * 3, 8)]
    shadow = [[[5, 6, 0, 8], [0, 6, 7, 8], [5, 6, 7, 8]]]
    policy.observe(report([3], [2], tokens=[[5, 6, 7, 8]], shadow=shadow, confidences=[[0.9, 0.7, 0.2]]))
    assert policy.agreed[0] == [0.25 + 2, 0.25 + 2, 0.25 + 3] and policy.places[0] == 0.5 + 3
    assert policy.accepted == pytest.approx([1.6, 2]) and policy.refused == pytest.approx([0.2, 1])
    # The mean of 0.8 and 0.2.
    assert policy.should_stop(torch.tensor([0.49, 0.51]), 0).tolist() == [True, False]
    policy.observe(report([1], [1], tokens=[[5, 6]], shadow=[[[0, 0], [5, 6], [5, 6]]], confidences=[[0.5]]))
    assert policy.agreed[0] == [1.125, 1.125 + 2, 1.625 + 2] and policy.places[0] == 1.75 + 2
    assert policy.accepted == pytest.approx([0.8 + 0.5, 2]) and policy.refused == pytest.approx([0.1, 0.5])
    rates = [count / 3.75 for count in policy.agreed[0]]
    assert policy.plan(text) == [best_pair(rates, 8)]


def test_del_begins_a_text_with_what_all_rows_of_the_last_came_to():
    """Layers 1, 2, 3 of row 0 were right at 2, 2, 3 of 3 places, of row 1 at 0, 1, 1 of 1; each began with 1/2 of 1."""
    policy, text = DEL(decay=1.0), session(0, 1, n_layers=3)
    policy.plan(text)
    shadow = [[[5, 6, 0], [0, 6, 7], [5, 6, 7]], [[0, 0, 0], [5, 0, 0], [5, 0, 0]]]
    told = dict(tokens=[[5, 6, 7], [5, 0, 0]], shadow=shadow, confidences=[[0.9, 0.9], []])
    policy.observe(report([2, 0], [2, 0], **told))
    policy.plan(session(0, n_layers=3))
    assert policy.prior == pytest.approx([(2.5 + 0.5) / 6, (2.5 + 1.5) / 6, (3.5 + 1.5) / 6])
    assert policy.plan(session(0, 1, 2, n_layers=3)) == [best_pair(policy.prior, 8)] * 3
    # It weighs as much as one place: one more that is right at layers 2 and 3 makes it half of the counts.
    policy.observe(report([0], [0], tokens=[[5]], shadow=[[[0], [5], [5]]], rows=[2]))
    assert policy.agreed[2] == pytest.approx([3 / 6, 4 / 6 + 1, 5 / 6 + 1]) and policy.places == {2: 2.0}


def test_del_draws_no_line_before_it_has_seen_both():
    policy = DEL()
    policy.observe(report([1], [1], tokens=[[5, 6]], shadow=[[[5, 6]] * 3], confidences=[[0.9]]))
    assert policy.should_stop(torch.tensor([0.1]), 0) is False


def test_del_decodes_plainly_where_no_layer_is_ever_right(table_model):
    wrong = table_model(
        50,
        lambda tokens, positions: torch.nn.functional.one_hot(positions % 40, 50).float(),
        lambda tokens, positions: torch.nn.functional.one_hot(positions % 40 + 5, 50).float(),
    )
    policy = DEL(decay=0.5)
    out = generate(wrong, [[0]], SelfSpeculative(policy=policy), max_new_tokens=30)
    assert out.stats.accepted == 0 and 0 < out.stats.drafted < 20
    assert policy.plan(session(0)) == [(1, 0)]


class Clock:
    """Rounds of K drafts take seconds[K] and have tokens[K] tokens."""

    def __init__(self, policy, seconds, tokens, rows=1):
        self.policy, self.seconds, self.tokens, self.rows = policy, seconds, tokens, rows
        self.text = session(*range(rows))

    def lengths(self, count):
        """What is planned in so many rounds."""
        planned = []
        for _ in range(count):
            [(_, length), *_] = self.policy.plan(self.text)
            planned.append(length)
            accepted = [self.tokens[length] - 1] * self.rows
            self.policy.observe(report([length] * self.rows, accepted, seconds=self.seconds[length]))
        return planned


def test_cascade_climbs_to_the_best():
    """U(2) = 3 / 2, U(3) = 4 / 2.5, U(4) = 4.2 / 3: it falls, and 3 is best."""
    seconds, tokens = {0: 1.0, 2: 2.0, 3: 2.5, 4: 3.0}, {0: 1, 2: 3, 3: 4, 4: 4.2}
    clock = Clock(Cascade(1, start=2), seconds, tokens)
    assert clock.lengths(32) == [0] * 4 + [2] * 4 + [3] * 4 + [4] * 4 + [3] * 16
    assert clock.lengths(8 + 16) == [3] * 4 + [4] * 4 + [3] * 16  # the next climb begins at 3


def test_cascade_stops_climbing_after_its_trials():
    """U(K) = K: ever up, four times."""
    clock = Clock(
        Cascade(1, start=1), dict.fromkeys(range(9), 1.0), {0: 1} | {length: length for length in range(1, 9)}
    )
    assert clock.lengths(4 + 16 + 16) == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4 + [4] * 4 + [4] * 16
    assert clock.lengths(16 + 16)[-16:] == [7] * 16


def test_cascade_switches_itself_off_for_twice_as_long_each_time():
    """U(3) = 1/4, U(2) = 1/3, U(1) = 1/2, each below 1."""
    seconds = {0: 1.0, 1: 2.0, 2: 3.0, 3: 4.0}
    clock = Clock(Cascade(1, start=3), seconds, dict.fromkeys(range(4), 1))
    assert clock.lengths(16) == [0] * 4 + [3] * 4 + [2] * 4 + [1] * 4
    assert clock.lengths(16 + 4 + 32 + 4 + 64) == [0] * 16 + [1] * 4 + [0] * 32 + [1] * 4 + [0] * 64
    seconds[1] = 0.5  # now it pays; and what was doubled is forgotten
    assert clock.lengths(4 + 4) == [1] * 4 + [2] * 4
    assert clock.lengths(16) == [1] * 16


def test_cascade_knows_plain_time_by_its_median_and_skips_what_is_near_the_end():
    policy, text = Cascade(1, start=2, trial=3), session(0)
    for seconds in (50.0, 1.0, 1.0):  # the first was recorded
        assert policy.plan(text) == [(1, 0)]
        policy.observe(report([0], [0], seconds=seconds))
    for drafted in (2, 1, 2, 0, 2):  # U = 3 / 3: it goes on upwards, once three rounds were of length 2
        assert policy.plan(text) == [(1, 2)]
        policy.observe(report([drafted], [drafted], seconds=3.0))
    assert policy.plan(text) == [(1, 3)]


@pytest.mark.parametrize(
    ("seconds", "trials", "tried"),
    [({6: 6, 5: 5, 4: 4, 3: 3}, 4, [6, 5, 4, 3, 1]), ({3: 2}, 1, [3, 1]), ({4: 2, 3: 3}, 4, [4, 3, 1])],
    ids=["its trials are over", "it has but one", "it fell on the way down"],
)
def test_cascade_tries_one_draft_before_it_gives_up(seconds, trials, tried):
    """Rounds of one token, whose utilities are 1 / seconds; but U(1) = 1.2."""
    tokens = {0: 1.0, 1: 1.2} | dict.fromkeys(seconds, 1.0)
    clock = Clock(Cascade(1, start=max(seconds), trial=1, trials=trials, rounds=3), {0: 1.0, 1: 1.0} | seconds, tokens)
    assert clock.lengths(1 + len(tried) + 3) == [0, *tried, 1, 1, 1]


def test_cascade_tests_anew_for_another_number_of_rows_whose_plain_seconds_it_does_not_know():
    policy = Cascade(1, start=2, trial=2)
    three = Clock(policy, {0: 1.0, 2: 1.0}, {0: 1, 2: 3}, rows=3)
    assert three.lengths(3) == [0, 0, 2]
    two = Clock(policy, {0: 1.0, 2: 1.0}, {0: 1, 2: 3}, rows=2)
    two.text = three.text.of(0, 1)
    assert two.lengths(3) == [0, 0, 2]
    assert Clock(policy, {2: 1.0, 3: 1.0}, {2: 3, 3: 4}, rows=3).lengths(3) == [2, 2, 3]  # they are known


@pytest.mark.parametrize("rows", [1, 2])
def test_cascade_forgets_with_the_text_or_its_rows_what_it_had_given_up(rows):
    """Off for 16 rounds, then 32; then comes a text, or fewer rows, for which drafts pay."""
    policy = Cascade(1, start=2, trial=1)
    never = Clock(policy, {0: 1.0, 1: 2.0, 2: 3.0}, dict.fromkeys(range(3), 1), rows=2)
    assert never.lengths(3 + 16 + 1 + 30) == [0, 2, 1] + [0] * 16 + [1] + [0] * 30
    pays = Clock(policy, {0: 1.0, 2: 2.0, 3: 2.5, 4: 3.0}, {0: 1, 2: 3, 3: 4, 4: 4.2}, rows=rows)
    if rows == 1:
        pays.text = never.text.of(0)
        assert pays.lengths(1) == [0]  # a plain round of one row was not measured yet
    assert pays.lengths(19) == [2, 3, 4] + [3] * 16


@pytest.mark.parametrize(("make", "serves"), [(lambda: Heuristic(1, length=2), False), (lambda: DEL(length=3), True)])
def test_what_the_next_text_begins_with(trained_model, make, serves):
    policy = make()
    strategy = SelfSpeculative(policy=policy)
    seen = []
    policy.plan, plan = lambda session: seen.append(plan(session)) or seen[-1], policy.plan
    generate(trained_model(), [[5]], strategy, max_new_tokens=12)
    assert seen[0] == make().plan(session(0, n_layers=3)) != seen[-2]
    del seen[:]
    generate(trained_model(), [[4]], strategy, max_new_tokens=3)
    assert (seen[0] != make().plan(session(0, n_layers=3))) == serves


def test_the_readme_s_own_policy_works(trained_model):
    section = README.read_text(encoding="utf-8").split("## A drafting policy of your own")[1].split("\n## ")[0]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL).group(1)
    names = {"model": trained_model(max_seq_len=60), "prompts": [[3, 9, 21], [5]]}
    exec(code, names)
    assert len(code.strip().splitlines()) <= 25
    plain = generate(names["model"], names["prompts"], max_new_tokens=32)
    assert names["out"].tokens == plain.tokens and names["out"].stats.accepted > 0


def test_a_rest_is_so_many_plain_steps_and_ends_with_a_row(trained_model, monkeypatch):
    """The policy is asked after them, and not before; a number of rows that it has not seen it is asked about."""

    class Rests(Fixed):
        def rests(self, session):
            asked.append((len(session.row_numbers), session.remaining[0]))
            return self.draft_length

        def rested(self, rows, seconds):
            timed.append((rows, seconds > 0))

    asked, timed = [], []
    model, prompts = trained_model(), [[3, 9, 21], [5]]
    plain = generate(model, prompts, max_new_tokens=10)
    out = generate(model, prompts, SelfSpeculative(policy=Rests(1, 4)), max_new_tokens=10)
    assert out.tokens == plain.tokens and asked == [(2, 10), (2, 6), (2, 2)] and timed == [(2, True)] * 3
    asked.clear()
    ends = plain.tokens[0][5]  # one row's text ends here, the other's goes on, mostly
    out = generate(model, prompts, SelfSpeculative(policy=Rests(1, 4)), max_new_tokens=10, stop_tokens=[ends])
    assert out.tokens == generate(model, prompts, max_new_tokens=10, stop_tokens=[ends]).tokens
    lengths = sorted(map(len, out.tokens))
    assert lengths[0] < lengths[1], "or this shows nothing"
    assert (1, 10 - lengths[0] - 1) in asked
