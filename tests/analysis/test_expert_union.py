"""expert_union counts the experts that adjacent rows need together, against a slow loop and where they are known."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from layerskip_moe.analysis import expert_union
from layerskip_moe.analysis.expert_union import independent_union

TOLD = dict(seq_len=6, batch_size=4, progress=False)


def test_against_a_slow_loop(decoder, tokens):
    model, text = decoder(n_layers=4, moe_layers="every other", num_experts=6), tokens(60)
    union = expert_union(model, text, (1, 2, 5, 6), **TOLD)
    sizes = {layer: {span: [] for span in (1, 2, 5, 6)} for layer in (1, 3)}
    with torch.no_grad():
        for start in range(0, 54, 6):  # 9 windows: two batches of 4 and one of 1
            inputs = text[start : start + 6][None]
            out = model.eval().run(model.embed(inputs), range(4), positions=torch.arange(6)[None])
            for layer, routing in out.routing.items():
                rows = [set(row) for row in routing.chosen.tolist()]
                for span, found in sizes[layer].items():
                    found += [len(set().union(*rows[at : at + span])) for at in range(6 - span + 1)]
    means = {layer: [sum(found) / len(found) for found in spans.values()] for layer, spans in sizes.items()}
    assert union.tokens == 54 and union.spans == [1, 2, 5, 6]
    for layer in (1, 3):
        assert union.experts[layer] == pytest.approx(means[layer], rel=1e-12)
    over = [(one + three) / 2 / 2 for one, three in zip(means[1], means[3], strict=True)]
    assert union.over_top_k == pytest.approx(over, rel=1e-12)
    assert union.over_top_k[0] == 1.0 and sorted(union.over_top_k) == union.over_top_k


def test_rows_that_always_choose_the_same_need_no_more_than_one(decoder, tokens):
    model = decoder(bias_balancing=True)
    for block in model.blocks:
        block.mlp.router.balance_bias.copy_(torch.tensor([0.0, 5.0, 0.0, 5.0]))
    union = expert_union(model, tokens(31), **TOLD | dict(seq_len=10))
    assert union.over_top_k == [1.0, 1.0, 1.0] and union.experts[0] == [2.0, 2.0, 2.0]


def test_only_so_many_windows_are_read_and_the_mode_is_put_back(decoder, tokens):
    model = decoder().train()
    union = expert_union(model, tokens(61), (3,), **TOLD, max_windows=2)
    assert union == expert_union(model, tokens(61)[:13], (3,), **TOLD) and union.tokens == 12
    assert all(module.training for module in model.modules())


def test_a_dense_model_has_no_experts_to_count(decoder, tokens):
    union = expert_union(decoder(num_experts=0), tokens(31), (2, 4), **TOLD)
    assert (union.experts, union.over_top_k, union.independent) == ({}, [], [])


@pytest.mark.parametrize("spans", [(), (0,), (2, 7), (2.0,), (True,)])
def test_spans_that_no_window_has_are_refused(decoder, tokens, spans):
    with pytest.raises(ValueError, match=r"spans=.* must be whole numbers from 1 to seq_len=6"):
        expert_union(decoder(), tokens(31), spans, **TOLD)


def test_independent_routing_by_hand():
    # moe.md's figures for E=8, K=2: 3.5 experts of 2 rows, 6.1 of 5
    assert independent_union(1, 8, 2) == 1
    assert 2 * independent_union(2, 8, 2) == 3.5
    assert 2 * independent_union(5, 8, 2) == pytest.approx(6.1, abs=0.01)


@given(st.integers(1, 40), st.integers(1, 64), st.data())
def test_independent_routing_needs_between_one_rows_experts_and_all(span, num_experts, data):
    top_k = data.draw(st.integers(1, num_experts))
    union = independent_union(span, num_experts, top_k)
    assert 1 - 1e-9 <= union <= min(span, num_experts / top_k) + 1e-9
