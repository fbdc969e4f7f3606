"""`speculate`: a round in one call is what drafting, decoding and choosing one after the other are."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from layerskip_moe.bench.rounds import repeated_tokens
from layerskip_moe.nn import KVCache, few_rows, rounds
from layerskip_moe.nn.compiling import compiling
from layerskip_moe.nn.drafts import choose_draft
from layerskip_moe.nn.int8_copies import int8_copies
from layerskip_moe.nn.kernels import has_kernels
from layerskip_moe.nn.ragged import MOST_PER_REPEATED, MarginRule, Stage
from layerskip_moe.nn.rounds import speculate
from layerskip_moe.pretrained import quantize


@pytest.fixture(
    scope="module",
    params=[{}, {"num_experts": 0}, {"router_average": 0.5}, {"sliding_window": 3, "router_hold": 2}],
    ids=str,
)
def model(request, tiny_model):
    return tiny_model(torch.float32, n_layers=4, **request.param)


@torch.no_grad()
def begun(model, rows):
    """A cache whose rows have texts of different lengths."""
    cache, text = KVCache(model.config, rows, 16), torch.arange(4 * rows).view(rows, 4) % 23
    model.run(model.embed(text), range(4), positions=torch.arange(4).expand(rows, 4), cache=cache)
    cache.extend(torch.arange(rows) % 3 + 1)
    return cache


def by_hand(model, cache, newest, exit_layer, noise, limits, positions, drafter=None):
    """Tokens of the full model, drafts, states and drafts' margins, row by row, each by one call of `run` for each, and
    how near the drafts' routers were to other experts, and other tokens to the two that are weighed again. Of another
    drafter all that is left are its drafts, and of two that say most by it the model's own head decides."""
    drafter = drafter or model
    drafts, tokens, states, margins, gaps = [], [], [], [], []
    for row, limit in enumerate(limits):
        part, token, said, sure = cache.subset(torch.tensor([row])), newest[row : row + 1], [], []
        for place in range(limit):
            at = positions[row : row + 1, place : place + 1]
            run = drafter.run(drafter.embed(token), range(exit_layer), positions=at, cache=part)
            ordered = [routing.logits.sort(descending=True).values for routing in run.routing.values()]
            gaps += [float((logits[:, 1] - logits[:, 2]).min()) for logits in ordered]  # (two are chosen)
            scores = drafter.unembed(run.hidden)[0, 0].double() + (0 if noise is None else noise[row, place])
            largest, weighed = scores.topk(3)
            if drafter is not model:
                gaps.append(float(largest[1] - largest[2]))
                exact = model.unembed(run.hidden)[0, 0].double() + (0 if noise is None else noise[row, place])
                largest, order = exact[weighed[:2]].sort(descending=True)
                weighed = weighed[order]
            token = weighed[:1, None]
            said.append(int(token))
            sure.append(float(largest[0] - largest[1]))
        text = torch.tensor([[int(newest[row]), *said]])
        run = model.run(
            model.embed(text), range(4), positions=positions[row : row + 1, : limit + 1], cache=part, collect=range(4)
        )
        scores = model.unembed(run.hidden)[0].double() + (0 if noise is None else noise[row, : limit + 1])
        drafts.append(said)
        margins.append(sure)
        tokens.append(scores.argmax(dim=-1).tolist())
        states.append(torch.stack([run.collected[layer][0] for layer in range(4)]))
    return tokens, drafts, torch.cat(states, dim=1), margins, gaps


