"""What llama.cpp reads is the network, exactly; what it could not compute is refused by name.

The tests marked slow run llama.cpp itself: its greedy text is ours.
"""

import sys

import gguf
import numpy as np
import pytest
import torch

from layerskip_moe.data.source import Document
from layerskip_moe.data.tokenizer import train_tokenizer
from layerskip_moe.nn import ModelConfig, MoEDecoder
from layerskip_moe.nn.config import RopeScaling
from layerskip_moe.nn.rotary import rotary_table
from layerskip_moe.pretrained.gguf import export_gguf, gguf_obstacles
from layerskip_moe.pretrained.quantize import quantize

LINES = [
    "The old house by the river had been empty for years, and nobody knew why.\n",
    "def area(width, height):\n    return width * height  # in metres\n",
] * 16
SIZES = dict(vocab_size=352, n_layers=2, d_model=64, n_heads=4, n_kv_heads=2, d_ff=96, num_experts=4, max_seq_len=96)
YARN = RopeScaling("yarn", 4.0, 24)
NETWORKS = {
    "mixtral": ("llama", dict(qk_norm=None)),
    "mixtral, every expert": ("llama", dict(qk_norm=None, top_k=4, qkv_bias=True, output_bias=True)),
    "llama": ("llama", dict(qk_norm=None, num_experts=0, n_kv_heads=4)),
    "llama, biases": (
        "llama",
        dict(qk_norm=None, num_experts=0, head_dim=32, qkv_bias=True, output_bias=True, mlp_bias=True),
    ),
    "llama 3": ("llama", dict(qk_norm=None, num_experts=0, rope_scaling=RopeScaling("llama3", 8.0, 24))),
    "llama, linear": ("llama", dict(qk_norm=None, num_experts=0, rope_scaling=RopeScaling("linear", 2.5))),
    "llama, yarn, tied": ("llama", dict(qk_norm=None, num_experts=0, tie_embeddings=True, rope_scaling=YARN)),
    "native": ("qwen3moe", dict(head_dim=32, rope_theta=5e5, norm_eps=1e-5)),
    "qwen3moe, yarn, tied": (
        "qwen3moe",
        dict(tie_embeddings=True, qkv_bias=True, rope_scaling=RopeScaling("yarn", 4.0, 24, attention_factor=1.3)),
    ),
    "qwen3": ("qwen3", dict(num_experts=0, dense_d_ff=160)),
    "olmoe": ("olmoe", dict(qk_norm="full", normalize_top_k=False, n_kv_heads=4, tie_embeddings=True)),
    "qwen2moe": (
        "qwen2moe",
        dict(qk_norm=None, normalize_top_k=False, qkv_bias=True, shared_expert_d_ff=32, shared_expert_gate=True),
    ),
}


def make_model(seed=0, **switches):
    """A network whose logits differ, with norms and biases that are not 1 and 0."""
    model = MoEDecoder(ModelConfig(**{**SIZES, "init_std": 0.2, **switches}), seed=seed).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "norm.weight")):
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def byte_level(kind="bpe"):
    return train_tokenizer(kind, 340, [Document("train", line) for line in LINES], False)


def read(path):
    """(fields, tensors as [..., rows, inputs]) of a GGUF file."""
    reader = gguf.GGUFReader(path)
    return (
        {name: field.contents() for name, field in reader.fields.items()},
        {tensor.name: tensor for tensor in reader.tensors},
    )


