"""Logits equal those of the architectures that the config's switches describe, with the weights copied across."""

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

SIZES = dict(
    vocab_size=37, hidden_size=16, num_attention_heads=4, num_hidden_layers=4, max_position_embeddings=64,
    rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 500.0}, attn_implementation="sdpa",
    pad_token_id=None, bos_token_id=None, eos_token_id=None,
)  # fmt: skip
OURS = dict(vocab_size=37, d_model=16, n_heads=4, n_layers=4, norm_eps=1e-5, rope_theta=500.0, init_std=0.2)
QWEN3 = dict(
    num_key_value_heads=2, head_dim=6, moe_intermediate_size=12, intermediate_size=20, num_experts=5,
    num_experts_per_tok=2, norm_topk_prob=True,
)  # fmt: skip
OUR_QWEN3 = dict(n_kv_heads=2, head_dim=6, d_ff=12, dense_d_ff=20, num_experts=5, top_k=2)
QWEN2 = dict(
    num_key_value_heads=2, moe_intermediate_size=12, shared_expert_intermediate_size=10, num_experts=5,
    num_experts_per_tok=3, norm_topk_prob=False,
)  # fmt: skip
OUR_QWEN2 = dict(
    n_kv_heads=2, d_ff=12, num_experts=5, top_k=3, qk_norm=None, qkv_bias=True, shared_expert_d_ff=10,
    shared_expert_gate=True, normalize_top_k=False,
)  # fmt: skip
MIXTRAL = dict(num_key_value_heads=2, intermediate_size=12, num_local_experts=4, num_experts_per_tok=2)
OLMOE = dict(num_key_value_heads=2, intermediate_size=12, num_experts=6, num_experts_per_tok=3, norm_topk_prob=False)

# name: (transformers' prefix, its fields, ours)
CASES = {
    "qwen3_moe": ("Qwen3Moe", QWEN3, OUR_QWEN3),
    "qwen3_moe tied": ("Qwen3Moe", {**QWEN3, "tie_word_embeddings": True}, {**OUR_QWEN3, "tie_embeddings": True}),
    "qwen3_moe every other": (
        "Qwen3Moe",
        {**QWEN3, "decoder_sparse_step": 2},
        {**OUR_QWEN3, "moe_layers": "every other"},
    ),
    "qwen3_moe some dense": ("Qwen3Moe", {**QWEN3, "mlp_only_layers": [0, 3]}, {**OUR_QWEN3, "moe_layers": (1, 2)}),
    "mixtral": ("Mixtral", MIXTRAL, dict(n_kv_heads=2, d_ff=12, num_experts=4, top_k=2, qk_norm=None)),
    "olmoe": (
        "Olmoe",
        OLMOE,
        dict(n_kv_heads=2, d_ff=12, num_experts=6, top_k=3, qk_norm="full", normalize_top_k=False),
    ),
    "qwen2_moe": ("Qwen2Moe", QWEN2, OUR_QWEN2),
    "llama": (
        "Llama",
        dict(num_key_value_heads=1, intermediate_size=20),
        dict(n_kv_heads=1, d_ff=20, num_experts=0, qk_norm=None),
    ),
    "llama with biases": (
        "Llama",
        dict(num_key_value_heads=1, intermediate_size=20, attention_bias=True, mlp_bias=True),
        dict(n_kv_heads=1, d_ff=20, num_experts=0, qk_norm=None, qkv_bias=True, output_bias=True, mlp_bias=True),
    ),
    "mixtral, window": (
        "Mixtral",
        {**MIXTRAL, "sliding_window": 7},
        dict(n_kv_heads=2, d_ff=12, num_experts=4, top_k=2, qk_norm=None, sliding_window=7),
    ),
    "qwen2_moe, window in every other layer": (
        "Qwen2Moe",
        {**QWEN2, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 4},
        {**OUR_QWEN2, "sliding_window": 5, "sliding_layers": (0, 2)},
    ),
    "olmoe, clipped": (
        "Olmoe",
        {**OLMOE, "clip_qkv": 0.7},
        dict(n_kv_heads=2, d_ff=12, num_experts=6, top_k=3, qk_norm="full", normalize_top_k=False, clip_qkv=0.7),
    ),
    "llama tied, a head per key": (
        "Llama",
        dict(num_key_value_heads=4, intermediate_size=20, tie_word_embeddings=True),
        dict(n_kv_heads=4, d_ff=20, num_experts=0, qk_norm=None, tie_embeddings=True),
    ),
}