@settings(deadline=None, max_examples=25)
@given(
    data=st.data(),
    rows=st.integers(1, 3),
    exit_layer=st.integers(1, 4),
    longest=st.integers(1, 5),
    temperature=st.sampled_from([0.0, 0.7]),
    int8=st.booleans(),
    seed=st.integers(0, 999),
)
def test_one_call_is_many(model, data, rows, exit_layer, longest, temperature, int8, seed):
    limits = data.draw(st.lists(st.integers(0, longest), min_size=rows, max_size=rows), "limits")
    limits[seed % rows] = longest
    collect = data.draw(st.lists(st.sampled_from(range(4)), unique=True).map(sorted), "collect")
    generator = torch.Generator().manual_seed(seed)
    newest = torch.randint(23, (rows, 1), generator=generator)
    noise = temperature * torch.randn(rows, longest + 1, 23, generator=generator).double() if temperature else None
    how = dict(noise=noise, limits=limits, collect=collect, choices=model.config.num_experts > 0)
    with torch.no_grad():
        cache = begun(model, rows)
        positions = cache.lengths[:, None] + torch.arange(longest + 1)
        drafter = quantize(model, "int8") if int8 else model
        tokens, drafts, states, margins, gaps = by_hand(
            model, cache, newest, exit_layer, noise, limits, positions, drafter
        )
        near = 1e-3 if int8 else 1e-5  # (by int8 copies, states are rounded, too)
        assume(not int8 or min((margin for row in margins for margin in row), default=1.0) > near)
        assume(not int8 or min(gaps, default=1.0) > near)  # (where it is not, either may read another expert)
        for compiled in (True, True) if int8 else (False, True, True):  # (the second time from a recording)
            with compiling(model, compiled):
                copies = int8_copies(model) if int8 else None
                done = speculate(model, newest, exit_layer, positions=positions, cache=cache, copies=copies, **how)
            for row, limit in enumerate(limits):
                assert done.tokens[row, : limit + 1].tolist() == tokens[row]
                assert done.drafts[row, :limit].tolist() == drafts[row]
                if done.margins is not None:
                    assert done.margins[row, :limit].tolist() == pytest.approx(margins[row], abs=near)
                right = [one == other for one, other in zip(drafts[row], tokens[row], strict=False)]
                assert done.accepted[row] == [*right, False].index(False)
            assert sorted(done.collected) == collect
            for layer in collect:
                torch.testing.assert_close(done.collected[layer], states[layer])
            routed = range(0 if int8 else exit_layer, 4) if how["choices"] else range(0)
            assert {layer: experts.shape[0] for layer, experts in done.chosen.items()} == dict.fromkeys(
                routed, sum(limits) + rows
            )


