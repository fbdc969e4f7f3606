"""`layerskip-moe export`: what it writes opens elsewhere, and what cannot be written exactly is refused by name."""

import errno
import json

import pytest
import torch
from tokenizers import Tokenizer

from layerskip_moe import ModelConfig, MoEDecoder
from layerskip_moe.pretrained import checkpoint as checkpoint_module
from layerskip_moe.pretrained import load_tokenizer, read_recipe
from layerskip_moe.pretrained.quantize import quantize

transformers = pytest.importorskip("transformers")


@pytest.fixture
def save(tokenizer):
    """save("folder", ...) -> a model with these settings, saved with a tokenizer."""

    def build(folder, recipe=None, **settings):
        sizes = dict(vocab_size=tokenizer.get_vocab_size(), n_layers=2, d_model=32, n_heads=2, num_experts=2, top_k=1)
        model = MoEDecoder(ModelConfig(**{**sizes, **settings}), seed=3)
        model.save_pretrained(folder, tokenizer=tokenizer, recipe=recipe)
        return model

    return build


def test_a_folder_for_transformers(shell, save, tokenizer):
    model = save("ours", recipe={"corpus": "foxes", "steps": 7})
    code, out, err = shell("export", "--checkpoint", "ours", "--to", "hf", "--out", "theirs")
    assert (code, out) == (0, "written to theirs\n"), err
    tokens = torch.tensor([tokenizer.encode("The 1 brown fox").ids])
    theirs = transformers.AutoModelForCausalLM.from_pretrained("theirs").eval()
    torch.testing.assert_close(theirs(tokens).logits, model(tokens), atol=1e-5, rtol=1e-5)
    assert transformers.AutoTokenizer.from_pretrained("theirs")("The 1 brown fox")["input_ids"] == tokens[0].tolist()
    assert read_recipe("theirs") == {"corpus": "foxes", "steps": 7}


def test_another_precision_in_several_files(shell, save, tmp_path):
    model = save("ours")
    given = ["--checkpoint", "ours", "--to", "hf", "--out", "theirs", "--dtype", "bfloat16", "--max-shard-gb", 2e-5]
    assert shell("export", *given)[0] == 0
    assert len(list((tmp_path / "theirs").glob("model-*.safetensors"))) > 1
    loaded = MoEDecoder.from_pretrained("theirs")
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.bfloat16())


def test_a_report_goes_into_the_model_card(shell, save, tmp_path):
    save("ours")
    (tmp_path / "report.json").write_text(
        json.dumps({"exits": {"perplexity": [31.25, 17.5], "agreement": [0.5, 1.0], "tokens": 640}})
    )
    code, _, err = shell("export", "--checkpoint", "ours", "--to", "hf", "--out", "o", "--report", "report.json")
    assert code == 0, err
    card = (tmp_path / "o" / "README.md").read_text()
    assert "31.2" in card and "17.5" in card


def test_a_file_for_llama_cpp(shell, save, tmp_path):
    gguf = pytest.importorskip("gguf")
    model = save("ours", d_ff=32)
    code, out, err = shell("export", "--checkpoint", "ours", "--to", "gguf", "--out", "m.gguf")
    assert (code, out) == (0, "written to m.gguf\n"), err
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert torch.equal(torch.from_numpy(tensors["token_embd.weight"].data.copy()), model.embedding.weight.detach())


@pytest.fixture
def theirs(tmp_path, tokenizer):
    """A Mixtral as transformers saves it, with a tokenizer, a chat template, and two tokens that end a text."""
    config = transformers.MixtralConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=16, intermediate_size=12, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=3, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(config).eval()
    model.save_pretrained("theirs")
    tokenizer.save("theirs/tokenizer.json")
    (tmp_path / "theirs/tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": "{{ messages }}"})
    )
    (tmp_path / "theirs/generation_config.json").write_text(json.dumps({"eos_token_id": [0, 5]}))
    return model


