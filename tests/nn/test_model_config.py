"""ModelConfig: derived sizes, which layers hold experts, and one helpful sentence for each mistake."""

import dataclasses

import pytest

from layerskip_moe.nn import ModelConfig, MoEDecoder

LLAMA3_BACKWARDS = dict(rope_scaling=dict(kind="llama3", factor=2.0, original_max_seq_len=8, low_freq_factor=4.0))
WRONG = [
    ("vocab_size", dict(vocab_size=0)),
    ("vocab_size", dict(vocab_size=-3)),
    ("vocab_size", dict(vocab_size=10.0)),
    ("n_layers", dict(n_layers=0)),
    ("n_layers", dict(n_layers=True)),
    ("n_layers", dict(n_layers="4")),
    ("d_model", dict(d_model=0)),
    ("n_heads", dict(n_heads=0)),
    ("max_seq_len", dict(max_seq_len=0)),
    ("n_kv_heads", dict(n_kv_heads=0)),
    ("n_kv_heads", dict(n_kv_heads=3)),
    ("n_kv_heads", dict(n_kv_heads=8)),
    ("head_dim", dict(head_dim=7)),
    ("head_dim", dict(head_dim=0)),
    ("head_dim", dict(d_model=30, n_heads=4)),
    ("head_dim", dict(d_model=12, n_heads=4)),
    ("d_ff", dict(d_ff=0)),
    ("d_ff", dict(d_ff=1.5)),
    ("dense_d_ff", dict(dense_d_ff=-1)),
    ("num_experts", dict(num_experts=-1)),
    ("top_k", dict(top_k=0)),
    ("top_k", dict(top_k=9)),
    ("top_k", dict(num_experts=1)),
    ("moe_layers", dict(moe_layers="every third")),
    ("moe_layers", dict(moe_layers=(0, 8))),
    ("moe_layers", dict(moe_layers=(-1,))),
    ("moe_layers", dict(moe_layers=[1.0])),
    ("moe_layers", dict(moe_layers=3)),
    ("shared_expert_d_ff", dict(shared_expert_d_ff=-2)),
    ("shared_expert_d_ff", dict(num_experts=0, shared_expert_d_ff=8)),
    ("shared_expert_gate", dict(shared_expert_gate=True)),
    ("shared_expert_gate", dict(shared_expert_gate=True, num_experts=0)),
    ("bias_balancing", dict(num_experts=0, bias_balancing=True)),
    ("router_average", dict(router_average=1.0)),
    ("router_average", dict(router_average=-0.5)),
    ("router_average", dict(router_average="0.5")),
    ("router_average", dict(router_average=float("nan"))),
    ("router_average", dict(num_experts=0, router_average=0.5)),
    ("router_hold", dict(router_hold=0)),
    ("router_hold", dict(router_hold=2.0)),
    ("router_hold", dict(num_experts=0, router_hold=2)),
    ("qk_norm", dict(qk_norm="both")),
    ("qk_norm", dict(qk_norm=True)),
    ("tie_embeddings", dict(tie_embeddings="false")),
    ("normalize_top_k", dict(normalize_top_k=None)),
    ("qkv_bias", dict(qkv_bias=1)),
    ("output_bias", dict(output_bias=1)),
    ("mlp_bias", dict(mlp_bias="yes", num_experts=0)),
    ("mlp_bias", dict(mlp_bias=True)),
    ("clip_qkv", dict(clip_qkv=-1.0)),
    ("clip_qkv", dict(clip_qkv="8")),
    ("sliding_window", dict(sliding_window=0)),
    ("sliding_window", dict(sliding_layers=(0,))),
    ("sliding_layers", dict(sliding_window=3, sliding_layers=(8,))),
    ("sliding_layers", dict(sliding_window=3, sliding_layers="some")),
    ("rope_scaling", dict(rope_scaling="yarn")),
    ("rope_scaling", dict(rope_scaling=dict(kind="ntk", factor=2.0))),
    ("rope_scaling", dict(rope_scaling=dict(kind="linear", factor=0.0))),
    ("rope_scaling", dict(rope_scaling=dict(kind="yarn", factor=2.0))),
    ("rope_scaling", dict(rope_scaling=dict(kind="linear", factor=2.0, slope=3))),
    ("low_freq_factor", LLAMA3_BACKWARDS),
    ("rope_theta", dict(rope_theta=0)),
    ("rope_theta", dict(rope_theta="10000")),
    ("rope_theta", dict(rope_theta=1.0, rope_scaling=dict(kind="yarn", factor=2.0, original_max_seq_len=8))),
    ("rope_theta", dict(rope_theta=float("inf"))),
    ("norm_eps", dict(norm_eps=0.0)),
    ("norm_eps", dict(norm_eps=float("nan"))),
    ("init_std", dict(init_std=-0.1)),
    ("init_std", dict(init_std=0)),
    ("dropout", dict(dropout=1.0)),
    ("dropout", dict(dropout=-0.1)),
    ("dropout", dict(dropout=float("nan"))),
    ("dropout", dict(dropout="0.1")),
]


