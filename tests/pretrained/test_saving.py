"""What is saved here opens in transformers, with no code of ours, as the same model."""

import json
import os

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from layerskip_moe.generation import Autoregressive, generate
from layerskip_moe.nn import ModelConfig, MoEDecoder
from layerskip_moe.pretrained import load_model, save_model

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

SIZES = dict(vocab_size=19, n_layers=3, d_model=16, n_heads=4, n_kv_heads=2, num_experts=4, d_ff=12, max_seq_len=64)
MIXTRAL = dict(qk_norm=None, moe_layers="all")
# name: (architecture, our settings)
CASES = {
    "native": ("Qwen3MoeForCausalLM", {}),
    "as main.py has it": ("Qwen3MoeForCausalLM", dict(dense_d_ff=24, moe_layers="every other", dropout=0.1)),
    "native, one layer": ("Qwen3MoeForCausalLM", dict(moe_layers=(1,), tie_embeddings=True, head_dim=10)),
    "native, window": ("Qwen3MoeForCausalLM", dict(sliding_window=5, rope_theta=300.0, norm_eps=1e-5)),
    "mixtral": ("MixtralForCausalLM", MIXTRAL),
    "olmoe": ("OlmoeForCausalLM", dict(qk_norm="full", normalize_top_k=False, clip_qkv=0.5)),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        dict(qk_norm=None, qkv_bias=True, shared_expert_d_ff=10, shared_expert_gate=True, normalize_top_k=False),
    ),
    "dense": ("Qwen3ForCausalLM", dict(num_experts=0)),
    "llama": (
        "LlamaForCausalLM",
        dict(
            num_experts=0,
            qk_norm=None,
            rope_scaling=dict(kind="llama3", factor=4.0, original_max_seq_len=16, low_freq_factor=0.5),
        ),
    ),
}


def make_model(name="native", seed=0):
    return MoEDecoder(ModelConfig(**{**SIZES, "init_std": 0.3, **CASES[name][1]}), seed=seed).eval()


def make_tokenizer():
    """Byte-level, nineteen tokens, the end of a text among them."""
    letters = list("abcdefghijklmnopqr")
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer


