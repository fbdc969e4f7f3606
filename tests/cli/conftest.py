"""A saved model small enough to load and decode in a moment, and the command run in this process."""

import pytest

from layerskip_moe import ModelConfig, MoEDecoder
from layerskip_moe.cli import main
from layerskip_moe.data.tokenizer import id_count, train_tokenizer

TEXT = "The {} brown foxes jump over the lazy dogs, again and again.\n"


@pytest.fixture(autouse=True)
def surroundings(tmp_path, monkeypatch):
    """A cache of our own, a folder to write in, and nobody's wish about colours."""
    monkeypatch.setenv("LAYERSKIP_MOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def text(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for index in range(4):
        (folder / f"{index}.txt").write_text(TEXT.format(index) * 40)
    return folder


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer("bpe", 300, [("train", TEXT.format(1) * 40)], progress=False)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, tokenizer):
    """A model of five layers that was never trained: its text is noise, broken characters included."""
    config = ModelConfig(
        vocab_size=id_count(tokenizer), n_layers=5, d_model=16, n_heads=2, num_experts=2, top_k=1, max_seq_len=64
    )
    folder = tmp_path_factory.mktemp("saved") / "model"
    MoEDecoder(config, seed=1).save_pretrained(folder, tokenizer=tokenizer)
    return folder


@pytest.fixture
def shell(capsys):
    """shell("generate", ...) -> (exit code, stdout, stderr)."""

    def run(*arguments):
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return run
