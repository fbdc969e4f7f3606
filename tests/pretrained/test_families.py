"""config.json is read as transformers reads it, or refused by name; what is written says the same network."""

import dataclasses
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layerskip_moe.nn import ModelConfig, RopeScaling
from layerskip_moe.pretrained.families import FAMILIES, family_of, obstacles, read_config, write_config

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

SIZES = dict(
    vocab_size=37, hidden_size=16, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=4,
    intermediate_size=20, max_position_embeddings=64,
)  # fmt: skip
EXPERTS = dict(num_experts_per_tok=2)
CONTENTS = {
    "mixtral": SIZES | EXPERTS | dict(num_local_experts=4),
    "olmoe": SIZES | EXPERTS | dict(num_experts=6),
    "qwen2_moe": SIZES | EXPERTS | dict(num_experts=5, moe_intermediate_size=12, shared_expert_intermediate_size=10),
    "qwen3_moe": SIZES | EXPERTS | dict(num_experts=5, moe_intermediate_size=12, head_dim=6),
    "llama": SIZES,
    "qwen3": SIZES | dict(head_dim=8),
}
# Fields of transformers' classes that change nothing about the logits.
WITHOUT_EFFECT = {
    "attention_dropout", "bos_token_id", "eos_token_id", "output_router_logits", "pad_token_id", "pretraining_tp",
    "router_aux_loss_coef", "router_jitter_noise", "use_cache",
}  # fmt: skip


def contents_of(family, **changes):
    return {"model_type": family} | CONTENTS[family] | changes


def read(family, **changes):
    name, config = read_config(contents_of(family, **changes))
    assert name == family
    return config


def their_class(family):
    return type(transformers.AutoConfig.for_model(family))


def theirs(family, **changes):
    return their_class(family)(**CONTENTS[family], **changes)


def expert_layers(config):
    return [config.is_moe(layer) for layer in range(config.n_layers)]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_defaults_are_those_of_transformers(family):
    own = {field.name: field.default for field in dataclasses.fields(their_class(family))}
    for name, value in FAMILIES[family].defaults.items():
        default = their_class(family)().rope_parameters["rope_theta"] if name == "rope_theta" else own[name]
        assert default == value and type(default) is type(value), name


