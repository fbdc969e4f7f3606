"""Models that transformers made, saved and loaded here, compute what they compute there; and go back unchanged."""

import copy
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from layerskip_moe.generation import Autoregressive, SelfSpeculative, generate
from layerskip_moe.nn import KVCache, MoEDecoder
from layerskip_moe.pretrained import quantize

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

SIZES = dict(
    vocab_size=37, hidden_size=16, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=3,
    intermediate_size=20, max_position_embeddings=64, num_experts_per_tok=2,
    pad_token_id=None, bos_token_id=None, eos_token_id=None,
)  # fmt: skip
MIXTRAL = dict(num_local_experts=4)
OLMOE = dict(num_experts=5)
QWEN2_MOE = dict(num_experts=5, moe_intermediate_size=12, shared_expert_intermediate_size=10)
QWEN3_MOE = dict(num_experts=5, moe_intermediate_size=12, head_dim=6)
QWEN3 = dict(head_dim=6)

LINEAR = dict(rope_type="linear", rope_theta=500.0, factor=2.5)
LLAMA3 = dict(
    rope_type="llama3", rope_theta=1000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=16,
)  # fmt: skip
YARN = dict(rope_type="yarn", rope_theta=300.0, factor=4.0, original_max_position_embeddings=16)
SLIDING = dict(use_sliding_window=True, sliding_window=6)

# name: (family, its fields)
CASES = {
    "mixtral": ("mixtral", MIXTRAL),
    "mixtral, own head width, one expert chosen": ("mixtral", MIXTRAL | dict(head_dim=8, num_experts_per_tok=1)),
    "mixtral, sliding window": ("mixtral", MIXTRAL | dict(sliding_window=6)),
    "mixtral, yarn": ("mixtral", MIXTRAL | dict(rope_parameters=YARN, head_dim=4)),
    "mixtral, tied": ("mixtral", MIXTRAL | dict(tie_word_embeddings=True)),
    "mixtral, linear": ("mixtral", MIXTRAL | dict(rope_parameters=LINEAR)),
    "mixtral, llama3": ("mixtral", MIXTRAL | dict(rope_parameters=LLAMA3)),
    "olmoe": ("olmoe", OLMOE),
    "olmoe, heads of their own": ("olmoe", OLMOE | dict(num_key_value_heads=None)),
    "olmoe, clipped": ("olmoe", OLMOE | dict(clip_qkv=0.4)),
    "olmoe, normalised, biases": ("olmoe", OLMOE | dict(norm_topk_prob=True, attention_bias=True)),
    "olmoe, linear": ("olmoe", OLMOE | dict(rope_parameters=LINEAR)),
    "olmoe, llama3, tied": ("olmoe", OLMOE | dict(rope_parameters=LLAMA3, tie_word_embeddings=True)),
    "olmoe, yarn": ("olmoe", OLMOE | dict(rope_parameters=YARN)),
    "qwen2_moe": ("qwen2_moe", QWEN2_MOE),
    "qwen2_moe, normalised, no biases": ("qwen2_moe", QWEN2_MOE | dict(norm_topk_prob=True, qkv_bias=False)),
    "qwen2_moe, sliding window": ("qwen2_moe", QWEN2_MOE | SLIDING | dict(max_window_layers=3)),
    "qwen2_moe, every other layer": ("qwen2_moe", QWEN2_MOE | dict(decoder_sparse_step=2, tie_word_embeddings=True)),
    "qwen2_moe, linear, some dense": ("qwen2_moe", QWEN2_MOE | dict(rope_parameters=LINEAR, mlp_only_layers=[1])),
    "qwen2_moe, llama3": ("qwen2_moe", QWEN2_MOE | dict(rope_parameters=LLAMA3)),
    "qwen2_moe, yarn, own head width": ("qwen2_moe", QWEN2_MOE | dict(rope_parameters=YARN, head_dim=6)),
    "qwen3_moe": ("qwen3_moe", QWEN3_MOE | dict(norm_topk_prob=True)),
    "qwen3_moe, not normalised, biases": ("qwen3_moe", QWEN3_MOE | dict(attention_bias=True)),
    "qwen3_moe, sliding window": ("qwen3_moe", QWEN3_MOE | SLIDING),
    "qwen3_moe, some dense": ("qwen3_moe", QWEN3_MOE | dict(mlp_only_layers=[1])),
    "qwen3_moe, every other layer": ("qwen3_moe", QWEN3_MOE | dict(decoder_sparse_step=2)),
    "qwen3_moe, yarn": ("qwen3_moe", QWEN3_MOE | dict(rope_parameters=YARN | dict(attention_factor=0.7))),
    "qwen3_moe, tied": ("qwen3_moe", QWEN3_MOE | dict(tie_word_embeddings=True)),
    "qwen3_moe, linear": ("qwen3_moe", QWEN3_MOE | dict(rope_parameters=LINEAR)),
    "qwen3_moe, llama3": ("qwen3_moe", QWEN3_MOE | dict(rope_parameters=LLAMA3)),
    "llama": ("llama", {}),
    "llama, heads of their own": ("llama", dict(num_key_value_heads=None)),
    "llama, one key head, own width": ("llama", dict(num_key_value_heads=1, head_dim=10)),
    "llama, biases": ("llama", dict(attention_bias=True, mlp_bias=True)),
    "llama, linear, biases of the MLP alone": ("llama", dict(rope_parameters=LINEAR, mlp_bias=True)),
    "llama, llama3": ("llama", dict(rope_parameters=LLAMA3, tie_word_embeddings=True)),
    "llama, yarn untruncated": ("llama", dict(rope_parameters=YARN | dict(truncate=False, beta_fast=4.0))),
    "qwen3": ("qwen3", QWEN3),
    "qwen3, sliding window in some layers": ("qwen3", QWEN3 | SLIDING | dict(max_window_layers=1)),
    "qwen3, biases, tied": ("qwen3", QWEN3 | dict(attention_bias=True, tie_word_embeddings=True)),
    "qwen3, linear": ("qwen3", QWEN3 | dict(rope_parameters=LINEAR)),
    "qwen3, llama3": ("qwen3", QWEN3 | dict(rope_parameters=LLAMA3)),
    "qwen3, yarn": ("qwen3", QWEN3 | dict(rope_parameters=YARN)),
}
ONE_OF_EACH = ["mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "llama", "qwen3"]


def their_model(name, dtype=torch.float32):
    """Every parameter drawn, so that biases count, and wide enough for logits to differ."""
    family, changes = CASES[name]
    config = transformers.AutoConfig.for_model(family, **SIZES | changes)
    model = transformers.AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            drawn = 0.2 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(drawn + 1.0 if parameter_name.endswith("norm.weight") else drawn)
    return model.to(dtype).eval()


def rows_of_text(lengths=(9, 5, 12), steps=20):
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(SIZES["vocab_size"], (length + steps,), generator=generator) for length in lengths]