def numbers(tensor):
    """The values of a tensor that was read, as float32."""
    values = np.asarray(gguf.quants.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
    return torch.from_numpy(values.copy()).view(*reversed(tensor.shape.tolist()))


@pytest.mark.parametrize("name", NETWORKS)
def test_sizes_and_switches_are_told(tmp_path, name):
    architecture, switches = NETWORKS[name]
    model = make_model(**switches)
    config = model.config
    export_gguf(model, byte_level(), tmp_path / "model.gguf")
    fields, tensors = read(tmp_path / "model.gguf")
    told = {key.removeprefix(f"{architecture}."): value for key, value in fields.items()}
    assert told["general.architecture"] == architecture and told["general.file_type"] == gguf.LlamaFileType.ALL_F32
    assert (told["block_count"], told["embedding_length"], told["context_length"]) == (2, 64, 96)
    assert (told["attention.head_count"], told["attention.head_count_kv"]) == (4, config.n_kv_heads)
    assert told["attention.key_length"] == told["attention.value_length"] == config.head_dim
    assert told["rope.dimension_count"] == config.head_dim and told["rope.freq_base"] == config.rope_theta
    assert told["attention.layer_norm_rms_epsilon"] == pytest.approx(config.norm_eps)
    assert told["feed_forward_length"] == (config.d_ff if config.num_experts else config.dense_d_ff)
    if config.num_experts:
        assert (told["expert_count"], told["expert_used_count"]) == (4, config.top_k)
        assert told["expert_feed_forward_length"] == 96
    assert told.get("expert_shared_feed_forward_length", 0) == config.shared_expert_d_ff
    # Nothing but what llama.cpp knows under that architecture, and every weight once.
    kind = next(kind for kind, known in gguf.MODEL_ARCH_NAMES.items() if known == architecture)
    known = {gguf.TENSOR_NAMES[tensor].format(bid=i) for tensor in gguf.MODEL_TENSORS[kind] for i in (0, 1)}
    assert {tensor.rsplit(".", 1)[0] for tensor in tensors} <= known
    written = sum(tensor.n_elements for tensor in tensors.values())
    extra = tensors["rope_freqs.weight"].n_elements if "rope_freqs.weight" in tensors else 0
    if config.tie_embeddings and "output.weight" in tensors:
        extra += model.embedding.weight.numel()
    assert written - extra == sum(parameter.numel() for parameter in model.parameters())


def test_tensors_are_the_models_own(tmp_path):
    model = make_model(**NETWORKS["qwen2moe"][1])
    export_gguf(model, byte_level(), tmp_path / "model.gguf")
    tensors, state = read(tmp_path / "model.gguf")[1], model.state_dict()
    pairs = {
        "token_embd.weight": state["embedding.weight"],
        "output.weight": state["head.weight"],
        "output_norm.weight": state["norm.weight"],
        "blk.1.attn_k.weight": state["blocks.1.attention.qkv.weight"][64:96],
        "blk.1.attn_v.bias": state["blocks.1.attention.qkv.bias"][96:],
        "blk.1.ffn_gate_inp.weight": state["blocks.1.mlp.router.weight"],
        "blk.1.ffn_gate_exps.weight": state["blocks.1.mlp.experts.gate_up"][:, :96],
        "blk.1.ffn_up_exps.weight": state["blocks.1.mlp.experts.gate_up"][:, 96:],
        "blk.1.ffn_down_exps.weight": state["blocks.1.mlp.experts.down"],
        "blk.1.ffn_gate_inp_shexp.weight": state["blocks.1.mlp.shared_gate.weight"][0],
        "blk.1.ffn_up_shexp.weight": state["blocks.1.mlp.shared.gate_up.weight"][32:],
    }
    for name, tensor in pairs.items():
        assert torch.equal(numbers(tensors[name]), tensor), name


def test_llamas_queries_and_keys_lie_pair_by_pair(tmp_path):
    model = make_model(**NETWORKS["llama, biases"][1])
    export_gguf(model, byte_level(), tmp_path / "model.gguf")
    tensors, qkv = read(tmp_path / "model.gguf")[1], model.blocks[0].attention.qkv
    for kind, ours in (("weight", qkv.weight), ("bias", qkv.bias)):
        theirs = numbers(tensors[f"blk.0.attn_k.{kind}"])
        for head in range(2):
            first, start = 4 * 32 + head * 32, head * 32  # rows of the key head: here in all of qkv, there in its own
            assert torch.equal(theirs[start : start + 32 : 2], ours[first : first + 16])
            assert torch.equal(theirs[start + 1 : start + 32 : 2], ours[first + 16 : first + 32])
        assert torch.equal(numbers(tensors[f"blk.0.attn_v.{kind}"]), ours[192:])


def test_rope_scaling_is_told_as_llama_cpp_computes_it(tmp_path):
    path = tmp_path / "model.gguf"
    export_gguf(make_model(**NETWORKS["llama, linear"][1]), byte_level(), path)
    fields = read(path)[0]
    assert (fields["llama.rope.scaling.type"], fields["llama.rope.scaling.factor"]) == ("linear", 2.5)
    export_gguf(make_model(**NETWORKS["qwen3moe, yarn, tied"][1]), byte_level(), path)
    fields = read(path)[0]
    assert fields["qwen3moe.rope.scaling.type"] == "yarn"
    assert fields["qwen3moe.rope.scaling.original_context_length"] == 24
    own = 0.1 * np.log(4.0) + 1
    assert fields["qwen3moe.rope.scaling.attn_factor"] * own == pytest.approx(1.3)
    scaling = RopeScaling("llama3", 8.0, 24)
    export_gguf(make_model(**NETWORKS["llama 3"][1]), byte_level(), path)
    fields, tensors = read(path)
    assert "llama.rope.scaling.type" not in fields
    slowed = 10000.0 ** -(torch.arange(0, 16, 2) / 16) / numbers(tensors["rope_freqs.weight"])
    expected = rotary_table(16, 10000.0, scaling, 2, torch.device("cpu"))[1][1, :8]
    torch.testing.assert_close(slowed.sin(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "q8_0"])
def test_matrices_are_written_in_the_type_asked_for(tmp_path, dtype):
    model = make_model(d_ff=40)  # whose experts' down has rows that 32 does not divide
    export_gguf(model, byte_level(), tmp_path / "model.gguf", dtype=dtype)
    tensors = read(tmp_path / "model.gguf")[1]
    kinds = {name: tensor.tensor_type.name for name, tensor in tensors.items()}
    matrix = {"float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}[dtype]
    assert kinds["token_embd.weight"] == kinds["blk.0.attn_q.weight"] == kinds["blk.0.ffn_up_exps.weight"] == matrix
    assert kinds["blk.0.ffn_down_exps.weight"] == ("F16" if dtype == "q8_0" else matrix)
    assert (
        kinds["output_norm.weight"] == kinds["blk.0.ffn_gate_inp.weight"] == kinds["blk.1.attn_q_norm.weight"] == "F32"
    )
    weight = model.embedding.weight.detach()
    if dtype == "q8_0":
        scale = weight.view(-1, 32).abs().amax(1) / 127
        error = (numbers(tensors["token_embd.weight"]) - weight).view(-1, 32).abs().amax(1)
        assert (error <= 0.57 * scale).all()  # half a step, and the scale's own rounding to float16
    else:
        assert torch.equal(numbers(tensors["token_embd.weight"]), weight.to(getattr(torch, dtype)).float())


def test_a_bfloat16_model_is_written_as_it_is(tmp_path):
    model = make_model().to(torch.bfloat16)
    export_gguf(model, byte_level(), tmp_path / "model.gguf", dtype="bfloat16")
    for name, tensor in read(tmp_path / "model.gguf")[1].items():
        if name == "blk.1.ffn_down_exps.weight":
            assert torch.equal(numbers(tensor), model.blocks[1].mlp.experts.down.float())


@pytest.mark.parametrize(
    ("switches", "named"),
    [
        (dict(moe_layers="every other"), ["moe_layers='every other'"]),
        (dict(bias_balancing=True), ["bias_balancing=True"]),
        (dict(router_average=0.5, router_hold=2), ["router_average=0.5", "router_hold=2"]),
        (dict(normalize_top_k=False), ["normalize_top_k=False"]),
        (dict(qk_norm=None, normalize_top_k=False), ["normalize_top_k=False"]),
        (dict(qk_norm="full", n_kv_heads=4), ["normalize_top_k=True"]),
        (dict(qk_norm="full", normalize_top_k=False, head_dim=8), ["head_dim=8", "n_kv_heads=2"]),
        (dict(qk_norm=None, clip_qkv=3.0, sliding_window=8), ["clip_qkv=3.0", "sliding_window=8"]),
        (dict(sliding_window=200, sliding_layers=()), []),
        (dict(sliding_window=96), []),
        (dict(sliding_window=8, sliding_layers=()), []),
        (dict(output_bias=True), ["output_bias=True"]),
        (dict(num_experts=0, mlp_bias=True), ["mlp_bias=True"]),
        (dict(num_experts=0, qk_norm="full"), ["qk_norm='full'"]),
        (dict(shared_expert_d_ff=32), ["qk_norm='head'", "normalize_top_k=True", "shared_expert_gate=False"]),
        (dict(rope_scaling=RopeScaling("llama3", 8.0, 24)), ["rope_scaling of kind 'llama3'"]),
        (
            dict(rope_scaling=RopeScaling("yarn", 8.0, 24, beta_fast=16.0, truncate=False)),
            ["rope_scaling's beta_fast=16.0", "rope_scaling's truncate=False"],
        ),
        *((switches, []) for _, switches in NETWORKS.values()),
    ],
)
def test_networks_are_refused_by_their_settings(tmp_path, switches, named):
    found = gguf_obstacles(ModelConfig(**{**SIZES, **switches}))
    assert [phrase.split(" (")[0] for phrase in found] == named
    if named:
        with pytest.raises(ValueError) as caught:
            export_gguf(make_model(**switches), byte_level(), tmp_path / "model.gguf")
        assert all(name in str(caught.value) for name in named) and list(tmp_path.iterdir()) == []


def test_an_error_leaves_the_older_file_as_it_was(tmp_path):
    path, model = tmp_path / "model.gguf", make_model()
    export_gguf(model, byte_level(), path)
    before = path.read_bytes()
    with torch.no_grad():
        model.blocks[1].mlp.experts.down[0, 0, 0] = 1e6
    with pytest.raises(ValueError, match=r"blk\.1\.ffn_down_exps\.weight holds weights beyond float16's range"):
        export_gguf(model, byte_level(), path, dtype="float16")
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(dtype="q4_0"), "dtype='q4_0' is unknown"),
        (dict(path="."), "is a folder"),
        (dict(model=lambda: make_model(vocab_size=100)), "has ids up to 339 but the model's vocab_size is 100"),
    ],
)
def test_arguments_that_cannot_be_are_refused(tmp_path, change, message):
    model, path = change.get("model", make_model)(), tmp_path / change.get("path", "model.gguf")
    with pytest.raises(ValueError, match=message):
        export_gguf(model, byte_level(), path, dtype=change.get("dtype", "float32"))
    assert list(tmp_path.iterdir()) == []