def test_other_peoples_checkpoints_go_out_as_they_came_in(shell, theirs):
    code, _, err = shell("export", "--checkpoint", "theirs", "--to", "hf", "--out", "ours")
    assert code == 0, err
    after = transformers.AutoModelForCausalLM.from_pretrained("ours")
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(after.state_dict()[name], tensor)
    assert after.generation_config.eos_token_id == [0, 5]
    assert transformers.AutoTokenizer.from_pretrained("ours").chat_template == "{{ messages }}"


def test_other_peoples_checkpoints_are_generated_from_and_evaluated(shell, theirs, tokenizer, text):
    ids = tokenizer.encode("The 1 brown").ids
    given = ["--checkpoint", "theirs", "--prompt", "The 1 brown", "--max-new-tokens", 8, "--json"]
    code, out, err = shell("generate", *given)
    assert code == 0, err
    wanted = theirs.generate(
        torch.tensor([ids]), max_new_tokens=8, do_sample=False, eos_token_id=[0, 5], pad_token_id=0
    )
    tokens = [token for token in wanted[0, len(ids) :].tolist() if token not in (0, 5)]
    assert json.loads(out)["tokens"] == tokens
    code, out, err = shell("evaluate", "--checkpoint", "theirs", "--dataset", text, "--seq-len", 16, "--json")
    assert code == 0 and len(json.loads(out)["perplexity"]) == 2, err


@pytest.mark.parametrize("to", ["hf", "gguf"])
def test_what_the_format_cannot_say_is_refused_by_name(shell, save, tmp_path, to):
    save("ours", bias_balancing=True)
    code, out, err = shell("export", "--checkpoint", "ours", "--to", to, "--out", "theirs")
    assert (code, out) == (1, "") and err.startswith("error: ") and err.count("\n") == 1
    assert "bias_balancing=True" in err and not (tmp_path / "theirs").exists()


@pytest.mark.parametrize("to", ["hf", "gguf"])
def test_quantised_weights_are_refused(shell, save, tmp_path, tokenizer, to):
    quantize(save("ours"), "int8").save_pretrained("eighth", tokenizer=tokenizer)
    code, _, err = shell("export", "--checkpoint", "eighth", "--to", to, "--out", "theirs")
    assert code == 1 and "quantised" in err and not (tmp_path / "theirs").exists()


def test_layers_without_experts_are_not_for_llama_cpp(shell, save, tmp_path):
    save("ours", moe_layers="every other")
    code, _, err = shell("export", "--checkpoint", "ours", "--to", "gguf", "--out", "m.gguf")
    assert code == 1 and "moe_layers='every other'" in err and not (tmp_path / "m.gguf").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--checkpoint ours --to hf --out o --report list.json", "list.json is no report"),
        ("--checkpoint nowhere --to hf --out o", "nowhere does not exist"),
        ("--checkpoint ours --to hf --out o --dtype q8_0", "--dtype q8_0 is for --to gguf"),
        ("--checkpoint ours --to gguf --out o --report r.json", "--report is for --to hf"),
        ("--checkpoint ours --to hf --out o --report nowhere.json", "nowhere.json is no report"),
        ("--checkpoint ours --to gguf --out o --max-shard-gb 1", "--max-shard-gb is for --to hf"),
        ("--checkpoint ours --to hf --out o --max-shard-gb inf", "--max-shard-gb inf does not fit"),
        ("--checkpoint ours --to hf --out o --max-shard-gb 0", "--max-shard-gb 0.0 does not fit"),
        ("--checkpoint ours --to gguf --out ours", "ours is a folder"),
        ("--checkpoint ours --to onnx --out o", "'hf' or 'gguf'"),
        ("--checkpoint ours --to hf", "needs --out"),
        ("--checkpoint ours --to hf --out ours/config.json", "is a file"),
    ],
)
def test_a_mistake_is_one_sentence_and_writes_nothing(shell, save, tmp_path, arguments, sentence):
    save("ours")
    (tmp_path / "list.json").write_text("[1]")
    code, out, err = shell("export", *arguments.split())
    assert (code, out) == (1, "") and err.startswith("error: ") and err.count("\n") == 1
    assert sentence in err and not (tmp_path / "o").exists()


