"""The file of completions: its format, as the harness loads it, and that it holds what `generate` says."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from layerskip_moe.analysis.bigcode import HUMANEVAL_STOPS, _cut, write_generations
from layerskip_moe.data.tokenizer import train_tokenizer
from layerskip_moe.generation import SelfSpeculative, generate

PROMPTS = ["def one(x):\n", "def two(x, y):\n    return", "#"]
HOW = dict(max_new_tokens=12, temperature=1.2, top_p=0.95)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer("bpe", 280, [("train", prompt * 3) for prompt in PROMPTS], progress=False)


@pytest.fixture
def model(decoder):
    return decoder(vocab_size=300, dtype=torch.float32)


def written(path):
    """The file as the harness loads it."""
    with open(path) as file:
        return json.load(file)


def test_every_problem_has_its_candidates_and_they_are_what_generate_says(model, tokenizer, tmp_path):
    path = tmp_path / "results" / "generations.json"
    found = write_generations(model, tokenizer, PROMPTS, path, n_samples=4, seed=3, stop_strings=(), **HOW)
    asked = [prompt for prompt in PROMPTS for _ in range(4)]
    texts = generate(model, asked, tokenizer=tokenizer, seed=3, **HOW).text
    expected = [prompt + text for prompt, text in zip(asked, texts, strict=True)]
    assert written(path) == found == [expected[:4], expected[4:8], expected[8:]]
    assert all(len(set(candidates)) == 4 for candidates in found)
    assert list(path.parent.iterdir()) == [path], "and nothing beside it"


def test_the_seed_changes_candidates_and_batches_and_speculation_do_not(model, tokenizer, tmp_path):
    def run(**how):
        settings = dict(n_samples=2, seed=3, with_prompt=False, progress=False)
        return write_generations(model, tokenizer, PROMPTS, tmp_path / "file", **{**settings, **HOW, **how})

    assert run() == run(batch_size=1) == run(batch_size=5, strategy=SelfSpeculative(exit_layer=1, draft_length=2))
    assert run() != run(seed=4)
    assert [[prompt + text for text in texts] for prompt, texts in zip(PROMPTS, run(), strict=True)] == run(
        with_prompt=True
    )


def test_candidates_end_before_the_first_stop(model, tokenizer, tmp_path):
    def run(**how):
        return write_generations(model, tokenizer, PROMPTS, tmp_path / "file", max_new_tokens=12, **how)

    whole = [text for (text,) in run(stop_strings=(), with_prompt=False)]
    stops = [text[3:5] for text in whole] + [whole[0][1:3]]
    for (cut,), text, prompt in zip(run(stop_strings=stops), whole, PROMPTS, strict=True):
        assert cut == prompt + text[: min(text.find(stop) for stop in stops if stop in text)]
    # An end of text ends a candidate too, and a special token may stand among the stop strings.
    tokens = generate(model, [PROMPTS[0]], tokenizer=tokenizer, max_new_tokens=12).tokens[0]
    place = max(map(tokens.index, tokens))  # of the last token that had not come before
    assert place > 1
    expected = [PROMPTS[0] + tokenizer.decode(tokens[:place])]
    assert run(stop_strings=(), stop_tokens=[tokens[place]])[0] == expected
    with torch.no_grad():  # the end of text is said in its place
        model.head.weight[[0, tokens[place]]] = model.head.weight[[tokens[place], 0]]
    assert run(stop_strings=())[0] == run(stop_strings=("<|endoftext|>",), stop_tokens=())[0] == expected
    assert run(stop_strings=(), stop_tokens=())[0] != expected


@given(text=st.text("ab\nd", max_size=20), stops=st.lists(st.text("ab\nd", min_size=1, max_size=3), max_size=4))
def test_cutting_is_the_harnesss(text, stops):
    cut = _cut(text, stops)
    assert text.startswith(cut) and not any(stop in cut for stop in stops)
    if cut != text:  # and no sooner than it must
        assert any(text[len(cut) :].startswith(stop) for stop in stops)


def test_a_space_that_begins_a_completion_is_kept(model, tmp_path):
    """SentencePiece's decoders drop a text's first space; behind `return` it is needed."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    pieces = ["<unk>", "▁", "▁return", "▁x", *"abcdefghijklmnopqrstuvwxyz"]
    tokenizer = Tokenizer(models.Unigram([(piece, -1.0 - len(pieces) * (len(piece) == 1)) for piece in pieces], 0))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    x = tokenizer.token_to_id("▁x")
    assert tokenizer.decode([x]) == "x"
    model.unembed = lambda hidden: torch.nn.functional.one_hot(torch.full(hidden.shape[:-1], x), 300).float()
    found = write_generations(model, tokenizer, ["return"], tmp_path / "file", max_new_tokens=2, stop_tokens=[0])
    assert found == [["return x x"]]


def test_nothing_is_written_where_generating_fails(model, tokenizer, tmp_path):
    path = tmp_path / "generations.json"
    write_generations(model, tokenizer, PROMPTS, path, max_new_tokens=2)
    before = path.read_text()

    class Failing(SelfSpeculative):
        def step(self, session):
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        write_generations(model, tokenizer, PROMPTS, path, strategy=Failing(exit_layer=1), max_new_tokens=2)
    assert path.read_text() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("prompts", "how", "said"),
    [
        ("def f", {}, "are lists"),
        (PROMPTS, {"stop_strings": "\n"}, "are lists"),
        (PROMPTS, {"n_samples": 0}, "n_samples=0"),
        (PROMPTS, {"n_samples": 2}, "n_samples=2 at temperature=0.0"),
        (PROMPTS, {"batch_size": 0}, "batch_size=0"),
        (PROMPTS, {"max_new_tokens": 30}, "prompt 0 has"),
        ([PROMPTS[0], ""], {"n_samples": 9, "temperature": 1.0}, "prompt 1 is empty"),
        ([], {}, "no prompts"),
    ],
)
def test_bad_input_is_refused(model, tokenizer, tmp_path, prompts, how, said):
    with pytest.raises(ValueError, match=said):
        write_generations(model, tokenizer, prompts, tmp_path / "file", **{"max_new_tokens": 2, **how})
    assert not list(tmp_path.iterdir())


def test_the_stops_of_humaneval_end_its_functions(model, tokenizer, tmp_path, monkeypatch):
    texts = iter(["    return x\ndef more():", "    return 1\nprint(1)"])
    monkeypatch.setattr("layerskip_moe.analysis.bigcode._text_after", lambda *_: next(texts))
    found = write_generations(model, tokenizer, PROMPTS[:2], tmp_path / "file", max_new_tokens=1)
    assert found == [[PROMPTS[0] + "    return x"], [PROMPTS[1] + "    return 1"]]
    assert "<file_sep>" in HUMANEVAL_STOPS