def test_quantised_weights_are_refused(tmp_path):
    pytest.importorskip("torchao")
    model = make_model()
    with pytest.raises(ValueError, match="the model is quantised"):
        export_gguf(quantize(model, "int8"), byte_level(), tmp_path / "model.gguf")
    model.head.weight = type("Theirs", (torch.nn.Parameter,), {})(model.head.weight.detach())
    with pytest.raises(ValueError, match="parameters of Theirs"):
        export_gguf(model, byte_level(), tmp_path / "model.gguf")
    assert list(tmp_path.iterdir()) == []


def test_the_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"pip install 'gguf>=0\.10'"):
        export_gguf(make_model(), byte_level(), tmp_path / "model.gguf")


def open_in_llama_cpp(path):
    reason = "llama-cpp-python is not installed (it compiles for minutes)"
    llama_cpp = pytest.importorskip("llama_cpp", reason=reason)
    # Its cache of keys and values is float16 by default, which would be another computation.
    return llama_cpp.Llama(
        str(path), n_ctx=256, n_threads=1, logits_all=True, verbose=False, flash_attn=False,
        type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_greedy_text_in_llama_cpp_is_ours(tmp_path, name):
    model, tokenizer = make_model(seed=1, **NETWORKS[name][1]), byte_level()
    export_gguf(model, tokenizer, tmp_path / "model.gguf")
    ids = tokenizer.encode("The old house by the river had been empty").ids
    prompt = len(ids)
    for _ in range(40):
        logits = model(torch.tensor([ids]))[0, -1]
        best, second = logits.topk(2).values
        assert best - second > 1e-4 * logits.abs().max(), "a tie: take another seed"
        ids.append(int(logits.argmax()))
    theirs = open_in_llama_cpp(tmp_path / "model.gguf")
    theirs.eval(ids[:prompt])
    for step in range(prompt, len(ids)):
        assert int(theirs.scores[theirs.n_tokens - 1].argmax()) == ids[step]
        theirs.eval([ids[step]])
    logits = model(torch.tensor([ids]))[0]
    given = torch.from_numpy(theirs.scores[: len(ids)].astype(np.float32))
    assert (given - logits).abs().max() < 1e-4 * logits.abs().max()
    theirs.close()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "q8_0"])
def test_other_types_are_computed_by_llama_cpp_nearly_the_same(tmp_path, dtype):
    model = make_model(seed=1, top_k=4)  # all experts: with a choice, rounding might make it another
    tokenizer = byte_level()
    export_gguf(model, tokenizer, tmp_path / "model.gguf", dtype=dtype)
    ids = tokenizer.encode("The old house by the river").ids
    theirs = open_in_llama_cpp(tmp_path / "model.gguf")
    theirs.eval(ids)
    logits = model(torch.tensor([ids]))[0]
    given = torch.from_numpy(theirs.scores[: len(ids)].astype(np.float32))
    assert torch.cosine_similarity(given, logits).min() > 0.99
    theirs.close()
