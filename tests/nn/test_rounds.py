"""`speculate`: a round in one call is what drafting, decoding and choosing one after the other are."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layerskip_moe.nn import KVCache, rounds
from layerskip_moe.nn.compiling import compiling
from layerskip_moe.nn.kernels import has_kernels
from layerskip_moe.nn.rounds import speculate


@pytest.fixture(scope="module", params=[{}, {"num_experts": 0}, {"router_average": 0.5}], ids=str)
def model(request, tiny_model):
    return tiny_model(torch.float32, n_layers=4, **request.param)


@torch.no_grad()
def begun(model, rows):
    """A cache whose rows have texts of different lengths."""
    cache, text = KVCache(model.config, rows, 16), torch.arange(4 * rows).view(rows, 4) % 23
    model.run(model.embed(text), range(4), positions=torch.arange(4).expand(rows, 4), cache=cache)
    cache.extend(torch.arange(rows) % 3 + 1)
    return cache


def by_hand(model, cache, newest, exit_layer, noise, limits, positions):
    """Tokens of the full model and drafts, row by row, each by one call of `run` for each."""
    drafts, tokens, states = [], [], []
    for row, limit in enumerate(limits):
        part, token, said = cache.subset(torch.tensor([row])), newest[row : row + 1], []
        for place in range(limit):
            run = model.run(
                model.embed(token), range(exit_layer), positions=positions[row : row + 1, place : place + 1], cache=part
            )
            scores = model.unembed(run.hidden)[0, 0].double() + (0 if noise is None else noise[row, place])
            token = scores.argmax()[None, None]
            said.append(int(token))
        text = torch.tensor([[int(newest[row]), *said]])
        run = model.run(
            model.embed(text), range(4), positions=positions[row : row + 1, : limit + 1], cache=part, collect=range(4)
        )
        scores = model.unembed(run.hidden)[0].double() + (0 if noise is None else noise[row, : limit + 1])
        drafts.append(said)
        tokens.append(scores.argmax(dim=-1).tolist())
        states.append(torch.stack([run.collected[layer][0] for layer in range(4)]))
    return tokens, drafts, torch.cat(states, dim=1)


@settings(deadline=None, max_examples=25)
@given(
    data=st.data(),
    rows=st.integers(1, 3),
    exit_layer=st.integers(1, 4),
    longest=st.integers(1, 5),
    temperature=st.sampled_from([0.0, 0.7]),
    seed=st.integers(0, 999),
)
def test_one_call_is_many(model, data, rows, exit_layer, longest, temperature, seed):
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
        tokens, drafts, states = by_hand(model, cache, newest, exit_layer, noise, limits, positions)
        for compiled in (False, True, True):  # (the second time from a recording)
            with compiling(model, compiled):
                done = speculate(model, newest, exit_layer, positions=positions, cache=cache, **how)
            assert done.drafted == limits
            for row, limit in enumerate(limits):
                assert done.tokens[row, : limit + 1].tolist() == tokens[row]
                assert done.drafts[row, :limit].tolist() == drafts[row]
                right = [one == other for one, other in zip(drafts[row], tokens[row], strict=False)]
                assert done.accepted[row] == [*right, False].index(False)
            assert sorted(done.collected) == collect
            for layer in collect:
                torch.testing.assert_close(done.collected[layer], states[layer])
            routed = range(exit_layer, 4) if how["choices"] else range(0)
            assert {layer: experts.shape[0] for layer, experts in done.chosen.items()} == dict.fromkeys(
                routed, sum(limits) + rows
            )


@pytest.mark.skipif(not has_kernels(), reason="there is no C++ compiler")
@torch.no_grad()
def test_drafts_that_are_given_up_are_given_up_in_either_way(tiny_model, monkeypatch):
    model = tiny_model(torch.float32, n_layers=4)
    noise = torch.randn(3, 6, 23, generator=torch.Generator().manual_seed(1)).double()
    how = dict(noise=noise, limits=[5, 3, 0], floors=[0.2, 0.05, 0.5], temperature=0.7)
    found, calls = [], []
    original = rounds._in_two_steps
    monkeypatch.setattr(rounds, "_in_two_steps", lambda *some, **more: calls.append(1) or original(*some, **more))
    for compiled in (False, True):
        cache = begun(model, 3)
        positions = cache.lengths[:, None] + torch.arange(6)
        with compiling(model, compiled):
            done = speculate(model, torch.tensor([[3], [9], [4]]), 2, positions=positions, cache=cache, **how)
        there = [done.tokens[row, : count + 1].tolist() for row, count in enumerate(done.drafted)]
        found.append((there, done.drafted, done.accepted))
        for row, limit in enumerate(how["limits"]):
            kept = done.certainties[row, : min(done.drafted[row] + 1, limit)].double().cumprod(0)
            assert all(kept[: done.drafted[row]] >= how["floors"][row])
            assert done.drafted[row] == limit or kept[-1] < how["floors"][row]
    assert found[0] == found[1] and len(calls) == 1, "the second in one call"