def opened(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_transformers_opens_it_as_the_same_model(name, tmp_path):
    architecture, _ = CASES[name]
    model = make_model(name)
    model.save_pretrained(tmp_path)
    reference = opened(tmp_path)
    assert type(reference).__name__ == architecture
    tokens = torch.randint(SIZES["vocab_size"], (3, 40), generator=torch.Generator().manual_seed(2))
    ours, theirs = model(tokens), reference(tokens).logits
    assert float(ours.std()) > 0.1
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize(
    "name", ["as main.py has it", "native, window", "mixtral", "olmoe", "qwen2_moe", "dense", "llama"]
)
@torch.no_grad()
def test_greedy_text_equals_generate_of_transformers(name, tmp_path):
    model = make_model(name)
    model.save_pretrained(tmp_path)
    reference = opened(tmp_path)
    lengths = (7, 2, 12, 5)
    tokens = torch.randint(SIZES["vocab_size"], (4, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[0] * (12 - length) + [1] * length for length in lengths])  # transformers pads on the left
    prompts = [row[12 - length :].tolist() for row, length in zip(tokens, lengths, strict=True)]
    ours = generate(model, prompts, Autoregressive(), max_new_tokens=30)
    theirs = reference.generate(tokens, attention_mask=mask, do_sample=False, max_new_tokens=30)
    assert ours.tokens == theirs[:, 12:].tolist()
    assert len({tuple(row) for row in ours.tokens}) > 1


@torch.no_grad()
def test_transformers_ends_a_text_where_we_do(tmp_path):
    model, tokenizer = make_model(), make_tokenizer()
    model.head.weight[18] *= 2.5  # so that texts end early
    model.save_pretrained(tmp_path, tokenizer=tokenizer)
    reference, their_tokenizer = opened(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert reference.generation_config.eos_token_id == reference.config.eos_token_id == 18
    assert reference.generation_config.bos_token_id is None
    texts, ended = ["abcd", "hello", "qrpo", "fed", "a", "kkk"], 0
    ours = generate(model, texts, Autoregressive(), tokenizer=tokenizer, max_new_tokens=30)
    for text, row, written in zip(texts, ours.tokens, ours.text, strict=True):
        inputs = their_tokenizer(text, return_tensors="pt")
        theirs = reference.generate(**inputs, do_sample=False, max_new_tokens=30, pad_token_id=0)
        theirs = theirs[0, inputs["input_ids"].shape[1] :]
        assert row == [token for token in theirs.tolist() if token != 18]
        assert written == their_tokenizer.decode(theirs, skip_special_tokens=True)
        ended += int(18 in theirs)
    assert 0 < ended < len(texts), "some texts end, some do not"


def test_a_tokenizer_without_an_end_of_text_leaves_none(tmp_path):
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    make_model("mixtral").save_pretrained(tmp_path, tokenizer=tokenizer)
    assert not (tmp_path / "generation_config.json").exists()
    assert opened(tmp_path).generation_config.eos_token_id is None  # not Mixtral's own, which is 2


# Shards


@pytest.mark.parametrize("max_shard_bytes", [1, 3000, 20000, 10**9])
def test_shards_are_no_larger_than_asked_and_the_index_is_true(tmp_path, max_shard_bytes):
    model = make_model("as main.py has it")
    model.save_pretrained(tmp_path, max_shard_bytes=max_shard_bytes)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    held = {}
    for file in files:
        with safe_open(tmp_path / file, "pt") as shard:
            names = list(shard.keys())
            size = sum(shard.get_tensor(name).nbytes for name in names)
        assert size <= max_shard_bytes or len(names) == 1
        held |= dict.fromkeys(names, file)
    if max_shard_bytes == 10**9:
        assert files == ["model.safetensors"] and not (tmp_path / "model.safetensors.index.json").exists()
    else:
        assert files == [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index["weight_map"] == held
        assert index["metadata"]["total_size"] == sum(parameter.nbytes for parameter in model.parameters())
    reference, again = opened(tmp_path).state_dict(), load_model(tmp_path)
    assert all(map(torch.equal, model.parameters(), again.parameters()))
    assert torch.equal(reference["model.norm.weight"], model.norm.weight)


def test_shards_without_room_are_refused(tmp_path):
    with pytest.raises(ValueError, match="max_shard_bytes=0 must be 1 or more"):
        save_model(make_model(), tmp_path, max_shard_bytes=0)


# What was in the folder before


def test_an_older_save_s_weights_go_and_other_people_s_files_stay(tmp_path):
    kept = {"adapter_model.safetensors": "a", "model_notes.txt": "b", "pytorch_model.bin": "c"}
    for name, text in kept.items():
        (tmp_path / name).write_text(text)
    sharded = ["model.safetensors.index.json"]
    for seed, settings in enumerate((dict(max_shard_bytes=3000), {}, dict(max_shard_bytes=9000))):
        model = make_model(seed=seed)
        save_model(model, tmp_path, tokenizer=make_tokenizer() if seed == 1 else None, **settings)
        weights = {name for name in os.listdir(tmp_path) if name.startswith("model") and name not in kept}
        counts = {name.split("-of-")[1] for name in weights if "-of-" in name}
        assert (weights == {"model.safetensors"}) if seed == 1 else (len(counts) == 1 and {*sharded} < weights)
        assert all((tmp_path / name).read_text() == text for name, text in kept.items())
        assert (tmp_path / "generation_config.json").exists() == (tmp_path / "tokenizer.json").exists() == (seed == 1)
        assert torch.equal(load_model(tmp_path).norm.weight, model.norm.weight)
        assert torch.equal(load_model(tmp_path).embedding.weight, model.embedding.weight)


def test_files_that_a_damaged_record_names_elsewhere_stay(tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    (tmp_path / "model").mkdir()
    record = {"format_version": 2, "sha256": {"../precious.txt": "0"}, "config": {}, "recipe": None}
    (tmp_path / "model" / "layerskip_moe.json").write_text(json.dumps(record))
    save_model(make_model(), tmp_path / "model")
    assert (tmp_path / "precious.txt").read_text() == "mine"
    load_model(tmp_path / "model")


# What no family expresses


@pytest.mark.parametrize(
    "settings", [dict(bias_balancing=True), dict(shared_expert_d_ff=8), dict(output_bias=True)], ids=str
)
def test_what_no_family_expresses_is_our_own_type(tmp_path, settings):
    model = MoEDecoder(ModelConfig(**SIZES, **settings))
    model.save_pretrained(tmp_path)
    contents = json.loads((tmp_path / "config.json").read_text())
    assert (contents["model_type"], contents["architectures"]) == ("layerskip_moe", ["MoEDecoder"])
    again = load_model(tmp_path)
    assert again.config == model.config and all(map(torch.equal, model.parameters(), again.parameters()))
    with pytest.raises(ValueError, match="layerskip_moe"):
        opened(tmp_path)


def test_a_checkpoint_without_a_tokenizer_cannot_give_one(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="holds no tokenizer"):
        model.save_pretrained(tmp_path / "new", tokenizer=tmp_path / "bare")
    assert not (tmp_path / "new").exists()
