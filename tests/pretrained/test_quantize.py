"""Quantised models: every weight's value by the formula, the arithmetic of the dequantised model, and nothing else
changed."""

import copy
import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from layerskip_moe import ModelConfig, MoEDecoder
from layerskip_moe.generation import Autoregressive, EarlyExit, LayerSkipping, SelfSpeculative, Speculative, generate
from layerskip_moe.nn import KVCache
from layerskip_moe.nn.modes import evaluating
from layerskip_moe.pretrained.quantize import load_quantized, quantization_of, quantize, quantized_state

KINDS = ["int8", "int4"]
LARGEST = {"int8": 127.5, "int4": 7.5}  # what a scale's largest weight is of it
NETWORKS = {
    "every layer": {},
    "every other layer, shared expert, biases": dict(
        moe_layers="every other", shared_expert_d_ff=16, shared_expert_gate=True, qkv_bias=True, output_bias=True
    ),
    "OLMoE's switches": dict(qk_norm="full", normalize_top_k=False, n_kv_heads=4),
    "dense, tied": dict(num_experts=0, tie_embeddings=True, mlp_bias=True),
}
STRATEGIES = {
    "plain": lambda draft: Autoregressive(),
    "self-speculative": lambda draft: SelfSpeculative(1, 3),
    "a quantised draft": lambda draft: SelfSpeculative(1, 3, draft_model=draft),
    "rejection of a quantised draft": lambda draft: SelfSpeculative(1, 3, coupling="rejection", draft_model=draft),
    "a draft model": lambda draft: Speculative(draft, 3),
    "propagate": lambda draft: EarlyExit(0.2),
    "exact": lambda draft: EarlyExit(0.2, cache="exact"),
    "state": lambda draft: EarlyExit(0.9, confidence="state"),
    "every": lambda draft: LayerSkipping(every=3),
    "random": lambda draft: LayerSkipping(random=1),
}
TOKENS = torch.tensor([[1, 5, 9, 30, 2, 2, 7], [3, 8, 11, 36, 0, 21, 5]])


def make_model(name="every layer", *, dtype=torch.float32, **overrides):
    sizes = dict(vocab_size=37, n_layers=3, d_model=32, n_heads=4, n_kv_heads=2, d_ff=48, num_experts=5, top_k=2)
    config = ModelConfig(**{**sizes, "max_seq_len": 24, "init_std": 0.3, **NETWORKS[name], **overrides})
    return MoEDecoder(config, seed=3).to(dtype).eval()


def empty(config):
    with torch.device("meta"):
        return MoEDecoder(config)


def quantized_weights(model):
    """Name -> weight, of those that were quantised."""
    return {name: weight for name, weight in model.named_parameters() if type(weight) is not nn.Parameter}


def dequantized(model):
    """A plain model that has the quantised one's values."""
    weights = quantized_weights(model)
    plain = empty(model.config)
    state = {
        name: weights[name].dequantize() if name in weights else value for name, value in model.state_dict().items()
    }
    plain.load_state_dict(state, assign=True)
    return plain.eval()