@pytest.mark.skipif(not transformers.__version__.startswith("5.23."), reason="written for the fields of 5.23")
@pytest.mark.parametrize("family", FAMILIES)
def test_no_field_of_transformers_is_overlooked(family):
    inherited = {field.name for field in dataclasses.fields(transformers.PreTrainedConfig)} - {"tie_word_embeddings"}
    fields = {field.name for field in dataclasses.fields(their_class(family))} - inherited - WITHOUT_EFFECT
    assert fields - {"rope_parameters"} == FAMILIES[family].defaults.keys() - {"rope_theta"}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_that_says_nothing_is_the_family_as_transformers_has_it(family):
    name, config = read_config({"model_type": family})
    their = their_class(family)()
    assert name == family
    assert (config.vocab_size, config.d_model, config.n_layers) == (
        their.vocab_size,
        their.hidden_size,
        their.num_hidden_layers,
    )
    assert (config.n_heads, config.n_kv_heads) == (their.num_attention_heads, their.num_key_value_heads)
    assert config.head_dim == (getattr(their, "head_dim", None) or their.hidden_size // their.num_attention_heads)
    assert (config.max_seq_len, config.norm_eps) == (their.max_position_embeddings, their.rms_norm_eps)


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_are_read_under_their_names(family):
    config = read(family, rms_norm_eps=1e-3, tie_word_embeddings=True, initializer_range=0.5, rope_theta=777.0)
    assert (config.vocab_size, config.d_model, config.n_layers, config.max_seq_len) == (37, 16, 4, 64)
    assert (config.n_heads, config.n_kv_heads) == (4, 2)
    assert config.head_dim == CONTENTS[family].get("head_dim", 4)
    assert (config.norm_eps, config.tie_embeddings, config.init_std, config.rope_theta) == (1e-3, True, 0.5, 777.0)
    assert config.num_experts == CONTENTS[family].get("num_experts", CONTENTS[family].get("num_local_experts", 0))
    if config.num_experts:
        assert (config.top_k, config.d_ff) == (2, CONTENTS[family].get("moe_intermediate_size", 20))
    if not all(expert_layers(config)) or "moe_intermediate_size" in CONTENTS[family]:
        assert config.dense_d_ff == 20
    assert config.shared_expert_d_ff == CONTENTS[family].get("shared_expert_intermediate_size", 0)
    assert config.shared_expert_gate is (family == "qwen2_moe")


def test_what_a_family_settles_is_set():
    norms = {family: read(family).qk_norm for family in FAMILIES}
    assert norms == dict(mixtral=None, olmoe="full", qwen2_moe=None, qwen3_moe="head", llama=None, qwen3="head")
    assert read("mixtral").normalize_top_k and not read("olmoe").normalize_top_k
    for family in ("olmoe", "qwen2_moe", "qwen3_moe"):
        assert read(family, norm_topk_prob=True).normalize_top_k
    assert read("olmoe").clip_qkv is None and read("olmoe", clip_qkv=0.5).clip_qkv == 0.5
    assert not read("qwen2_moe", qkv_bias=False).qkv_bias


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("switch", ["attention_bias", "qkv_bias", "mlp_bias"])
def test_biases_are_those_of_the_model(family, switch):
    """Also where a family does not know the switch: transformers passes it by."""
    config = read(family, **{switch: True})
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(theirs(family, **{switch: True}))
    names = [name for name, _ in model.named_parameters()]
    assert config.qkv_bias == ("model.layers.0.self_attn.q_proj.bias" in names)
    assert config.output_bias == ("model.layers.0.self_attn.o_proj.bias" in names)
    assert config.mlp_bias == ("model.layers.0.mlp.down_proj.bias" in names)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("head_dim", [None, 10])
def test_head_dim_null_is_the_width_shared_out(family, head_dim):
    if family == "olmoe" and head_dim:
        with pytest.raises(ValueError, match="head_dim=10 does not fit olmoe"):
            read(family, head_dim=10)
        assert read(family, head_dim=4).head_dim == 4
    else:
        assert read(family, head_dim=head_dim).head_dim == (head_dim or 4)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_kv_heads_every_head_has_its_own(family):
    assert read(family, num_key_value_heads=None).n_kv_heads == 4


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "qwen3_moe"])
@pytest.mark.parametrize("field", ["num_experts", "num_local_experts"])
def test_the_number_of_experts_has_two_names(family, field):
    contents = {
        key: value for key, value in contents_of(family).items() if key not in ("num_experts", "num_local_experts")
    }
    assert read_config(contents | {field: 3})[1].num_experts == 3
    assert their_class(family)(**{field: 3}).num_experts == 3
    both = contents | {"num_experts": 3, "num_local_experts": 3}
    assert read_config(both)[1].num_experts == 3
    with pytest.raises(ValueError, match="must be the same"):
        read_config(both | {field: 4})


def test_qwen2_moe_has_one_name_for_it_as_in_transformers():
    assert read("qwen2_moe", num_local_experts=3).num_experts == 5
    assert theirs("qwen2_moe", num_local_experts=3).num_experts == 5


@settings(deadline=None, max_examples=25)
@given(
    family=st.sampled_from(["qwen2_moe", "qwen3_moe"]),
    step=st.integers(1, 5),
    dense=st.none() | st.lists(st.integers(0, 6), max_size=3),
)
def test_the_layers_with_experts_are_those_of_the_model(family, step, dense):
    changes = dict(decoder_sparse_step=step, mlp_only_layers=dense)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(theirs(family, **changes))
    assert expert_layers(read(family, **changes)) == [hasattr(layer.mlp, "experts") for layer in model.model.layers]


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe"])
def test_qwen_without_experts_is_dense(family):
    config = read(family, num_experts=0)
    assert not any(expert_layers(config)) and config.dense_d_ff == 20 and not config.shared_expert_d_ff


