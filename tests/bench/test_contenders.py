"""Costs of both kinds of drafts, which policies are compared by."""

import math

import pytest

from layerskip_moe.bench import contenders
from layerskip_moe.generation import fit_cost_model
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
    cost, int8_cost = contenders.fit_costs(model)
    assert int8_cost is None and not cost.int8_drafts, "where `Adaptive` would make no copies"


@pytest.mark.skipif(not has_kernels(), reason="int8 drafts are made by kernels")
def test_what_a_policy_asks_for_takes_time(small_model, monkeypatch):
    monkeypatch.setattr(contenders, "_SECONDS", 0.5)
    monkeypatch.setattr(fit_cost_model, "_AT_MOST", math.inf)  # however busy the machine is
    cost, int8_cost = contenders.fit_costs(small_model())
    asked = dict(stops=True, made=3, shadow=0), dict(stops=False, made=3, shadow=12)
    assert all(cost.asking_seconds(**some) > 0 for some in asked)
    assert cost.asking_seconds(stops=False, made=3, shadow=0) == 0.0
    assert int8_cost.asking_seconds(**asked[0]) == 0.0 < int8_cost.asking_seconds(**asked[1]), "int8 drafts do not stop"