@settings(deadline=None, max_examples=40)
@given(
    longest=st.integers(1, 11),
    exit_layer=st.integers(2, 4),
    proposing=st.integers(1, 3),
    temperature=st.sampled_from([0.0, 0.7]),
    least=st.sampled_from([None, 0.0, 0.2, 0.9]),
    sure=st.sampled_from([0.0, 0.05, 0.3, math.inf]),
    lookup=st.integers(0, 3),
    seed=st.integers(0, 999),
)
def test_drafts_in_stages_are_the_same_drafts(
    model, longest, exit_layer, proposing, temperature, least, sure, lookup, seed
):
    """To the last bit, in fewer runs of the later layers."""
    assume(proposing < exit_layer)
    generator = torch.Generator().manual_seed(seed)
    newest = torch.randint(23, (1, 1), generator=generator)
    noise = temperature * torch.randn(1, longest + 1, 23, generator=generator).double() if temperature else None
    rule = None if least is None else MarginRule([0.2], least)
    with torch.no_grad(), compiling(model):
        cache, copies = begun(model, 1), int8_copies(model)
        if copies is None:  # (without a C++ compiler)
            return
        positions = cache.lengths[:, None] + torch.arange(longest + 1)
        how = dict(positions=positions, cache=cache, noise=noise, limits=[longest], rule=rule, copies=copies)
        whole = speculate(model, newest, exit_layer, **how)
        # A text in which some of the drafts are found, and some are not.
        history = torch.cat([newest[0], whole.drafts[0, : longest // 2], torch.arange(5), newest[0]])
        for _ in range(2):
            stage = Stage(proposing, sure, lookup, sure_lookup=0)
            done = speculate(model, newest, exit_layer, stage=stage, history=history, **how)
            assert (done.drafted, done.accepted) == (whole.drafted, whole.accepted) and whole.staged is None
            made = min(done.drafted[0] + 1, longest) if rule is not None else longest
            assert done.drafts[0, :made].tolist() == whole.drafts[0, :made].tolist()
            assert done.margins[0, :made].tolist() == whole.margins[0, :made].tolist()
            assert done.tokens[0, : done.drafted[0] + 1].tolist() == whole.tokens[0, : done.drafted[0] + 1].tolist()
            assert done.staged.places >= made >= done.staged.choosing
            assert done.staged.places >= done.staged.proposing >= done.staged.choosing
            if not lookup and sure == math.inf:
                assert done.staged[:4] == (proposing, made, made, made)
            assert done.staged.choosing <= done.staged.heads <= done.staged.proposing + done.staged.choosing
            if not lookup and sure == 0.0:  # every proposal is followed, up to 8 at a time
                assert done.staged.choosing <= -(-made // 8) + sum(whole_differs(done, model, proposing, how, newest))


@settings(deadline=None, max_examples=40)
@given(
    text=st.lists(st.integers(0, 2), min_size=1, max_size=30),
    longest=st.integers(1, 14),
    sure_lookup=st.integers(1, 6),
    least=st.sampled_from([None, 0.0, 0.5]),
    temperature=st.sampled_from([0.0, 0.7]),
)
def test_what_is_looked_up_ends_the_round(model, text, longest, sure_lookup, least, temperature):
    """As it followed before, behind drafts that are those of a round without it; and it is verified as others are."""
    newest = torch.tensor([text[-1:]])
    noise = temperature * torch.randn(1, longest + 1, 23, generator=torch.Generator().manual_seed(len(text))).double()
    with torch.no_grad(), compiling(model):
        cache, copies = begun(model, 1), int8_copies(model)
        if copies is None:  # (without a C++ compiler)
            return
        positions = cache.lengths[:, None] + torch.arange(longest + 1)
        rule = None if least is None else MarginRule([0.2], least)
        how = dict(positions=positions, cache=cache, noise=noise, limits=[longest], rule=rule, copies=copies)
        whole = speculate(model, newest, 3, **how)
        stage = Stage(1, 0.1, 1, sure_lookup)
        done = speculate(model, newest, 3, stage=stage, history=torch.tensor(text), **how)
        [looked_up], kept = done.looked_up, done.drafted[0]
        asked = kept - looked_up
        drafts = done.drafts[0, :kept].tolist()
        assert drafts[:asked] == whole.drafts[0, :asked].tolist()
        assert done.margins[0, :asked].tolist() == whole.margins[0, :asked].tolist()
        assert done.margins[0, asked:kept].isnan().all()
        if not looked_up:
            assert kept == whole.drafted[0]
            return
        before = text + drafts[:asked]
        length, _ = repeated_tokens([*before, *drafts[asked:]], len(before), 1)
        assert length >= sure_lookup and looked_up == min(longest - asked, MOST_PER_REPEATED * length)
        assert repeated_tokens([*before, *drafts[asked:]], len(before), 1) == (length, looked_up)
        tokens = torch.cat([newest, done.drafts[:, :kept]], dim=1)
        _, logits = model.decode(tokens, range(4), positions=positions[:, : kept + 1], cache=cache)
        expected = (logits + noise[:, : kept + 1]).argmax(dim=-1)[0].tolist()
        assert done.tokens[0, : kept + 1].tolist() == expected
        assert done.accepted == [
            [*(one == other for one, other in zip(drafts, expected, strict=False)), False].index(False)
        ]


def test_text_that_repeats_itself_proposes(model):
    """What followed its last tokens before is run over at once; where it is right, a run makes several drafts."""
    with torch.no_grad(), compiling(model):
        cache, copies = begun(model, 1), int8_copies(model)
        if copies is None:
            return
        how = dict(
            positions=cache.lengths[:, None] + torch.arange(12), cache=cache, noise=None, limits=[11], copies=copies
        )
        newest, end = torch.tensor([[3]]), torch.tensor([7, 3])  # the last tokens of the text
        drafts = speculate(model, newest, 4, **how).drafts[0]
        right, wrong = torch.cat([end, drafts]), torch.cat([end, (drafts + 1) % 23])
        counts = []
        for text, lookup in ((right, 2), (wrong, 2), (right, 0)):
            history = torch.cat([text, end])
            done = speculate(model, newest, 4, stage=Stage(2, math.inf, lookup), history=history, **how)
            assert done.drafts[0].tolist() == drafts.tolist()
            counts.append(done.staged)
        assert counts[0].choosing <= 1 + 3, "8 drafts by the first run"
        assert counts[2] == (2, 11, 11, 11, 11 + 10, 0)
        assert counts[1].places > counts[0].places, "a wrong proposal was run over for nothing"


def whole_differs(done, model, proposing, how, newest):
    """At which of the drafts the layers that propose would say something else, one by one."""
    drafts = done.drafts[0].tolist()
    with few_rows.reading(how["copies"].parts), compiling(model, False):
        text, cache = torch.cat([newest, done.drafts], dim=1), how["cache"]
        hidden = model.run(model.embed(text), range(proposing), positions=how["positions"], cache=cache).hidden
        said, _ = choose_draft(model, hidden[0], None if how["noise"] is None else how["noise"][0, : hidden.shape[1]])
    return [one != draft for one, draft in zip(said.tolist(), drafts, strict=False)]


@settings(deadline=None, max_examples=40)
@given(
    data=st.data(),
    rows=st.integers(1, 3),
    longest=st.integers(1, 5),
    temperature=st.sampled_from([0.0, 0.7]),
    least=st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0]),
    seed=st.integers(0, 999),
)
def test_a_row_drafts_no_more_where_it_is_unsure(model, data, rows, longest, temperature, least, seed):
    """What a rule keeps is verified, as where no more was ever wanted."""
    limits = data.draw(st.lists(st.integers(0, longest), min_size=rows, max_size=rows), "limits")
    limits[seed % rows] = longest
    halves = data.draw(st.lists(st.floats(0.01, 1.0), min_size=rows, max_size=rows), "halves")
    generator = torch.Generator().manual_seed(seed)
    newest = torch.randint(23, (rows, 1), generator=generator)
    noise = temperature * torch.randn(rows, longest + 1, 23, generator=generator).double() if temperature else None
    with torch.no_grad():
        cache = begun(model, rows)
        how = dict(positions=cache.lengths[:, None] + torch.arange(longest + 1), cache=cache, noise=noise)
        with compiling(model):
            whole = speculate(model, newest, 2, limits=limits, **how)
        if whole.margins is None:  # (without a C++ compiler no round is one call)
            return
        kept = []
        for margins, half, limit in zip(whole.margins.tolist(), halves, limits, strict=True):
            right = torch.tensor(
                [1 - 2 ** -((margin / half) ** 0.5) for margin in margins[:limit]], dtype=torch.float64
            )
            kept.append(int((right.cumprod(0) >= least).sum()))
        expected = speculate(model, newest, 2, limits=kept, **how) if any(kept) else None
        aside = speculate(model, newest, 2, limits=limits, rule=MarginRule(halves, least), **how)
        assert aside.margins is None and (aside.drafted, aside.accepted) == (limits, whole.accepted), "not one call"
        for _ in range(2):
            with compiling(model):
                done = speculate(model, newest, 2, limits=limits, rule=MarginRule(halves, least), **how)
            assert done.drafted == kept and MarginRule(halves, least).kept(whole.margins, limits) == kept
            for row, (limit, count) in enumerate(zip(limits, kept, strict=True)):
                made = min(count + 1, limit)
                assert done.drafts[row, :made].tolist() == whole.drafts[row, :made].tolist()
                assert done.margins[row, :made].tolist() == whole.margins[row, :made].tolist()
                assert done.tokens[row, : count + 1].tolist() == whole.tokens[row, : count + 1].tolist()
            assert expected is None or done.accepted == expected.accepted


needs_kernels = pytest.mark.skipif(not has_kernels(), reason="there is no C++ compiler")


@pytest.fixture
def in_two_steps(monkeypatch):
    """Grows by one with each round that is not one call."""
    calls, original = [], rounds._in_two_steps
    monkeypatch.setattr(rounds, "_in_two_steps", lambda *some, **more: calls.append(1) or original(*some, **more))
    return calls


@needs_kernels
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", [{}, {"sliding_window": 3}], ids=str)
def test_a_recording_serves_the_rows_that_stay(tiny_model, in_two_steps, dtype, sizes):
    """Made with seven rows, repeated with two of them in another order, and with one."""
    model, ways = tiny_model(dtype, n_layers=4, **sizes), []
    for compiled in (False, True):
        cache = KVCache(model.config, 7, 16, dtype=dtype)
        text = torch.arange(28).view(7, 4) % 23
        model.run(model.embed(text), range(4), positions=torch.arange(4).expand(7, 4), cache=cache)
        cache.extend(torch.arange(7) % 3 + 1)
        found = []
        with compiling(model, compiled):
            for stays in (range(7), [5, 2], [1]):
                cache.select(torch.tensor(list(stays)))
                newest = cache.rows[:, None] + 3
                positions = cache.lengths[:, None] + torch.arange(4)
                limits = [3, 1, 2, 3, 0, 3, 2][: len(newest)]
                done = speculate(model, newest, 2, positions=positions, cache=cache, noise=None, limits=limits)
                there = [done.tokens[row, : limit + 1].tolist() for row, limit in enumerate(limits)]
                found.append((there, done.accepted))
                cache.extend(torch.tensor(done.accepted) + 1)
        ways.append(found)
    assert ways[0] == ways[1] and len(in_two_steps) == 3


@needs_kernels
@torch.no_grad()
@pytest.mark.parametrize(("rows", "one_call"), [(16, True), (17, False)])
def test_up_to_64_places_are_one_call(tiny_model, in_two_steps, rows, one_call):
    model = tiny_model(torch.float32, n_layers=4)
    cache, newest = begun(model, rows), torch.arange(rows)[:, None] % 23
    positions = cache.lengths[:, None] + torch.arange(4)
    with compiling(model):
        done = speculate(model, newest, 2, positions=positions, cache=cache, noise=None, limits=[3] * rows)
    assert len(in_two_steps) == (not one_call)
    tokens, drafts, *_ = by_hand(model, begun(model, rows), newest, 2, None, [3] * rows, positions)
    assert done.drafts.tolist() == drafts
    assert done.tokens.tolist() == tokens


@torch.no_grad()
def test_what_cannot_be_recorded_is_right_all_the_same(tiny_model, in_two_steps):
    model = tiny_model(torch.float32, n_layers=4, clip_qkv=0.5)
    cache, newest = begun(model, 2), torch.tensor([[3], [9]])
    positions = cache.lengths[:, None] + torch.arange(4)
    with compiling(model):
        for count in (1, 2):
            done = speculate(model, newest, 2, positions=positions, cache=cache, noise=None, limits=[3, 2])
            assert len(in_two_steps) == count
    tokens, drafts, *_ = by_hand(model, begun(model, 2), newest, 2, None, [3, 2], positions)
    assert [done.tokens[0].tolist(), done.tokens[1, :3].tolist()] == tokens
    assert [done.drafts[0].tolist(), done.drafts[1, :2].tolist()] == drafts