REFUSED = {
    "another architecture": ("llama", {"model_type": "gpt2"}, "model_type='gpt2'"),
    "none": ("llama", {"model_type": None}, "model_type=None"),
    "a nested one": ("llama", {"model_type": ["llama"]}, "model_type="),
    "a classifier": ("qwen3", {"architectures": ["Qwen3ForSequenceClassification"]}, "Qwen3ForSequenceClassification"),
    "a name": ("qwen3", {"architectures": "Qwen3ForCausalLM"}, "architectures='Qwen3ForCausalLM'"),
    "activation": ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
    "packed weights": ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config.*gptq"),
    "two directions": ("llama", {"is_causal": False}, "is_causal=False"),
    "chunks": ("llama", {"attention_chunk_size": 8}, "attention_chunk_size=8"),
    "layers of their own": ("llama", {"per_layer_config": {"1": {}}}, "per_layer_config"),
    "step": ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step=0"),
    "dense layers": ("qwen3_moe", {"mlp_only_layers": 3}, "mlp_only_layers=3"),
    "no experts": ("mixtral", {"num_local_experts": 0}, "num_local_experts=0"),
    "no experts either": ("olmoe", {"num_experts": 0}, "num_experts=0"),
    "null experts": ("qwen2_moe", {"num_experts": None}, "num_experts=None"),
    "null sizes": ("mixtral", {"intermediate_size": None}, "intermediate_size=None"),
    "a shared expert of no width": (
        "qwen2_moe", {"shared_expert_intermediate_size": 0}, "shared_expert_intermediate_size=0",
    ),
    "clip": ("olmoe", {"clip_qkv": -1.0}, "clip_qkv=-1.0"),
    # What ModelConfig refuses, in the file's words.
    "hidden_size": ("llama", {"hidden_size": "16"}, "hidden_size='16'"),
    "vocab_size": ("llama", {"vocab_size": 0}, "vocab_size=0"),
    "epsilon": ("llama", {"rms_norm_eps": None}, "rms_norm_eps=None"),
    "heads": (
        "llama", {"num_key_value_heads": 3}, "num_attention_heads=4 is not a multiple of num_key_value_heads=3",
    ),
    "chosen": ("mixtral", {"num_experts_per_tok": 9}, "num_experts_per_tok=9.*num_local_experts=4"),
    "odd": ("qwen3", {"head_dim": 7}, "head_dim=7 is odd"),
    "tied": ("llama", {"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes'"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_computed_exactly_is_refused_by_name(name):
    family, changes, words = REFUSED[name]
    with pytest.raises(ValueError, match=words) as caught:
        read_config(contents_of(family) | changes)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_dropout": 0.5, "router_jitter_noise": 0.1, "router_aux_loss_coef": 1.0, "use_cache": False},
        {"quantization_config": None, "architectures": None, "initializer_range": 0.0, "attn_logit_softcapping": 30.0},
        {"architectures": ["LlamaForCausalLM"], "pretraining_tp": 4, "eos_token_id": [1, 2], "dtype": "bfloat16"},
        {"rope_scaling": {"rope_type": "default", "factor": 4.0}, "partial_rotary_factor": 1.0, "hidden_act": "swish"},
        {"sliding_window": None, "layer_types": ["full_attention"] * 4, "clip_qkv": 3.0, "use_sliding_window": True},
    ],
)
def test_what_does_not_matter_is_passed_by(changes):
    config, plain = read("llama", **changes), read("llama")
    assert dataclasses.replace(config, init_std=1.0) == dataclasses.replace(plain, init_std=1.0)


# A random network that the family expresses, and the facts that two configs of one network share.


@st.composite
def networks(draw, family):
    n_kv_heads, group, head_dim = draw(st.integers(1, 2)), draw(st.integers(1, 3)), 2 * draw(st.integers(1, 4))
    n_heads, n_layers = n_kv_heads * group, draw(st.integers(1, 4))
    widths = {"olmoe": n_heads * head_dim, "llama": n_heads * draw(st.integers(1, 5))}
    some_layers = st.lists(st.integers(0, n_layers - 1), unique=True).map(lambda layers: tuple(sorted(layers)))
    fields = dict(
        vocab_size=draw(st.integers(1, 50)),
        n_layers=n_layers,
        d_model=widths.get(family) or draw(st.integers(1, 20)),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        d_ff=draw(st.integers(1, 9)),
        dense_d_ff=draw(st.integers(1, 9)),
        tie_embeddings=draw(st.booleans()),
        max_seq_len=draw(st.integers(1, 99)),
        rope_theta=draw(st.floats(2, 1e7) | st.integers(2, 99)),
        rope_scaling=draw(st.sampled_from(SCALINGS)),
        norm_eps=draw(st.floats(1e-9, 0.1) | st.just(1)),
        dropout=draw(st.floats(0, 0.5)),
        init_std=draw(st.floats(1e-3, 3.0) | st.just(2)),
        qk_norm={"olmoe": "full", "qwen3": "head", "qwen3_moe": "head"}.get(family),
    )
    if family in ("llama", "qwen3"):
        fields |= dict(num_experts=0, mlp_bias=family == "llama" and draw(st.booleans()))
    else:
        experts = draw(st.integers(1, 4))
        fields |= dict(num_experts=experts, top_k=draw(st.integers(1, experts)))
        fields |= dict(normalize_top_k=family == "mixtral" or draw(st.booleans()))
    if family in ("qwen2_moe", "qwen3_moe"):
        fields |= dict(
            moe_layers=draw(st.sampled_from(["all", "every other", "first half", "last half"]) | some_layers)
        )
    if family == "qwen2_moe":
        fields |= dict(
            shared_expert_d_ff=draw(st.integers(1, 9)), shared_expert_gate=True, qkv_bias=draw(st.booleans())
        )
    elif family != "mixtral":
        bias = draw(st.booleans())
        fields |= dict(qkv_bias=bias, output_bias=bias)
    if family == "olmoe":
        fields |= dict(clip_qkv=draw(st.none() | st.floats(0.1, 9) | st.just(1)))
    if family not in ("llama", "olmoe") and draw(st.booleans()):
        fields |= dict(sliding_window=draw(st.integers(1, 20)))
        if family in ("qwen2_moe", "qwen3"):
            fields |= dict(sliding_layers=draw(st.just("all") | some_layers))
    return ModelConfig(**fields)


SCALINGS = [
    None,
    RopeScaling("linear", 2, original_max_seq_len=7),
    RopeScaling("llama3", 8.0, 16, low_freq_factor=2, high_freq_factor=3.5),
    RopeScaling("yarn", 4, 16),
    RopeScaling("yarn", 1.5, 8, beta_fast=9, beta_slow=0.5, attention_factor=2, truncate=False),
]


def arithmetic(config):
    facts = dataclasses.asdict(config)
    for name in ("moe_layers", "sliding_layers", "sliding_window", "dropout", "init_std"):
        del facts[name]
    if facts["rope_scaling"] and facts["rope_scaling"]["kind"] == "linear":
        facts["rope_scaling"] = facts["rope_scaling"]["factor"]
    moe = [config.is_moe(layer) for layer in range(config.n_layers)]
    if config.num_experts == 0:
        del facts["top_k"], facts["normalize_top_k"], facts["d_ff"]
    if all(moe):
        del facts["dense_d_ff"]
    windows = [config.sliding_window if config.is_windowed(layer) else None for layer in range(config.n_layers)]
    return facts | dict(experts=moe, windows=windows)


@pytest.mark.parametrize("family", FAMILIES)
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_what_is_written_says_the_same_network(family, data):
    config = data.draw(networks(family))
    assert obstacles(config, family) == [] and family_of(config) == family
    contents = write_config(config, family)
    assert json.loads(json.dumps(contents)) == contents
    name, again = read_config(contents)
    assert name == family and arithmetic(again) == arithmetic(config)
    assert again.init_std == (min(config.init_std, 1.0) if family == "llama" else config.init_std)
    their = transformers.AutoConfig.for_model(**contents)  # the class that checks every field's type
    assert isinstance(their, their_class(family))
    name, again = read_config(json.loads(their.to_json_string()))
    assert name == family and arithmetic(again) == arithmetic(config)


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_reads_what_is_written_without_a_warning(family, caplog, monkeypatch):
    logger = transformers.logging.get_logger("transformers")
    monkeypatch.setattr(logger, "propagate", True)
    monkeypatch.setattr(logger, "level", 30)
    for scaling in (None, RopeScaling("linear", 2.0), RopeScaling("llama3", 8.0, 8), RopeScaling("yarn", 4.0, 16)):
        config = dataclasses.replace(read(family), rope_scaling=scaling)
        their = transformers.AutoConfig.for_model(**write_config(config, family))
        assert their.rope_parameters["rope_type"] == (scaling.kind if scaling else "default")
        assert (their.bos_token_id, their.eos_token_id, their.pad_token_id) == (None, None, None)
        assert their.hidden_act == "silu" and their.architectures == [FAMILIES[family].architecture]
    assert not caplog.records


def test_the_native_network_is_qwen3_moe():
    config = ModelConfig(vocab_size=99, dropout=0.1)
    assert family_of(config) == "qwen3_moe"
    assert write_config(config, "qwen3_moe")["norm_topk_prob"] is True


OBSTACLES = {
    "bias_balancing": ({"bias_balancing": True}, "qwen3_moe", "bias_balancing=True"),
    "routers' average": ({"router_average": 0.5}, "qwen3_moe", "router_average=0.5"),
    "routers' hold": ({"qk_norm": None, "router_hold": 2}, "mixtral", "router_hold=2"),
    "shared expert": ({"shared_expert_d_ff": 8}, "qwen3_moe", "shared_expert_d_ff=8"),
    "shared expert without a gate": (
        {"qk_norm": None, "shared_expert_d_ff": 8}, "qwen2_moe", "shared_expert_gate=False",
    ),
    "no shared expert": ({"qk_norm": None, "qkv_bias": True}, "qwen2_moe", "shared_expert_gate=False"),
    "dense": ({"num_experts": 0}, "qwen3_moe", "num_experts=0"),
    "experts": ({}, "qwen3", "num_experts=8"),
    "norm": ({"qk_norm": "full"}, "qwen3_moe", "qk_norm='full'"),
    "one bias": ({"qkv_bias": True}, "qwen3_moe", "qkv_bias=True with output_bias=False"),
    "other bias": ({"output_bias": True}, "qwen3_moe", "qkv_bias=False with output_bias=True"),
    "mlp_bias": ({"num_experts": 0, "mlp_bias": True}, "qwen3", "mlp_bias=True"),
    "clip": ({"clip_qkv": 1.0}, "qwen3_moe", "clip_qkv=1.0"),
    "window in some layers": (
        {"sliding_window": 4, "sliding_layers": (0, 2)}, "qwen3_moe", "sliding_layers=(0, 2)",
    ),
    "window": ({"num_experts": 0, "qk_norm": None, "sliding_window": 4}, "llama", "sliding_window=4"),
    "weights as they are": ({"qk_norm": None, "normalize_top_k": False}, "mixtral", "normalize_top_k=False"),
    "some dense layers": ({"qk_norm": None, "moe_layers": "every other"}, "mixtral", "moe_layers='every other'"),
    "dense layers first": ({"qk_norm": None, "n_layers": 4, "moe_layers": "last half"}, "mixtral", "moe_layers=(2, 3)"),
    "wide heads": ({"qk_norm": "full", "head_dim": 10}, "olmoe", "head_dim=10"),
    "uneven heads": ({"num_experts": 0, "qk_norm": None, "n_heads": 3, "head_dim": 4}, "llama", "n_heads=3"),
}  # fmt: skip


@pytest.mark.parametrize("name", OBSTACLES)
def test_what_stands_in_the_way_is_named(name):
    changes, family, phrase = OBSTACLES[name]
    config = ModelConfig(vocab_size=9, d_model=16, **changes)
    assert [found for found in obstacles(config, family) if found.startswith(phrase)] == obstacles(config, family)
    with pytest.raises(ValueError, match=f"{family} cannot express .*{phrase.split('=')[0]}") as caught:
        write_config(config, family)
    assert str(caught.value).endswith(".")
    assert family_of(config) is None or not obstacles(config, family_of(config))


def test_what_no_family_expresses_has_none():
    inexpressible = ("bias_balancing", "shared expert", "shared expert without a gate", "one bias", "wide heads")
    inexpressible += ("routers' average", "routers' hold")
    for name in inexpressible:
        assert family_of(ModelConfig(vocab_size=9, d_model=16, **OBSTACLES[name][0])) is None, name
    assert family_of(ModelConfig(vocab_size=9, num_experts=0)) == "qwen3"


def test_an_unknown_family_is_named():
    with pytest.raises(ValueError, match="family='gpt2' is unknown; it is one of qwen3_moe"):
        obstacles(ModelConfig(vocab_size=9), "gpt2")