@pytest.mark.parametrize(("field", "change"), WRONG, ids=[f"{field}: {change}" for field, change in WRONG])
def test_a_mistake_gets_one_sentence_naming_the_field(field, change):
    with pytest.raises(ValueError, match=rf"\b{field}\b") as caught:
        ModelConfig(**{"vocab_size": 100, **change})
    sentence = str(caught.value)
    assert sentence.endswith(".") and "\n" not in sentence and 25 < len(sentence) < 200


def test_every_field_has_a_mistake_above():
    assert {field.name for field in dataclasses.fields(ModelConfig)} == {field for field, _ in WRONG} - {
        "low_freq_factor"
    }


def test_what_is_left_out_follows_from_the_rest():
    config = ModelConfig(vocab_size=100, d_model=48, n_heads=6)
    assert (config.n_kv_heads, config.head_dim, config.d_ff, config.dense_d_ff) == (6, 8, 96, 96)
    config = ModelConfig(vocab_size=100, d_model=48, n_heads=6, n_kv_heads=2, d_ff=20)
    assert (config.n_kv_heads, config.d_ff, config.dense_d_ff) == (2, 20, 20)
    assert ModelConfig(vocab_size=100, d_ff=20, dense_d_ff=64).dense_d_ff == 64


def test_head_dim_is_free_of_d_model_when_given():
    config = ModelConfig(vocab_size=10, n_layers=1, d_model=10, n_heads=3, head_dim=4)
    attention = MoEDecoder(config).blocks[0].attention
    assert attention.qkv.weight.shape == (36, 10) and attention.output.weight.shape == (10, 12)


@pytest.mark.parametrize(
    ("switches", "moe"),
    [
        (dict(), [0, 1, 2, 3, 4]),
        (dict(moe_layers="all"), [0, 1, 2, 3, 4]),
        (dict(moe_layers="every other"), [1, 3]),
        (dict(moe_layers="first half"), [0, 1]),
        (dict(moe_layers="last half"), [3, 4]),
        (dict(moe_layers=(0, 3)), [0, 3]),
        (dict(moe_layers=[4, 2]), [2, 4]),
        (dict(moe_layers=()), []),
        (dict(num_experts=0), []),
        (dict(num_experts=0, moe_layers=(0,)), []),
    ],
    ids=str,
)
def test_which_layers_hold_experts(switches, moe):
    config = ModelConfig(vocab_size=10, n_layers=5, d_model=8, n_heads=2, **switches)
    assert [layer for layer in range(5) if config.is_moe(layer)] == moe
    assert [layer for layer, block in enumerate(MoEDecoder(config).blocks) if hasattr(block.mlp, "router")] == moe


def test_a_config_survives_its_own_fields():
    config = ModelConfig(vocab_size=10, moe_layers=[1, 2], d_model=24, n_heads=4)
    assert ModelConfig(**dataclasses.asdict(config)) == config
    assert hash(config) == hash(ModelConfig(**dataclasses.asdict(config)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.n_layers = 3


def test_a_half_is_kept_as_its_indices():
    assert ModelConfig(vocab_size=10, n_layers=6, moe_layers="first half").moe_layers == (0, 1, 2)
    assert ModelConfig(vocab_size=10, n_layers=6, moe_layers="last half").moe_layers == (3, 4, 5)
    assert ModelConfig(vocab_size=10, n_layers=1, moe_layers="last half").moe_layers == ()
