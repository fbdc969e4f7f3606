"""The optimizer: the learning rate over a run, who decays, the number types, and loss scaling."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from layerskip_moe.nn.decoder import MoEDecoder
from layerskip_moe.training import TrainConfig, train
from layerskip_moe.training import run as run_module
from layerskip_moe.training.optimizer import autocast_dtype, learning_rate_at, make_optimizer


def test_the_learning_rate_rises_to_its_peak_and_follows_a_cosine_to_its_floor():
    config = TrainConfig(learning_rate=2.0, warmup_steps=3, min_learning_rate_ratio=0.1)
    rates = [learning_rate_at(step, 12, config) for step in range(12)]
    assert rates[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert rates[7] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))  # half way from step 3 to step 11
    assert rates[5] == pytest.approx(2.0 * (0.1 + 0.45 * (1 + math.cos(math.pi / 4))))
    assert rates[-1] == pytest.approx(0.2)


@pytest.mark.parametrize("max_steps, warmup", [(1, 0), (19, 0), (20, 1), (200, 10), (100_000, 500)])
def test_warm_up_is_a_twentieth_of_the_run_by_default_and_500_steps_at_most(max_steps, warmup):
    config = TrainConfig(learning_rate=1.0)
    assert learning_rate_at(warmup, max_steps, config) == 1.0
    if warmup:
        assert learning_rate_at(warmup - 1, max_steps, config) == pytest.approx(warmup / (warmup + 1))
        assert learning_rate_at(0, max_steps, config) == pytest.approx(1 / (warmup + 1))


@given(
    max_steps=st.integers(1, 300),
    warmup=st.none() | st.integers(0, 400),
    floor=st.floats(0, 1),
)
def test_the_learning_rate_stays_between_floor_and_peak(max_steps, warmup, floor):
    config = TrainConfig(learning_rate=1.0, warmup_steps=warmup, min_learning_rate_ratio=floor)
    rates = [learning_rate_at(step, max_steps, config) for step in range(max_steps)]
    peak = rates.index(max(rates))
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert 0 < max(rates) <= 1.0
    assert min(rates[peak:]) >= floor - 1e-12 or peak == len(rates) - 1  # a run may end before its peak


@pytest.mark.parametrize("tied", [True, False])
def test_only_matrices_decay(decoder, tied):
    model = decoder(
        tie_embeddings=tied, qkv_bias=True, bias_balancing=True, moe_layers=(1, 2), shared_expert_d_ff=8,
        shared_expert_gate=True,
    )  # fmt: skip
    optimizer = make_optimizer(model, TrainConfig(weight_decay=0.3, beta1=0.8, beta2=0.9))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decay, plain = ({names[id(p)] for p in group["params"]} for group in optimizer.param_groups)
    assert decay | plain == set(names.values()) and not decay & plain
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    assert all(group["betas"] == (0.8, 0.9) for group in optimizer.param_groups)
    undecayed = ("norm.weight", ".bias", "embedding.weight")
    assert plain == {name for name in names.values() if name.endswith(undecayed)}
    for name in ("blocks.1.mlp.router.weight", "blocks.1.mlp.experts.down", "blocks.0.attention.qkv.weight"):
        assert name in decay
    assert ("head.weight" in decay) is not tied


def test_the_functions_that_tell_what_a_cpu_multiplies_still_exist():
    for supported in (torch.cpu._is_avx512_bf16_supported, torch.cpu._is_amx_tile_supported):
        assert supported() in (True, False)


@pytest.mark.parametrize(
    "avx512, amx, dtype",
    [
        (False, False, None),
        (True, False, torch.bfloat16),
        (False, True, torch.bfloat16),
        (True, True, torch.bfloat16),
    ],
)
def test_auto_takes_bfloat16_on_a_cpu_that_multiplies_it(monkeypatch, avx512, amx, dtype):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert autocast_dtype("auto", torch.device("cpu")) is dtype


@pytest.mark.parametrize("ampere, dtype", [(True, torch.bfloat16), (False, torch.float16)])
def test_auto_takes_float16_on_a_gpu_that_only_emulates_bfloat16(monkeypatch, ampere, dtype):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: ampere or including_emulation)
    assert autocast_dtype("auto", torch.device("cuda")) is dtype


def test_a_named_precision_is_taken_as_it_is():
    for device in ("cpu", "cuda", "mps"):
        for name, dtype in {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}.items():
            assert autocast_dtype(name, torch.device(device)) is dtype
    assert autocast_dtype("auto", torch.device("mps")) is None


@pytest.mark.parametrize("precision, dtype", [("bfloat16", torch.bfloat16), ("float16", torch.float16)])
def test_half_precision_trains_float32_weights(decoder, text, recipe, tmp_path, precision, dtype):
    model, reference = decoder(n_layers=2), decoder(n_layers=2)
    before = model.blocks[1].mlp.experts.down.detach().clone()
    seen = set()
    model.blocks[1].attention.qkv.register_forward_hook(lambda _, args, out: seen.add(out.dtype))
    config = dict(max_steps=2, batch_size=2, seq_len=4, warmup_steps=0, validate_every=0)
    half = train(model, text(), recipe(**config, precision=precision), tmp_path / "half", progress=False)
    full = train(reference, text(), recipe(**config), tmp_path / "full", progress=False)
    assert seen == {dtype}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not torch.equal(model.blocks[1].mlp.experts.down, before)
    for a, b in zip(half.metrics, full.metrics, strict=True):
        assert a["perplexity"] == pytest.approx(b["perplexity"], rel=0.05)
        if a["split"] == "train":
            assert a["loss"] == pytest.approx(b["loss"], rel=0.02)
            assert a["gradient_norm"] == pytest.approx(b["gradient_norm"], rel=0.1)  # unscaled before it is logged


def test_a_float16_step_past_its_range_is_skipped_and_lowers_the_scale(decoder, text, recipe, monkeypatch):
    model: MoEDecoder = decoder(n_layers=2)
    run = run_module.Run(model, recipe(precision="float16"), 3, text())
    tokens = text().train[:36].view(4, 9)
    batch = (tokens[:, :-1], tokens[:, 1:], torch.arange(4))
    scale = run.scaler.get_scale()
    losses = run_module.training_losses

    def overflowing(*arguments, **others):
        out = losses(*arguments, **others)
        weight = model.embedding.weight
        return out._replace(total=out.total + (weight - weight.detach()).sum() * 1e38)  # times the scale: inf

    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "training_losses", overflowing)
        _, norm = run.step(0, iter([batch]))
    assert not math.isfinite(norm)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert run.scaler.get_scale() == scale / 2
    _, norm = run.step(1, iter([batch]))
    assert math.isfinite(norm)
    assert not torch.equal(model.embedding.weight, before["embedding.weight"])
    assert all(parameter.isfinite().all() for parameter in model.parameters())