@pytest.mark.parametrize("init_std", [0.3, 0.005])
@pytest.mark.parametrize(
    ("dtype", "rtol", "atol"),  # atol: half of the least float16
    [(torch.float32, 1e-6, 0.0), (torch.bfloat16, 2**-8, 0.0), (torch.float16, 2**-11, 2**-25)],
    ids=str,
)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NETWORKS)
def test_every_weight_is_the_nearest_multiple_of_its_scale(name, kind, dtype, rtol, atol, init_std):
    model, largest = make_model(name, dtype=dtype, init_std=init_std), LARGEST[kind]
    for key, weight in quantized_weights(quantize(model, kind)).items():
        assert weight.scale.dtype == weight.dtype == dtype
        groups, scale = (weight.scale.shape[-1], -1), weight.scale.float()[..., None]
        original = model.get_parameter(key).float().unflatten(-1, groups)
        value = weight.dequantize(torch.float32).unflatten(-1, groups)
        torch.testing.assert_close(scale, original.abs().amax(-1, keepdim=True) / largest, rtol=rtol, atol=atol)
        nearest = (original / scale).round().clamp(-largest - 0.5, largest - 0.5) * scale
        multiples = value / scale
        torch.testing.assert_close(multiples, multiples.round(), rtol=0, atol=1e-4)
        assert multiples.min() > -largest - 0.51 and multiples.max() < largest
        assert ((original - value).abs() <= (original - nearest).abs() + 1e-4 * scale).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_quantised_and_what_is_not(name, kind):
    model = make_model(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    quantized = quantize(model, kind)
    expected = {
        key
        for key in before
        if key.endswith(("qkv.weight", "attention.output.weight", "gate_up", "down", "gate_up.weight", "down.weight"))
    }
    expected |= {"head.weight"} & before.keys()
    assert len(expected) >= 4 * 3 and quantized_weights(quantized).keys() == expected
    for key, value in quantized.state_dict().items():
        assert value.shape == before[key].shape
        if key not in expected:
            assert torch.equal(value, before[key]) and value.data_ptr() != model.state_dict()[key].data_ptr()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not quantized_weights(model)
    assert quantized.parameter_counts() == model.parameter_counts()
    assert (quantized.dtype, quantized.config) == (torch.float32, model.config)
    assert (quantization_of(quantized), quantization_of(model)) == (kind, None)


def test_linear_layers_hold_what_torchao_s_own_configurations_give():
    quantization = pytest.importorskip("torchao.quantization")
    weight = make_model().blocks[0].attention.qkv.weight
    configurations = {
        "int8": quantization.Int8WeightOnlyConfig(version=2, set_inductor_config=False),
        "int4": quantization.IntxWeightOnlyConfig(torch.int4, quantization.PerGroup(32)),
    }
    for kind, configuration in configurations.items():
        layer = nn.Linear(32, len(weight), bias=False)
        layer.weight = copy.deepcopy(weight)
        quantization.quantize_(layer, configuration)
        ours = quantize(make_model(), kind).blocks[0].attention.qkv.weight
        assert torch.equal(ours.dequantize(), layer.weight.dequantize())
        assert kind == "int4" or isinstance(ours, type(layer.weight))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_quantised_model_computes_what_the_dequantised_one_does(name, kind):
    quantized = quantize(make_model(name), kind)
    plain = dequantized(quantized)
    positions = torch.arange(7).expand(2, 7)
    with evaluating(quantized), evaluating(plain):
        results = []
        for model in (quantized, plain):
            cache = KVCache(model.config, 2, 9)
            prefill = model.run(model.embed(TOKENS), range(3), positions=positions, cache=cache).hidden
            model.fill(model.embed(TOKENS[:, :1]), [0, 2], positions=positions[:, :1] + 7, cache=cache)
            step = model.run(
                model.embed(TOKENS[:1, :1]), range(3), positions=positions[:1, :1], cache=KVCache(model.config, 1, 1)
            )
            results.append(
                [model(TOKENS), model.unembed(prefill), cache.keys, cache.values, model.unembed(step.hidden)]
            )
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-5)
        assert not torch.allclose(results[0][0], make_model(name)(TOKENS), atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_large_states_stay_within_float16(kind):
    layer = quantize(make_model(dtype=torch.float16), kind).blocks[0].attention.qkv
    x = torch.full((1, 32), 500.0, dtype=torch.float16)
    exact = F.linear(x.double(), layer.weight.dequantize().double())
    torch.testing.assert_close(layer(x).double(), exact, rtol=1e-2, atol=2.0)


@pytest.mark.parametrize("kind", KINDS)
def test_eight_bits_move_the_logits_less_than_four(kind):
    model = make_model("dense, tied")  # a router may choose another expert for a rounding error
    with evaluating(model):  # a model that is quantised in here is one like any other
        quantized = quantize(model, kind)
        moved = (quantized(TOKENS) - model(TOKENS)).norm() / model(TOKENS).norm()
    assert (0.001 < moved < 0.05) if kind == "int8" else (0.05 < moved < 1)
    assert torch.equal(quantized(TOKENS), copy.deepcopy(quantized)(TOKENS))


@pytest.mark.parametrize(("kind", "share"), [("int8", 0.30), ("int4", 0.20)])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_weight_takes_so_much_of_its_float32_size(name, kind, share):
    model = make_model(name, d_model=64, d_ff=96, shared_expert_d_ff=64 * (name.startswith("every other")))
    for key, weight in quantized_weights(quantize(model, kind)).items():
        held = sum(getattr(weight, part).nbytes for part in weight.__tensor_flatten__()[0])
        assert held <= share * model.get_parameter(key).nbytes, key


def test_int4_groups_are_of_32_inputs_or_what_divides_them():
    weights = quantized_weights(quantize(make_model(d_model=64, d_ff=48, shared_expert_d_ff=24), "int4"))
    scales = {name.removeprefix("blocks.0."): list(weight.scale.shape) for name, weight in weights.items()}
    assert scales["attention.qkv.weight"] == [128, 64 // 32]
    assert scales["mlp.experts.gate_up"] == [5, 96, 64 // 32]
    assert scales["mlp.experts.down"] == [5, 64, 48 // 16]
    assert scales["mlp.shared.down.weight"] == [64, 24 // 8]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_without_a_weight_stay_zero(kind):
    model = make_model()
    with torch.no_grad():
        model.blocks[1].mlp.experts.down[2].zero_()
    assert not quantize(model, kind).blocks[1].mlp.experts.down.dequantize()[2].any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "dtype"),
    list(zip(NETWORKS, [torch.float16, torch.float32, torch.float32, torch.bfloat16], strict=True)),
)
def test_a_checkpoint_comes_back_bit_for_bit(tmp_path, name, kind, dtype):
    quantized = quantize(make_model(name, dtype=dtype, dropout=0.1), kind)
    quantized.save_pretrained(tmp_path, recipe={"steps": 3}, max_shard_bytes=5_000)
    assert (tmp_path / "model.safetensors.index.json").is_file()
    contents = json.loads((tmp_path / "config.json").read_text())
    assert (contents["model_type"], contents["quantization"]) == ("layerskip_moe", kind)
    loaded = MoEDecoder.from_pretrained(tmp_path)
    (state, _), (again, _) = quantized_state(quantized), quantized_state(loaded)
    assert again.keys() == state.keys() and all(torch.equal(again[key], state[key]) for key in state)
    assert loaded.config == quantized.config and quantization_of(loaded) == kind and not loaded.training
    with evaluating(loaded), evaluating(quantized):
        assert torch.equal(loaded(TOKENS), quantized(TOKENS))
    loaded.save_pretrained(tmp_path)  # over itself
    assert torch.equal(MoEDecoder.from_pretrained(tmp_path)(TOKENS), quantized(TOKENS))


def test_a_checkpoint_takes_the_place_of_an_unquantised_one_and_back(tmp_path):
    model = make_model()
    for each in (model, quantize(model, "int4"), model):
        each.save_pretrained(tmp_path)
        loaded = MoEDecoder.from_pretrained(tmp_path)
        assert quantization_of(loaded) == quantization_of(each) and torch.equal(loaded(TOKENS), each(TOKENS))


def test_dtype_converts_what_is_not_quantised(tmp_path):
    quantized = quantize(make_model("dense, tied"), "int8")
    quantized.save_pretrained(tmp_path)
    loaded = MoEDecoder.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.dtype == loaded(TOKENS).dtype == torch.bfloat16
    assert torch.equal(loaded.blocks[0].mlp.down.weight.scale, quantized.blocks[0].mlp.down.weight.scale)
    assert (loaded(TOKENS) - quantized(TOKENS)).norm() < 0.05 * quantized(TOKENS).norm()


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"quantization": "int2"}, r"config.json: quantization='int2' is unknown"),
        ({"quantization": "int4"}, r"attention.qkv.weight.qdata is \[64, 32\] instead of \[64, 16\]"),
        ({"quantization": None}, r"not known: blocks.0.attention.output.weight.qdata"),
    ],
)
def test_a_checkpoint_whose_config_says_another_form(tmp_path, changed, problem):
    quantize(make_model(), "int8").save_pretrained(tmp_path)
    (tmp_path / "layerskip_moe.json").unlink()
    contents = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(contents | changed))
    with pytest.raises(ValueError, match=problem):
        MoEDecoder.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_the_shapes_of_a_state_are_known_without_weights(kind):
    state, _ = quantized_state(quantize(make_model(), kind))
    shapes, _ = quantized_state(quantize(empty(make_model().config), kind))
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in shapes.items()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in state.items()
    }


