import pytest
import torch

from layerskip_moe.nn import int8_copies as file
from layerskip_moe.nn.compiling import compiling
from layerskip_moe.nn.few_rows import packed
from layerskip_moe.nn.int8_copies import are_made_unasked, int8_copies, why_no_int8
from layerskip_moe.pretrained import quantize

NETWORKS = {
    "experts in every other layer": {"moe_layers": "every other"},
    "a gated shared expert, tied head": {
        "shared_expert_d_ff": 24,
        "shared_expert_gate": True,
        "tie_embeddings": True,
    },
    "dense, biases": {"num_experts": 0, "mlp_bias": True, "qkv_bias": True},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_numbers_are_those_of_a_quantised_model(tiny_model, monkeypatch, name, dtype):
    model = tiny_model(dtype, **NETWORKS[name])
    with compiling(model):
        parts = int8_copies(model).parts
    weights, expected = dict(model.named_parameters()), dict(quantize(model, "int8").named_parameters())
    copied = [key for key, weight in expected.items() if hasattr(weight, "qdata")]
    for key in copied:
        panels, scale = parts[id(weights[key])]
        assert panels.dtype == torch.int8 and torch.equal(panels, packed(expected[key].qdata))
        assert scale.dtype == torch.float32 and torch.equal(scale, expected[key].scale[..., 0].float())
    # A tied head is read as int8, too, which a quantised model's is not.
    assert len(parts) == len(copied) + model.config.tie_embeddings
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(file, "MOST_BYTES", sum(panels.numel() for panels, _ in parts.values()))
    assert are_made_unasked(model)
    monkeypatch.setattr(file, "MOST_BYTES", file.MOST_BYTES - 1)
    assert not are_made_unasked(model)
    monkeypatch.setattr(file, "MOST_BYTES", 2**30)
    assert are_made_unasked(model)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert not are_made_unasked(model)


def test_weights_are_followed(tiny_model):
    model = tiny_model(torch.float32)
    with compiling(model):
        copies = int8_copies(model)
        weight, other = model.blocks[0].attention.qkv.weight, model.blocks[1].attention.qkv.weight
        (panels, scale), untouched = copies.parts[id(weight)], copies.parts[id(other)][0].clone()
        with torch.no_grad():
            weight.mul_(2.0)
            weight[0] = 1.0
        before = scale.clone()
        assert int8_copies(model) is copies
        torch.testing.assert_close(scale[1:], 2 * before[1:])
        assert (panels[0, :, :2] == 127).all() and scale[0].item() == pytest.approx(1 / 127.5)
        assert torch.equal(copies.parts[id(other)][0], untouched)

        model.blocks[0].attention.qkv.weight = torch.nn.Parameter(weight.detach().clone())
        others = int8_copies(model)
        assert others.number != copies.number and id(model.blocks[0].attention.qkv.weight) in others.parts


def test_what_is_made_in_inference_mode_is_followed_outside(tiny_model):
    model = tiny_model(torch.float32)
    with compiling(model), torch.inference_mode():
        copies = int8_copies(model)
    weight = model.head.weight
    before = copies.parts[id(weight)][1].clone()
    with torch.no_grad():
        weight.mul_(3.0)
    assert copies.follow()
    torch.testing.assert_close(copies.parts[id(weight)][1], 3 * before)


def test_what_stands_against_them(tiny_model):
    model = tiny_model(torch.float32)
    assert "not compiled" in why_no_int8(model) and int8_copies(model) is None
    for other, reason in [
        (tiny_model(torch.float64), "float64"),
        (quantize(model, "int8"), "quantised"),
        (tiny_model(torch.float32, clip_qkv=2.0), "clip_qkv"),
        (tiny_model(torch.float32).to("meta"), "meta"),
    ]:
        with compiling(other):
            assert reason in why_no_int8(other) and int8_copies(other) is None
    with compiling(model):
        assert why_no_int8(model) is None


def test_weights_of_another_type_have_other_copies(tiny_model):
    model = tiny_model(torch.float32)
    with compiling(model):
        first = int8_copies(model).number
        model.to(torch.bfloat16)
        others = int8_copies(model)
        assert others.number != first
        model.double()
        assert int8_copies(model) is None
