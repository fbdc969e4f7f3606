"""Layer and expert dropout: rates against the paper's formula, draws against the rates."""

import logging
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from layerskip_moe.quiet_import import quiet_import
from layerskip_moe.training.expert_dropout import expert_mask
from layerskip_moe.training.layer_dropout import (
    BLOCK_STREAM,
    EXPERT_SUBLAYER_STREAM,
    layer_dropout_rates,
    layer_keep,
)
from layerskip_moe.training.torchtune_parts import _get_scale, scale

# Statistical tests compare a z-score with this bound: a correct implementation fails one comparison in
# 2 million (two-sided normal tail at 5; about 100 are made), and the seeds are fixed.
Z = 5.0


def z_score(hits, n, p):
    return (hits - n * p) / math.sqrt(n * p * (1 - p))


def correlation_z(a, b):
    """z-score of the correlation of two boolean samples of equal size, standard normal if independent."""
    a, b = a.double().flatten(), b.double().flatten()
    return (torch.corrcoef(torch.stack([a, b]))[0, 1] * math.sqrt(len(a))).item()


@pytest.mark.parametrize("step", [0, 3, 9])
def test_rates_are_the_papers_formula(step):
    T, L, p_max = 10, 6, 0.2
    S = math.exp(step * math.log(2) / (T - 1)) - 1
    D = [math.exp(layer * math.log(2) / (L - 1)) - 1 for layer in range(L)]
    rates = layer_dropout_rates(step, T, L, p_max=p_max)
    assert rates.dtype == torch.float64
    assert rates.tolist() == pytest.approx([S * d * p_max for d in D], abs=1e-15)
    continual = layer_dropout_rates(step, T, L, p_max=p_max, time="uniform")
    assert continual.tolist() == pytest.approx([d * p_max for d in D], abs=1e-15)


def test_every_shape_is_its_documented_formula():
    x = 3 / 8
    values = {kind: scale(kind, 8, 3) for kind in ("uniform", "exp", "linear", "log", "sin", "sigmoid")}
    assert values == pytest.approx(
        {
            "uniform": 1.0,
            "exp": 2**x - 1,
            "linear": x,
            "log": math.log(4) / math.log(9),
            "sin": math.sin(math.pi * x / 2),
            "sigmoid": 1 / (1 + math.exp(-10 * (x - 0.5))),
        }
    )
    assert scale("linear", 8, 8) == scale("linear", 8, 20) == 1.0


def test_one_layer_or_one_step_does_not_divide_by_zero():
    assert layer_dropout_rates(5, 10, 1, p_max=0.5).tolist() == [0.0]
    assert layer_dropout_rates(0, 1, 4, p_max=0.5).tolist() == [0.0] * 4
    assert layer_dropout_rates(0, 1, 3, p_max=0.5, time="uniform")[-1].item() == 0.5
    assert layer_dropout_rates(0, 1, 1, p_max=0.5, time="uniform", depth="uniform").tolist() == [0.5]


@pytest.mark.parametrize(
    "change",
    [
        {"step": 10}, {"step": -1}, {"n_layers": 0}, {"p_max": 1.5}, {"p_max": -0.1}, {"depth": "step"},
        {"time": "constant"}, {"time": "constant", "p_max": 0.0},
    ],
)  # fmt: skip
def test_bad_rate_arguments_are_refused(change):
    arguments = {"step": 0, "max_steps": 10, "n_layers": 4, "p_max": 0.1, **change}
    with pytest.raises(ValueError):
        layer_dropout_rates(**arguments)
    with pytest.raises(ValueError):
        scale("exp", 0, 0)


def test_drop_frequencies_match_the_rates():
    L, n = 8, 4000
    step_rates = [layer_dropout_rates(step, 10, L, p_max=0.3) for step in range(10)]
    ids = torch.arange(n)
    for step, rates in enumerate(step_rates):
        dropped = (~layer_keep(rates, seed=0, step=step, sample_ids=ids)).sum(1)
        for p, hits in zip(rates.tolist(), dropped.tolist(), strict=True):
            if p == 0:
                assert hits == 0  # the first layer, and the first step of training from scratch
            else:
                assert abs(z_score(hits, n, p)) < Z


def test_a_rate_of_one_always_drops():
    assert not layer_keep(torch.ones(2), seed=1, step=0, sample_ids=torch.arange(1000)).any()


def test_neighbours_are_uncorrelated():
    rates, ids = torch.full((16,), 0.5), torch.arange(8000)
    here = layer_keep(rates, seed=3, step=10, sample_ids=ids)
    next_step = layer_keep(rates, seed=3, step=11, sample_ids=ids)
    next_seed = layer_keep(rates, seed=4, step=10, sample_ids=ids)
    experts = layer_keep(rates, seed=3, step=10, sample_ids=ids, stream=EXPERT_SUBLAYER_STREAM)
    default = layer_keep(rates, seed=3, step=10, sample_ids=ids, stream=BLOCK_STREAM)
    assert torch.equal(here, default)
    for a, b in [
        (here[1:], here[:-1]), (here[:, 1:], here[:, :-1]), (here, next_step), (here, next_seed),
        (here, experts), (here[1:], next_step[:-1]), (here[:, 1:], next_step[:, :-1]),
    ]:  # fmt: skip
        assert abs(correlation_z(a, b)) < Z