def stepwise(model, rows, prompts):
    """Our logits and routers' choices for every position of each row: the prompts as one ragged batch, then a cached
    step for each further token."""
    steps = len(rows[0]) - prompts[0]
    cache = KVCache(model.config, batch_size=len(rows), capacity=max(map(len, rows)))
    batch = torch.nn.utils.rnn.pad_sequence([row[:length] for row, length in zip(rows, prompts, strict=True)]).T
    logits, chosen = [[] for _ in rows], [{} for _ in rows]
    for step in range(steps + 1):
        if step == 0:
            tokens, positions = batch, torch.arange(batch.shape[1]).expand(batch.shape)
        else:
            positions = torch.tensor(prompts)[:, None] + step - 1
            tokens = torch.stack([row[position] for row, position in zip(rows, positions, strict=True)])
        out = model.run(model.embed(tokens), range(model.config.n_layers), positions=positions, cache=cache)
        for index, length in enumerate(prompts if step == 0 else [1] * len(rows)):
            logits[index].append(model.unembed(out.hidden[index, :length]))
            for layer, routing in out.routing.items():
                choice = routing.chosen.view(*tokens.shape, -1)[index, :length].sort().values
                chosen[index].setdefault(layer, []).append(choice)
    joined = [{layer: torch.cat(parts) for layer, parts in by_layer.items()} for by_layer in chosen]
    return [torch.cat(parts) for parts in logits], joined


def their_stepwise(reference, row, prompt):
    """The same of transformers, for one row, with its own cache."""
    has_experts = hasattr(reference.config, "router_aux_loss_coef")
    asked = dict(use_cache=True, **(dict(output_router_logits=True) if has_experts else {}))
    out = reference(row[None, :prompt], **asked)
    logits, routers = [out.logits[0]], [out.router_logits] if has_experts else []
    for position in range(prompt, len(row)):
        out = reference(row[None, position : position + 1], past_key_values=out.past_key_values, **asked)
        logits.append(out.logits[0])
        if has_experts:
            routers.append(out.router_logits)
    chosen = []
    for layer_logits in zip(*routers, strict=True):  # of the layers with experts, in order
        joined = torch.cat([part.reshape(-1, part.shape[-1]) for part in layer_logits])
        chosen.append(joined.topk(reference.config.num_experts_per_tok).indices.sort().values)
    return torch.cat(logits), chosen


