"""`layerskip-moe ablate`: names, defaults and mistakes; and a grid of two, trained and told."""

import json

import pytest

from layerskip_moe.ablation import usual_variants
from layerskip_moe.cli import ablate as ablate_command
from layerskip_moe.nn import ModelConfig

TINY = (
    "--vocab-size 300 --n-layers 2 --d-model 16 --n-heads 2 --d-ff 16 --num-experts 4 --max-steps 2 --seq-len 16 "
    "--batch-size 4 --layer-dropout-max 0 --num-prompts 1 --prompt-length 8 --max-new-tokens 4 --max-windows 4 "
    "--draft-lengths 2 --temperatures 0"
)


@pytest.fixture
def asked(monkeypatch):
    """What `ablate` was called with, instead of hours of it."""
    calls = []

    def ablate(corpus, network, recipe, variants, out_dir, **options):
        calls.append(options | dict(network=network, recipe=recipe, variants=variants, out_dir=out_dir))
        return f"{out_dir}/ablation.md"

    monkeypatch.setattr(ablate_command, "ablate", ablate)
    return calls


def test_the_defaults_are_a_grid_of_three_seeds(shell, text, asked):
    code, out, err = shell("ablate", "--dataset", text)
    assert (code, out) == (0, "runs/ablation/ablation.md\n"), err
    (call,) = asked
    network, recipe = call["network"], call["recipe"]
    assert (network.n_layers, network.d_model, network.d_ff, network.dense_d_ff) == (8, 192, 192, 384)
    assert (recipe.max_steps, recipe.exit_weights) == (200, "equal") and call["seeds"] == (0, 1, 2)
    assert 15 <= len(call["variants"]) <= 25 and next(iter(call["variants"])) == "base"
    assert call["command"].startswith("layerskip-moe ablate --dataset ")


def test_fields_of_network_recipe_and_measures_can_be_given(shell, text, asked):
    given = (
        "--n-layers 4 --top-k 1 --dense-d-ff 50 --learning-rate 0.5 --spans 2 3 --num-prompts 4 --seeds 5 "
        "--variants wide paper"
    )
    code, _, err = shell("ablate", "--dataset", text, *given.split())
    assert code == 0, err
    (call,) = asked
    assert (call["network"].n_layers, call["network"].dense_d_ff, call["recipe"].learning_rate) == (4, 50, 0.5)
    assert call["measures"].spans == (2, 3) and call["seeds"] == (5,)
    assert call["timing"] and call["decoding"].num_prompts == 4
    assert list(call["variants"]) == ["base", "wide", "paper"]


def test_the_help_names_every_variant():
    for name in usual_variants(ModelConfig(vocab_size=8)):
        assert name in ablate_command.__doc__


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--variants", "papers"], "'papers' is no variant; did you mean paper?"),
        (["--seeds", "a"], "--seeds a does not fit"),
        (["--spans", "0"], "spans=[0]"),
        (["--top-k", "9"], "top_k=9"),
        (["--seed", "1"], "--seed is no option of layerskip-moe ablate"),
    ],
)
def test_a_mistake_is_one_sentence(shell, text, asked, arguments, sentence):
    code, out, err = shell("ablate", "--dataset", text, *arguments)
    assert (code, out, asked) == (1, "", [])
    assert err.splitlines()[-1].startswith("error: ") and sentence in err


def test_two_variants_trained_measured_and_told(shell, text, tmp_path):
    given = [
        "--dataset",
        text,
        *TINY.split(),
        "--variants",
        "drafting+coherence-0.1",
        "--seeds",
        0,
        "--out-dir",
        "grid",
    ]
    code, out, err = shell("ablate", *given, "--no-timing")
    assert (code, out) == (0, "grid/ablation.md\n"), err
    assert "drafting+coherence-0.1, seed 0: perplexity " in err and "give the same command without --no-timing" in err
    told = json.loads((tmp_path / "grid" / "ablation.json").read_text())
    assert not any("speed_up_0" in row["mean"] for row in told["summary"]) and set(told["figures"]) == {"unions"}

    code, out, err = shell("ablate", *given)
    assert (code, out) == (0, "grid/ablation.md\n"), err
    assert "perplexity" not in err and "drafting+coherence-0.1, seed 0: " in err and "tokens/s at temperature 0" in err
    told = json.loads((tmp_path / "grid" / "ablation.json").read_text())
    assert [row["variant"] for row in told["summary"]] == ["base", "drafting+coherence-0.1"]
    assert all(row["mean"]["speed_up_0"] > 0 and row["mean"]["perplexity"] > 1 for row in told["summary"])
    assert told["summary"][1]["difference"]["union_4"]["pairs"] == 1
    assert all((tmp_path / "grid" / path).stat().st_size > 5000 for path in told["figures"].values())
    assert set(told["figures"]) == {"tradeoff", "unions"}