@given(
    seed=st.integers(),
    step=st.integers(0, 10**9),
    ids=st.lists(st.integers(0, 2**62), min_size=1, max_size=12),
    data=st.data(),
)
def test_a_draw_does_not_depend_on_the_batch_around_it(seed, step, ids, data):
    rates = torch.tensor([0.0, 0.3, 0.6, 0.9])
    whole = layer_keep(rates, seed=seed, step=step, sample_ids=torch.tensor(ids))
    order = data.draw(st.permutations(range(len(ids))))
    shuffled = layer_keep(rates, seed=seed, step=step, sample_ids=torch.tensor([ids[i] for i in order]))
    assert torch.equal(shuffled, whole[:, order])
    cut = data.draw(st.integers(0, len(ids)))
    parts = [torch.tensor(part, dtype=torch.int64) for part in (ids[:cut], ids[cut:])]
    split = [layer_keep(rates, seed=seed, step=step, sample_ids=part) for part in parts]
    assert torch.equal(torch.cat(split, dim=1), whole)


def test_float_ids_and_bad_rates_are_refused():
    with pytest.raises(ValueError, match="sample_ids"):
        layer_keep(torch.zeros(2), seed=0, step=0, sample_ids=torch.zeros(3))
    with pytest.raises(ValueError, match="rates"):
        layer_keep(torch.tensor([0.1, 1.2]), seed=0, step=0, sample_ids=torch.arange(3))
    with pytest.raises(ValueError, match="rates"):
        layer_keep(torch.tensor([0.1, math.nan]), seed=0, step=0, sample_ids=torch.arange(3))


@pytest.mark.parametrize(("rate", "share"), [(0.2, 0.2 - 8.704e-5 / 8), (0.5, 0.5 - 10 / 256 / 8), (1.0, 0.75)])
def test_expert_dropout_rate_is_the_documented_one(rate, share):
    n = 4000
    masks = expert_mask(rate, 8, 2, seed=0, step=7, layers=range(n))
    inactive = (~masks).double().mean(1)  # one independent share per layer
    if rate == 1.0:
        assert (inactive == share).all()
    else:
        assert abs((inactive.mean() - share) / (inactive.std() / math.sqrt(n))).item() < Z


@given(
    rate=st.floats(0, 1),
    experts=st.integers(1, 16),
    data=st.data(),
    seed=st.integers(),
    step=st.integers(0, 10**6),
)
def test_enough_experts_stay_active_whatever_the_layers(rate, experts, data, seed, step):
    top_k = data.draw(st.integers(1, experts))
    layers = data.draw(st.lists(st.integers(0, 100), max_size=5))
    masks = expert_mask(rate, experts, top_k, seed=seed, step=step, layers=layers)
    assert masks.shape == (len(layers), experts) and masks.dtype == torch.bool
    assert (masks.sum(1) >= top_k).all()
    for row, layer in zip(masks, layers, strict=True):
        assert torch.equal(row, expert_mask(rate, experts, top_k, seed=seed, step=step, layers=[layer])[0])


def test_expert_masks_differ_between_steps_and_layers_and_are_whole_at_rate_zero():
    masks = torch.stack([expert_mask(0.5, 16, 1, seed=0, step=s, layers=range(500)) for s in (0, 1)])
    assert abs(correlation_z(masks[0], masks[1])) < Z
    assert abs(correlation_z(masks[0, 1:], masks[0, :-1])) < Z
    assert expert_mask(0.0, 8, 2, seed=0, step=0, layers=range(100)).all()


@pytest.mark.parametrize("bad", [(1.1, 8, 2), (-0.1, 8, 2), (0.1, 8, 9), (0.1, 8, 0)])
def test_bad_expert_dropout_is_refused(bad):
    with pytest.raises(ValueError):
        expert_mask(*bad, seed=0, step=0, layers=[0])


def test_quiet_hides_only_the_noise_and_puts_levels_back(caplog):
    noisy = logging.getLogger("torchao")
    noisy.setLevel(logging.INFO)
    try:
        with pytest.raises(RuntimeError), quiet_import():
            noisy.warning("hidden")
            noisy.error("shown")
            logging.getLogger("torch.nn").error("shown too")
            raise RuntimeError
        assert noisy.level == logging.INFO
    finally:
        noisy.setLevel(logging.NOTSET)
    assert "hidden" not in caplog.text and "shown" in caplog.text


@pytest.mark.slow  # a fresh interpreter imports torch and torchtune
def test_importing_torchtune_prints_nothing():
    code = "from layerskip_moe.training.torchtune_parts import scale; print(scale('exp', 2, 1))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert float(done.stdout) == pytest.approx(math.sqrt(2) - 1)


def test_a_missing_torchtune_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchtune.modules.layer_dropout", None)
    with pytest.raises(ImportError, match="pip install"):
        _get_scale.__wrapped__()  # past the cache
