"""Command lines with words exchanged, left out and put in: exit code 0, or 1 and one sentence."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerskip_moe.cli import main
from layerskip_moe.data.tokenizer import id_count, train_tokenizer
from layerskip_moe.nn import ModelConfig, MoEDecoder

WORDS = [
    *(
        "",
        "-",
        "--",
        "---",
        "--=",
        "--help",
        "-h",
        "--json",
        "--nope",
        "--nope=1",
        "--temperature",
        "--seed",
        "-1",
        "0",
    ),
    *("1", "3", "2.5", "nan", "inf", "1e400", "9" * 30, "None", "True", "null", "[]", "{}", "../..", "/dev/null", "\n"),
    *("x" * 5000, "é🙂", "\ud800", "\0", "a=b", "$(touch ran)", "`touch ran`", "; touch ran", "meta", "cuda:99", "cpu"),
    *("float16", "int8", "early-exit", "self-speculative", "layer-skipping", "sparse-speculative", "--threshold"),
    *("--exit-layer", "--draft-length", "--every", "--layers", "--device", "--dtype", "--dataset", "--top-k"),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    tokenizer = train_tokenizer("bpe", 270, [("train", "The quick brown fox.\n" * 9)], progress=False)
    sizes = dict(n_layers=3, d_model=8, n_heads=2, num_experts=2, top_k=1, d_ff=8, max_seq_len=32)
    folder = tmp_path_factory.mktemp("saved") / "model"
    MoEDecoder(ModelConfig(vocab_size=id_count(tokenizer), **sizes)).save_pretrained(folder, tokenizer=tokenizer)
    return str(folder)


@st.composite
def damaged(draw, words):
    words = list(words)
    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.integers(0, len(words)))
        match draw(st.sampled_from(["put in", "exchange", "exchange", "leave out", "twice", "glue"])):
            case "put in":
                words.insert(place, draw(st.sampled_from(WORDS)))
            case "exchange":
                words[place : place + 1] = [draw(st.sampled_from(WORDS) | st.text(max_size=6))]
            case "leave out":
                del words[place : place + 1]
            case "twice":
                words[place:place] = words[place : place + 2]
            case "glue":
                words[place : place + 2] = ["=".join(words[place : place + 2])]
    return words


def test_command_lines(cases, bounds, is_a_sentence, checkpoint, tmp_path, monkeypatch, capsys):
    # Each ends soon: in one new token, or at the text that is not there, which stays the last that is said.
    nowhere = str(tmp_path / "nowhere")
    lines = [
        ["generate", "--checkpoint", checkpoint, "--prompt", "The", "--max-new-tokens", "1", "--temperature", "0.8"],
        ["generate", "--checkpoint", checkpoint, "--prompt", "The", "--strategy", "early-exit", "--threshold", "0.5"],
        ["train", "--n-layers", "2", "--d-model", "16", "--max-steps", "1", "--out-dir", "run", "--tokenizer", "bpe"],
        ["evaluate", "--checkpoint", checkpoint],
        ["report", "--checkpoint", checkpoint, "--out-dir", "report"],
        ["export", "--checkpoint", checkpoint, "--out", "exported", "--to", "hf"],
        ["calibrate", "--checkpoint", checkpoint, "--out", "calibration.json"],
        ["trace", "--checkpoint", checkpoint, "--out", "trace.npz", "--num-prompts", "1"],
        ["bench", "policies", "--trace", nowhere],
    ]
    without_text = ("generate", "export", "bench")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", None)

    @cases("command lines")
    @given(st.data())
    def check(data):
        line = data.draw(st.sampled_from(lines))
        end = [] if line[0] in without_text else ["--dataset", nowhere]
        words = [line[0], *data.draw(damaged(line[1:])), *end]
        with bounds():
            code = main(words)
        told = capsys.readouterr().err.strip()
        assert code in (0, 1), (code, words)
        assert code == 0 or (told.startswith("error: ") and is_a_sentence(told)), (words, told)

    check()
    assert not (tmp_path / "ran").exists()
