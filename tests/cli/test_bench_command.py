"""layerskip-moe bench: its words, its files, and what it refuses."""

import json

import pytest

SIZES = ["--n-layers", 2, "--d-model", 16, "--n-heads", 2, "--n-kv-heads", 1, "--d-ff", 16, "--vocab-size", 40]
TRAIN = ["bench", "train", "--peers", "", "--batch-size", 1, "--seq-len", 4, "--repeats", 1, "--precision", "float32"]


def test_a_result_is_printed_and_written(shell, tmp_path):
    code, out, err = shell(*TRAIN, *SIZES, "--device", "cpu", "--threads", 1, "--out", "a/b.json", "--plot", "c.png")
    assert code == 0, err
    assert "ours, recipe" in out and "GFLOP a step" in out
    told = json.loads((tmp_path / "a/b.json").read_text())
    assert told["command"].startswith("layerskip-moe bench train --peers '' --batch-size 1")
    assert told["settings"]["peers"] == [] and told["machine"]["torch_threads"] == 1
    assert "transformers" in told["machine"]["versions"] and told["network"]["config"]["d_model"] == 16
    assert len(told["groups"]["float32"]["rows"][0]["value"]["samples"]) == 1
    assert (tmp_path / "c.png").stat().st_size > 5000


def test_a_saved_model_is_decoded_and_lists_are_words_between_commas(shell, checkpoint, tmp_path):
    settings = ["--prompt-tokens", 3, "--new-tokens", 4, "--repeats", 1, "--no-scaling", "--threads", 1]
    words = ["--precisions", "float32,bfloat16", "--peers", "hf"]
    code, _, err = shell("bench", "decode", "--model", checkpoint, *settings, *words, "--out", "told.json")
    assert code == 0, err
    told = json.loads((tmp_path / "told.json").read_text())
    assert list(told["groups"]) == ["float32", "bfloat16"] and told["network"]["weights"] == "of the checkpoint"
    assert [row["name"] for row in told["groups"]["float32"]["rows"]] == ["ours", "hf"]
    assert told["groups"]["float32"]["rows"][1]["equal"] == 4 and "scaling" not in told


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["bench"],
            "there is nothing to measure; give one of decode, prefill, train, memory, speculation, policies, "
            "communication, or",
        ),
        (["bench", "decoed"], "'decoed' is nothing to measure; did you mean decode?"),
        (
            ["bench", "prefill", "--precisions", "int4"],
            "--precisions int4 does not fit: it is any of float32, bfloat16,",
        ),
        (
            ["bench", "train", "--peers", "hf,x"],
            "--peers hf,x does not fit: it is any of hf, hf-early-exit, llama-cpp,",
        ),
        (["bench", "train", "--threads", 0], "threads=0 must be 1 or more."),
        (["bench", "train", "--new-tokens", 4], "--new-tokens is no option of layerskip-moe bench train;"),
        (["bench", "memory", "--n-heads", 3], "d_model=512 is not a multiple of n_heads=3;"),
    ],
)
def test_mistakes_are_one_sentence(shell, arguments, sentence):
    code, out, err = shell(*arguments)
    assert (code, out) == (1, "") and err.startswith(f"error: {sentence}") and err.count("\n") == 1


def test_help(shell):
    code, out, _ = shell("bench", "--help")
    assert code == 0 and "layerskip-moe bench decode --peers hf,llama-cpp" in out
    code, out, _ = shell("bench", "decode", "--help")
    assert code == 0 and "--first-token" in out and "--n-kv-heads" in out