def transformers_weights(model):
    """Our weights under the names of transformers 5 (whose experts are fused as ours are)."""
    config = model.config
    query, key = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    state = {"model.embed_tokens.weight": model.embedding.weight, "model.norm.weight": model.norm.weight}
    state["lm_head.weight"] = model.head_weight
    for layer, block in enumerate(model.blocks):
        own = {
            "input_layernorm.weight": block.attention_norm.weight,
            "post_attention_layernorm.weight": block.mlp_norm.weight,
        }
        own |= {f"self_attn.o_proj.{kind}": part for kind, part in block.attention.output.named_parameters()}
        for kind, fused in block.attention.qkv.named_parameters():
            for name, part in zip("qkv", fused.split([query, key, key]), strict=True):
                own[f"self_attn.{name}_proj.{kind}"] = part
        if config.qk_norm:
            own["self_attn.q_norm.weight"] = block.attention.query_norm.weight
            own["self_attn.k_norm.weight"] = block.attention.key_norm.weight
        if config.is_moe(layer):
            own["mlp.gate.weight"] = block.mlp.router.weight
            own["mlp.experts.gate_up_proj"] = block.mlp.experts.gate_up
            own["mlp.experts.down_proj"] = block.mlp.experts.down
            if block.mlp.shared is not None:
                own |= dense_weights("mlp.shared_expert", block.mlp.shared)
                own["mlp.shared_expert_gate.weight"] = block.mlp.shared_gate.weight
        else:
            own |= dense_weights("mlp", block.mlp)
        state |= {f"model.layers.{layer}.{name}": weight for name, weight in own.items()}
    return state


def dense_weights(prefix, mlp):
    weights = {}
    for kind, fused in mlp.gate_up.named_parameters():  # weight, and bias where there is one
        gate, up = fused.chunk(2)
        weights |= {f"{prefix}.gate_proj.{kind}": gate, f"{prefix}.up_proj.{kind}": up}
        weights[f"{prefix}.down_proj.{kind}"] = getattr(mlp.down, kind)
    return weights


def build_pair(name, tiny_model, dtype):
    prefix, theirs, ours = CASES[name]
    model = tiny_model(dtype, **{**OURS, **ours})
    config = getattr(transformers, f"{prefix}Config")(**SIZES, **theirs)
    config._experts_implementation = "eager"  # its loop; the grouped product has no float64
    with torch.no_grad():
        reference = getattr(transformers, f"{prefix}ForCausalLM")(config).to(dtype).eval()
        reference.load_state_dict(transformers_weights(model), strict=True)
    return model, reference


def tokens_of(model, seed=5):
    return torch.randint(model.config.vocab_size, (3, 29), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_logits_equal_transformers(name, tiny_model):
    model, reference = build_pair(name, tiny_model, torch.float32)
    tokens = tokens_of(model)
    torch.testing.assert_close(model(tokens), reference(tokens).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_logits_equal_transformers_to_the_last_digits(name, tiny_model):
    """In float64, with what transformers computes in float32 by force put aside."""
    model, reference = build_pair(name, tiny_model, torch.float64)
    compute_in_double(reference)
    tokens = tokens_of(model)
    torch.testing.assert_close(model(tokens), reference(tokens).logits, atol=1e-10, rtol=1e-10)


def compute_in_double(reference):
    """Norms in float64; the router wholly in float32, as ours is."""
    for module in list(reference.modules()):
        for name, child in module.named_children():
            if type(child).__name__.endswith("RMSNorm"):
                norm = nn.RMSNorm(child.weight.shape[0], eps=child.variance_epsilon)
                norm.weight = child.weight
                setattr(module, name, norm)
            elif type(child).__name__.endswith("TopKRouter"):
                child.float().register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