def assert_close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


def tensors_in(folder):
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def write_weights(folder, state):
    save_file(state, folder / "model.safetensors")


def assert_equal_tensors(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_what_transformers_saved_computes_the_same_here_and_goes_back(name, tmp_path):
    reference = their_model(name)
    reference.save_pretrained(tmp_path / "theirs")
    model = MoEDecoder.from_pretrained(tmp_path / "theirs")
    prompts = (9, 5, 12)
    rows = rows_of_text(prompts)
    logits, chosen = stepwise(model, rows, prompts)
    for index, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        their_logits, their_chosen = their_stepwise(reference, row, prompt)
        assert float(their_logits.std()) > 0.1
        assert_close(logits[index], their_logits)
        assert_close(model(row[None])[0], their_logits)
        assert len(chosen[index]) == len(their_chosen)
        for ours, theirs in zip(chosen[index].values(), their_chosen, strict=True):
            assert torch.equal(ours, theirs)

    model.save_pretrained(tmp_path / "ours")
    assert_equal_tensors(tensors_in(tmp_path / "ours"), tensors_in(tmp_path / "theirs"))
    # Copied, because transformers computes on the mapped file, where sums over unaligned weights round otherwise.
    back = copy.deepcopy(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours"))
    assert torch.equal(back(rows[0][None]).logits, reference(rows[0][None]).logits)
    again = MoEDecoder.from_pretrained(tmp_path / "ours")
    assert again.config == model.config


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", [*ONE_OF_EACH, "qwen2_moe, every other layer", "qwen3, biases, tied"])
@torch.no_grad()
def test_half_precision_comes_and_goes_bit_for_bit(name, dtype, tmp_path):
    their_model(name, dtype).save_pretrained(tmp_path / "theirs")
    model = MoEDecoder.from_pretrained(tmp_path / "theirs")
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    model.save_pretrained(tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    assert_equal_tensors(tensors_in(tmp_path / "ours"), tensors_in(tmp_path / "theirs"))
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", dtype=torch.float32)
    widened, tokens = MoEDecoder.from_pretrained(tmp_path / "theirs", dtype=torch.float32), rows_of_text()[0][None]
    assert_close(widened(tokens), reference(tokens).logits)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_fused_experts_and_shards_are_the_same_model(name, tmp_path):
    reference = their_model(name)
    reference.save_pretrained(tmp_path / "plain")
    reference.save_pretrained(tmp_path / "fused", save_original_format=False)
    reference.save_pretrained(tmp_path / "sharded", max_shard_size="5KB")
    fused = any(stored.endswith("experts.gate_up_proj") for stored in tensors_in(tmp_path / "fused"))
    assert fused == (name not in ("llama", "qwen3"))  # which have no experts
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    plain = MoEDecoder.from_pretrained(tmp_path / "plain").state_dict()
    for kind in ("fused", "sharded"):
        assert_equal_tensors(MoEDecoder.from_pretrained(tmp_path / kind).state_dict(), plain)


@pytest.mark.parametrize("name", [*ONE_OF_EACH, "mixtral, sliding window", "olmoe, clipped", "qwen3_moe, yarn"])
def test_a_loaded_model_drafts_for_itself_without_changing_its_text(name, tmp_path):
    their_model(name).save_pretrained(tmp_path)
    model = MoEDecoder.from_pretrained(tmp_path)
    prompts = [row.tolist() for row in rows_of_text(steps=0)]
    for exit_layer, temperature, draft in ((1, 0.0, None), (2, 0.9, None), (3, 0.9, quantize(model, "int8"))):
        settings = dict(max_new_tokens=12, seed=5, temperature=temperature)
        strategy = SelfSpeculative(exit_layer=exit_layer, draft_length=3, draft_model=draft)
        plain = generate(model, prompts, Autoregressive(), **settings)
        drafted = generate(model, prompts, strategy, **settings)
        assert drafted.tokens == plain.tokens and drafted.stats.drafted > 0


# What files say in other ways


@torch.no_grad()
def test_rotary_frequencies_and_a_tied_head_that_old_files_carry_are_passed_by(tmp_path):
    reference = their_model("qwen3_moe, tied")
    reference.save_pretrained(tmp_path)
    state = tensors_in(tmp_path)
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(3)
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    write_weights(tmp_path, state)
    model = MoEDecoder.from_pretrained(tmp_path)
    tokens = rows_of_text()[0][None]
    assert_close(model(tokens), reference(tokens).logits)
    state["lm_head.weight"][0, 0] += 1
    write_weights(tmp_path, state)
    with pytest.raises(ValueError, match=r"holds a head that is not the embedding, though config\.json ties them"):
        MoEDecoder.from_pretrained(tmp_path)


def write_in_types(folder, kinds, otherwise):
    """Store the model in folder anew, each tensor in the type of the first part of a name that its own holds."""
    state = {
        name: tensor.to(next((kind for part, kind in kinds.items() if part in name), otherwise))
        for name, tensor in tensors_in(folder).items()
    }
    write_weights(folder, state)
    return state


@pytest.mark.filterwarnings("ignore:Mismatch dtype")  # of a norm: torch says that it will be slower
@torch.no_grad()
def test_routers_and_norms_may_be_of_another_type(tmp_path):
    their_model("qwen3_moe").save_pretrained(tmp_path)
    write_in_types(tmp_path, {"norm.": torch.float32, "mlp.gate.": torch.float32}, torch.bfloat16)
    model = MoEDecoder.from_pretrained(tmp_path)
    block = model.blocks[0]
    wide = (block.mlp.router.weight, block.attention.key_norm.weight, block.mlp_norm.weight, model.norm.weight)
    assert {parameter.dtype for parameter in wide} == {torch.float32}
    assert block.mlp.experts.down.dtype == model.dtype == torch.bfloat16
    tokens = rows_of_text()[0][None]
    exact = MoEDecoder.from_pretrained(tmp_path, dtype=torch.float32)(tokens)
    assert (model(tokens) - exact).norm() < 0.1 * exact.norm()


def test_parts_of_several_types_become_what_holds_them_all(tmp_path):
    their_model("mixtral", torch.bfloat16).save_pretrained(tmp_path)
    exact = MoEDecoder.from_pretrained(tmp_path, dtype=torch.float32)
    kinds = {".w1.": torch.bfloat16, ".q_proj.": torch.float16, ".k_proj.": torch.bfloat16, ".v_proj.": torch.bfloat16}
    write_in_types(tmp_path, kinds, torch.float32)
    model = MoEDecoder.from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert_equal_tensors(model.state_dict(), exact.state_dict())


@pytest.mark.parametrize("name, part", [("mixtral", ".w3."), ("qwen2_moe", "q_proj.bias"), ("llama", "embed_tokens")])
@torch.no_grad()
def test_weights_of_several_types_are_named_and_load_once_a_type_is_given(name, part, tmp_path):
    their_model(name).save_pretrained(tmp_path)
    state = write_in_types(tmp_path, {part: torch.float32}, torch.bfloat16)
    wide = [stored for stored in state if part in stored]
    with pytest.raises(ValueError, match=r"in several types \(.*\), .*; give dtype=, say torch\.bfloat16") as caught:
        MoEDecoder.from_pretrained(tmp_path)
    assert f"F32: {wide[0]}" in str(caught.value) and "BF16: " in str(caught.value)
    model = MoEDecoder.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model(rows_of_text()[0][None]).isfinite().all()


def test_what_cannot_be_computed_exactly_is_named_with_its_file(tmp_path):
    their_model("llama").save_pretrained(tmp_path)
    contents = json.loads((tmp_path / "config.json").read_text())
    for change, word in (({"model_type": "gpt2"}, "gpt2"), ({"hidden_act": "gelu"}, "hidden_act='gelu'")):
        (tmp_path / "config.json").write_text(json.dumps(contents | change))
        with pytest.raises(ValueError, match=word) as caught:
            MoEDecoder.from_pretrained(tmp_path)
        assert str(caught.value).startswith(f"{tmp_path / 'config.json'}: ")
    (tmp_path / "config.json").write_text(json.dumps(contents))
    write_weights(tmp_path, tensors_in(tmp_path) | {"model.norm.weight": torch.ones(16, dtype=torch.int8)})
    with pytest.raises(ValueError, match=r"stores model\.norm\.weight as I8"):
        MoEDecoder.from_pretrained(tmp_path)


def test_a_type_that_is_no_number_to_compute_in_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"torch\.int8 cannot be computed in"):
        MoEDecoder.from_pretrained(tmp_path, dtype=torch.int8)