@pytest.mark.parametrize("kind", KINDS)
def test_copies_and_conversions(kind):
    quantized = quantize(make_model("dense, tied"), kind)
    copied = copy.deepcopy(quantized)
    assert torch.equal(copied(TOKENS), quantized(TOKENS)) and quantization_of(copied) == kind
    copied.blocks[0].mlp.down.weight.qdata.zero_()
    assert quantized.blocks[0].mlp.down.weight.qdata.any()
    half = copy.deepcopy(quantized).to(torch.bfloat16)
    plain = dequantized(quantized).to(torch.bfloat16)
    with evaluating(half), evaluating(plain):
        logits = half(TOKENS)
        assert half.dtype == logits.dtype == torch.bfloat16
        assert (logits - plain(TOKENS)).norm() < 0.05 * plain(TOKENS).norm()
    assert quantized.to("cpu") is quantized and quantized.to("meta").device.type == "meta"


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_pass_through_to_what_lies_before(kind):
    quantized = quantize(make_model(), kind)
    plain = dequantized(quantized)
    for model in (quantized, plain):
        F.cross_entropy(model(TOKENS).flatten(0, 1), TOKENS.flatten()).backward()
    assert quantized.blocks[0].attention.qkv.weight.grad is None
    for name in ("embedding.weight", "blocks.0.mlp_norm.weight", "blocks.0.mlp.router.weight"):
        torch.testing.assert_close(
            quantized.get_parameter(name).grad, plain.get_parameter(name).grad, rtol=1e-3, atol=1e-6
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
def test_a_quantised_model_decodes_as_the_dequantised_one(kind, strategy):
    quantized = quantize(make_model("every other layer, shared expert, biases"), kind)
    draft = quantize(make_model("dense, tied", n_layers=2), kind)
    texts = [
        generate(model, [[1, 2, 3], [4]], strategy(draft), max_new_tokens=8, temperature=0.8, seed=1).tokens
        for model in (quantized, dequantized(quantized))
    ]
    assert texts[0] == texts[1]


def test_a_word_that_is_unknown():
    with pytest.raises(ValueError, match="quantization='int2' is unknown; it is 'int8' or 'int4'"):
        quantize(make_model(), "int2")
    with pytest.raises(ValueError, match="quantization=None is unknown"):
        load_quantized(empty(make_model().config), {}.__getitem__, {})


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_is_quantised_already(kind):
    with pytest.raises(ValueError, match="quantised already"):
        quantize(quantize(make_model(), kind), "int8")


def test_weights_that_cannot_be_quantised():
    with pytest.raises(ValueError, match=r"blocks.0.attention.qkv.weight is float64; .* convert the model first"):
        quantize(make_model(dtype=torch.float64), "int8")
    with pytest.raises(ValueError, match=r"blocks.0.mlp.experts.down has 12 inputs, which 8 does not divide"):
        quantize(make_model(d_ff=12), "int4")
    assert quantization_of(quantize(make_model(d_ff=12), "int8")) == "int8"


def test_torchao_is_imported_when_a_model_is_quantised_and_says_nothing():
    code = """
import sys
from layerskip_moe import ModelConfig, MoEDecoder
from layerskip_moe.pretrained.quantize import quantization_of, quantize
model = MoEDecoder(ModelConfig(vocab_size=16, n_layers=2, d_model=16, n_heads=2, num_experts=2, top_k=1))
assert quantization_of(model) is None and "torchao" not in sys.modules
assert quantization_of(quantize(model, "int4")) == "int4" and "torchao" in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


def test_torchao_that_is_too_old(monkeypatch):
    monkeypatch.setitem(sys.modules, "layerskip_moe.pretrained.quantized_weights", None)
    with pytest.raises(ImportError, match=r"pip install 'torchao>=0\.15,<0\.18'"):
        quantize(make_model(), "int8")
