"""Costs of both kinds of drafts, which policies are compared by."""

import pytest

from layerskip_moe.bench import contenders
from layerskip_moe.nn.kernels import has_kernels


@pytest.mark.skipif(not has_kernels(), reason="int8 drafts are made by kernels")
def test_plain_decoding_takes_as_long_by_both_cost_models(small_model, monkeypatch):
    monkeypatch.setattr(contenders, "_SECONDS", 0.3)
    model = small_model()
    cost, int8_cost = contenders.fit_costs(model)
    assert cost.is_of(model.config) and int8_cost.is_of(model.config)
    assert int8_cost.int8_drafts and not cost.int8_drafts
    assert cost.round_seconds([0], [0]) == pytest.approx(int8_cost.round_seconds([0], [0]))
    assert not model.compiled
    monkeypatch.setattr(contenders, "are_made_unasked", lambda model: False)
    assert contenders.fit_costs(model) == (cost, None), "where `Adaptive` would make no copies"
