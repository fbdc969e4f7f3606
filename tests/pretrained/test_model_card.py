"""The model card says what the folder and the report say, and nothing else; its code runs."""

import re

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from layerskip_moe.nn import ModelConfig, MoEDecoder
from layerskip_moe.pretrained import save_model, write_model_card

SIZES = dict(vocab_size=256, n_layers=4, d_model=8, n_heads=2, num_experts=3, d_ff=8)
REPORT = {
    "machine": {"cpu": "A CPU", "cores": 2, "accelerator": None, "versions": {"torch": "2.13.0"}},
    "corpus": {"name": "some|text", "train_tokens": 1000, "validation_tokens": 100, "vocab_size": 11},
    "exits": {"perplexity": [40.125, None, 20.0, 19.5], "agreement": [0.5, 0.6, 0.7, 1.0], "tokens": 25600},
    "summary": [
        {
            "decoding": "greedy", "prompts": 20, "name": "self-speculative", "exit_layer": 2, "draft_length": 6,
            "speed_up": 1.544, "speed_up_quartiles": [1.2, 1.9], "tokens_per_second": 141.19,
            "baseline_tokens_per_second": 92.98, "acceptance_rate": 0.421, "settings": 1, "outputs": 20,
            "identical": 20, "distinct_4grams": 0.06,
        }
    ],
}  # fmt: skip


def make_model(**switches):
    return MoEDecoder(ModelConfig(**SIZES, **switches))


def make_tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return tokenizer


def card(folder):
    return (folder / "README.md").read_text(encoding="utf-8")


def code(text, language):
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def test_a_save_writes_a_card_of_the_model_itself(tmp_path):
    model = make_model(moe_layers="every other").bfloat16()
    save_model(model, tmp_path)
    text = card(tmp_path)
    total, used = model.parameter_counts()
    assert f"| parameters | {total:,}, {used:,} of them used per token |" in text
    assert "| stored as | bfloat16 |" in text and "| architecture | Qwen3MoeForCausalLM |" in text
    assert "| experts | 3 in 2 of 4 layers, 2 chosen per token, hidden width 8 |" in text
    for section in ("## How it was trained", "## Measured"):
        assert section not in text  # nobody said


@pytest.mark.parametrize(
    ("switches", "recipe", "library", "tags"),
    [
        ({}, {"steps": 3}, "transformers", ["layerskip_moe", "layerskip", "mixture-of-experts"]),
        ({"moe_layers": (1,)}, None, "transformers", ["layerskip_moe", "mixture-of-experts"]),
        ({"bias_balancing": True}, None, "layerskip_moe", ["layerskip_moe", "mixture-of-experts"]),
    ],
    ids=["trained", "untrained", "of our own type"],
)
def test_the_header_is_what_the_hub_reads(tmp_path, switches, recipe, library, tags):
    yaml = pytest.importorskip("yaml")
    save_model(make_model(**switches), tmp_path, recipe=recipe)
    _, header, body = card(tmp_path).split("---\n", 2)
    assert yaml.safe_load(header) == {"library_name": library, "pipeline_tag": "text-generation", "tags": tags}
    assert body.startswith("\n# A Mixture-of-Experts decoder of 4 layers\n")
    for words in ("transformers import", "vllm serve FOLDER", "sglang.launch_server --model-path FOLDER"):
        assert (words in body) == (library == "transformers")
    assert ("No architecture of transformers computes this network" in body) == (library != "transformers")


def test_the_recipe_is_told_but_for_what_was_not_set(tmp_path):
    recipe = {"steps": 260, "train_config": {"layer_dropout_max": 0.1, "warmup_steps": None, "exit_curriculum": "a|b"}}
    save_model(make_model(), tmp_path, recipe=recipe)
    text = card(tmp_path)
    assert "| steps | 260 |\n| train_config.layer_dropout_max | 0.1 |\n" in text
    assert "| train_config.exit_curriculum | a\\|b |" in text and "warmup_steps" not in text


def test_a_report_s_numbers_are_told_as_they_are(tmp_path):
    save_model(make_model(), tmp_path)
    write_model_card(tmp_path, REPORT)
    text = card(tmp_path)
    assert "on 25,600 held-out tokens of some|text" in text
    for row in ("| 1 | 40.12 | 50.0% |", "| 2 | - | 60.0% |", "| 4 | 19.50 | 100.0% |"):
        assert row in text
    assert "| self-speculative, greedy | 2, 6 | 93.0, 141.2 | 1.54 | 42.1% | 20 of 20 |" in text
    assert "on A CPU, 2 cores, torch 2.13.0:" in text
    assert "SelfSpeculative(exit_layer=2, draft_length=6)" in text
    write_model_card(tmp_path)
    assert "40.12" not in card(tmp_path), "a card written anew has no older numbers"


@pytest.mark.parametrize("section", REPORT)
def test_a_report_of_one_section_is_enough(tmp_path, section):
    save_model(make_model(), tmp_path)
    write_model_card(tmp_path, {section: REPORT[section]})
    text = card(tmp_path)
    assert ("## Measured" in text) == (section in ("exits", "summary"))
    assert ("40.12" in text) == (section == "exits") and ("141.2" in text) == (section == "summary")
    assert "None" not in text


@pytest.mark.parametrize(
    ("switches", "with_tokenizer"), [({}, True), ({"bias_balancing": True}, False)], ids=["family", "own type, bare"]
)
def test_its_code_runs(tmp_path, switches, with_tokenizer):
    save_model(make_model(**switches), tmp_path, tokenizer=make_tokenizer() if with_tokenizer else None)
    ours, *theirs = code(card(tmp_path), "python")
    found = {"FOLDER": str(tmp_path)}
    exec(ours, found)
    assert len(found["out"].tokens[0]) > 0
    assert bool(theirs) == (not switches)
    if theirs:
        pytest.importorskip("transformers")
        exec(theirs[0], found)
        tokens = torch.tensor([[1, 2, 3]])
        again = MoEDecoder.from_pretrained(tmp_path)(tokens)
        torch.testing.assert_close(found["model"](tokens).logits, again, rtol=1e-4, atol=1e-4)
        assert ("tokenizer" in found) == with_tokenizer


def test_somebody_else_s_card_is_never_overwritten(tmp_path):
    save_model(make_model(), tmp_path)
    mine = card(tmp_path).replace("# Written by layerskip_moe", "# Written by me")
    (tmp_path / "README.md").write_text(mine)
    save_model(make_model(), tmp_path)
    assert card(tmp_path) == mine
    with pytest.raises(ValueError, match=r"README\.md was not written by layerskip_moe; move it away"):
        write_model_card(tmp_path, REPORT)
    assert card(tmp_path) == mine


def test_a_card_that_only_git_changed_is_still_ours(tmp_path):
    save_model(make_model(), tmp_path)
    (tmp_path / "README.md").write_bytes(card(tmp_path).replace("\n", "\r\n").encode())
    write_model_card(tmp_path, REPORT)
    assert "40.12" in card(tmp_path)