@pytest.mark.parametrize("command", ["generate --prompt The", "evaluate --dataset {text}", "export --to hf --out o"])
@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        ("shard", "model.safetensors"),
        ("architecture", "model_type='gpt2'"),
        ("config", "config.json is not JSON"),
        ("pickle", "pickles"),
    ],
)
def test_a_damaged_checkpoint_is_one_sentence_under_every_command(
    shell, save, tmp_path, text, command, damage, sentence
):
    save("ours")
    folder = tmp_path / "ours"
    (folder / "layerskip_moe.json").unlink()  # which would notice anything
    match damage:
        case "shard":
            whole = (folder / "model.safetensors").read_bytes()
            (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
        case "architecture":
            (folder / "config.json").write_text('{"model_type": "gpt2"}')
        case "config":
            (folder / "config.json").write_text('{"model_type": ')
        case "pickle":
            (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    name, *rest = command.format(text=text).split()
    code, out, err = shell(name, "--checkpoint", "ours", *rest)
    last = err.splitlines()[-1]  # progress bars come before it
    assert (code, out) == (1, "") and last.startswith("error: ") and sentence in last
    assert not (tmp_path / "o").exists()


def test_a_full_disk_is_one_sentence_and_leaves_nothing(shell, save, tmp_path, monkeypatch):
    save("ours")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", "model.safetensors")

    monkeypatch.setattr(checkpoint_module, "write_tensors", full)
    code, out, err = shell("export", "--checkpoint", "ours", "--to", "hf", "--out", "o")
    assert (code, out, err) == (1, "", "error: model.safetensors: No space left on device.\n")
    assert not (tmp_path / "o").exists()


def test_what_can_be_refused_is_refused_before_the_weights_are_read(shell, save, tmp_path):
    save("ours", moe_layers="every other")
    (tmp_path / "ours/model.safetensors").unlink()
    code, _, err = shell("export", "--checkpoint", "ours", "--to", "gguf", "--out", "m.gguf")
    assert code == 1 and "moe_layers='every other'" in err


def test_somebodys_own_card_is_not_written_over(shell, save, tmp_path):
    save("ours")
    (tmp_path / "report.json").write_text("{}")
    (tmp_path / "o").mkdir()
    (tmp_path / "o/README.md").write_text("# Mine\n")
    given = ["--checkpoint", "ours", "--to", "hf", "--out", "o"]
    code, _, err = shell("export", *given, "--report", "report.json")
    assert code == 1 and "README.md in o" in err and [path.name for path in (tmp_path / "o").iterdir()] == ["README.md"]
    assert shell("export", *given)[0] == 0 and (tmp_path / "o/README.md").read_text() == "# Mine\n"


def test_a_tokenizer_with_a_token_more_than_the_model_goes_along(shell, save, tmp_path, tokenizer):
    model = save("ours")
    more = Tokenizer.from_str(tokenizer.to_str())
    more.add_special_tokens(["<pad>"])
    model.save_pretrained("bare")
    more.save("bare/tokenizer.json")
    assert more.get_vocab_size() > model.config.vocab_size
    assert shell("export", "--checkpoint", "bare", "--to", "hf", "--out", "o")[0] == 0
    assert load_tokenizer("o").get_vocab() == more.get_vocab()


def test_a_model_without_a_tokenizer_goes_out_without_one(shell, save, tmp_path):
    save("ours").save_pretrained("bare")
    code, _, err = shell("export", "--checkpoint", "bare", "--to", "hf", "--out", "o")
    assert (code, err) == (0, "bare holds no tokenizer, so none is written\n")
    assert not (tmp_path / "o" / "tokenizer.json").exists()
    assert MoEDecoder.from_pretrained("o").config.n_layers == 2
    with pytest.raises(ValueError, match="holds no tokenizer"):
        load_tokenizer("o")
