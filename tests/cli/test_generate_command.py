"""`layerskip-moe generate`: text as it comes, the same text under every lossless strategy, JSON, colours, refusals."""

import dataclasses
import io
import json
import math
import re
import sys

import pytest
import torch

from layerskip_moe import Autoregressive, MoEDecoder, generate
from layerskip_moe.cli.options import json_line
from layerskip_moe.cli.streaming import RoundByRound
from layerskip_moe.data.tokenizer import train_tokenizer
from layerskip_moe.generation import (
    EarlyExit,
    LayerSkipping,
    LookupSpeculative,
    PromptLookup,
    SelfSpeculative,
    SparseSpeculative,
    Speculative,
)
from layerskip_moe.generation.text import TextStream
from layerskip_moe.pretrained import load_tokenizer

PROMPT = "The 1 brown"
GREEN, PLAIN = "\x1b[32m", "\x1b[0m"


@pytest.fixture
def ask(shell, checkpoint):
    """ask("--strategy", ...) -> the standard output of a generation that went well, and its standard error."""

    def run(*arguments, prompt=PROMPT):
        code, out, err = shell(
            "generate", "--checkpoint", checkpoint, "--prompt", prompt, "--max-new-tokens", 12, *arguments
        )
        assert code == 0, err
        return out, err

    return run


@pytest.fixture
def expect(checkpoint, tokenizer):
    """expect(strategy, ...) -> the library's own answer."""

    def run(strategy=None, **settings):
        model = MoEDecoder.from_pretrained(checkpoint)
        settings = {"max_new_tokens": 12, "tokenizer": tokenizer} | settings
        return generate(model, [PROMPT], strategy, **settings)

    return run


STRATEGIES = [
    ([], Autoregressive()),
    (["--exit-layer", 2], Autoregressive(2)),
    (["--strategy", "self-speculative", "--exit-layer", 3, "--draft-length", 2], SelfSpeculative(3, 2)),
    (["--strategy", "prompt-lookup", "--ngram", 2], PromptLookup(ngram=2)),
    (["--strategy", "lookup-speculative"], LookupSpeculative(1)),
    (["--strategy", "lookup-speculative", "--lookup", "after"], LookupSpeculative(1, lookup="after")),
    (["--strategy", "sparse-speculative", "--draft-layers", 0, 2, 4], SparseSpeculative((0, 2, 4))),
    (["--strategy", "sparse-speculative", "--draft-layers", "clasp"], SparseSpeculative("clasp")),
    (["--strategy", "sparse-speculative", "--draft-top-k", 1], SparseSpeculative(draft_top_k=1)),
    (["--strategy", "early-exit", "--threshold", 0.01], EarlyExit(0.01)),
    (["--strategy", "early-exit", "--threshold", 0.3, "--confidence", "state"], EarlyExit(0.3, "state")),
    (["--strategy", "layer-skipping"], LayerSkipping(every=4)),
    (["--strategy", "layer-skipping", "--layers", 1, 3], LayerSkipping((1, 3))),
    (["--strategy", "layer-skipping", "--random", 2], LayerSkipping(random=2)),
]


@pytest.mark.parametrize(("arguments", "strategy"), STRATEGIES)
def test_the_text_is_the_librarys(ask, expect, arguments, strategy):
    out, err = ask(*arguments, "--temperature", 0.7, "--seed", 3)
    expected = expect(strategy, temperature=0.7, seed=3)
    assert out == expected.text[0] + "\n"
    assert (
        err.startswith(f"{len(expected.tokens[0])} tokens, ")
        and f"{expected.stats.mean_layers:.1f} of 5 layers per token" in err
    )
    assert ("drafts accepted" in err) == (expected.stats.drafted > 0)


@pytest.mark.parametrize(("arguments", "strategy"), STRATEGIES[::2])
def test_json_has_it_all_and_is_all(ask, expect, arguments, strategy):
    out, err = ask(*arguments, "--json")
    told, expected = json.loads(out), expect(strategy)
    assert err == "" and out.count("\n") == 1
    assert (told["prompt"], told["text"], told["tokens"]) == (PROMPT, expected.text[0], expected.tokens[0])
    assert told["layers_run"] == expected.layers_run[0]
    assert told["stats"]["generated"] == len(told["tokens"]) and told["stats"]["tokens_per_second"] > 0
    assert told["stats"]["accepted_by_position"] == expected.stats.accepted_by_position
    settings = {name: value for name, value in told["strategy"].items() if name != "name"}
    assert settings.pop("draft_quantization", None) is None  # how a draft model is made, where there is one
    assert type(strategy)(**settings) == strategy


def test_self_speculative_without_an_exit_layer_drafts_as_much_as_pays(ask, expect):
    """What pays is measured, so that only the text is known."""
    told = json.loads(ask("--strategy", "self-speculative", "--json")[0])
    assert told["text"] == expect().text[0]
    assert told["strategy"]["exit_layer"] is told["strategy"]["draft_length"] is None


def test_another_model_drafts(ask, expect, checkpoint):
    speculative = ["--strategy", "speculative", "--draft-checkpoint", checkpoint]
    told = json.loads(ask(*speculative, "--draft-length", 3, "--json")[0])
    assert told["text"] == expect().text[0]
    assert told["stats"]["acceptance_rate"] == 1.0  # it drafts for itself
    assert told["strategy"] == {
        "name": "speculative",
        "draft_checkpoint": str(checkpoint),
        "draft_length": 3,
        "coupling": "shared",
        "exit_layer": None,
    }


def test_early_layers_of_a_quantised_model_draft(ask, expect):
    given = ["--strategy", "self-speculative", "--exit-layer", 2, "--draft-quantization", "int8", "--json"]
    told = json.loads(ask(*given)[0])
    assert told["text"] == expect().text[0] and told["strategy"]["draft_quantization"] == "int8"
    assert told["stats"]["drafted"] > 0


def test_a_precision_can_be_asked_for(ask, expect, checkpoint):
    model = MoEDecoder.from_pretrained(checkpoint, dtype=torch.bfloat16)
    tokens = generate(model, [PROMPT], max_new_tokens=12, tokenizer=load_tokenizer(checkpoint)).tokens[0]
    assert json.loads(ask("--dtype", "bfloat16", "--json")[0])["tokens"] == tokens


def test_a_draft_with_another_tokenizer_is_refused(shell, checkpoint, tokenizer):
    others = train_tokenizer("bpe", tokenizer.get_vocab_size(), [("train", "Quite other words, xyz.\n" * 40)], False)
    MoEDecoder.from_pretrained(checkpoint).save_pretrained("draft", tokenizer=others)
    given = ["--checkpoint", checkpoint, "--prompt", PROMPT, "--strategy", "speculative", "--draft-checkpoint", "draft"]
    code, out, err = shell("generate", *given)
    assert (code, out) == (1, "") and err.count("\n") == 1
    assert "the draft model in draft has another tokenizer" in err


def test_a_draft_model_is_run_in_eval_mode(checkpoint):
    draft, modes = MoEDecoder.from_pretrained(checkpoint).train(), []
    draft.blocks[0].register_forward_pre_hook(lambda block, inputs: modes.append(block.training))
    rounds = RoundByRound(Speculative(draft, 2), lambda token, accepted: None)
    generate(MoEDecoder.from_pretrained(checkpoint), [[1, 2]], rounds, max_new_tokens=4, on_token=rounds.on_token)
    assert modes and not any(modes) and draft.training


def test_a_token_ends_the_text(ask, expect):
    tokens = expect().tokens[0]
    ends = next(token for token in tokens[1:] if token != tokens[0])
    told = json.loads(ask("--stop-tokens", 299, ends, "--json")[0])
    assert told["tokens"] == tokens[: tokens.index(ends)] == expect(stop_tokens=[299, ends]).tokens[0]


def test_numbers_that_json_lacks_are_null():
    told = json_line({"stats": [math.inf, 1.5, {"rate": math.nan}], "text": "inf"})
    assert json.loads(told, parse_constant=pytest.fail) == {"stats": [None, 1.5, {"rate": None}], "text": "inf"}


def test_a_model_of_one_layer_has_none_to_skip(shell, checkpoint, tokenizer):
    config = dataclasses.replace(MoEDecoder.from_pretrained(checkpoint).config, n_layers=1)
    MoEDecoder(config).save_pretrained("one", tokenizer=tokenizer)
    code, _, err = shell("generate", "--checkpoint", "one", "--prompt", PROMPT, "--strategy", "layer-skipping")
    assert code == 1 and "needs a model of 2 layers or more, and this one has 1" in err and "every" not in err


def test_sampling_and_stopping_reach_the_library(ask, expect):
    given = ["--temperature", 0.9, "--top-k", 7, "--top-p", 0.8, "--seed", 5, "--repetition-penalty", 1.3]
    settings = {"temperature": 0.9, "top_k": 7, "top_p": 0.8, "seed": 5, "repetition_penalty": 1.3}
    text = expect(**settings).text[0]
    assert ask(*given)[0] == text + "\n" != ask()[0]
    stop = next(letter for letter in text[1:] if letter.isascii() and letter.isprintable())
    stopped = ask(*given, "--stop-strings", "never", stop)[0]
    assert stopped == expect(**settings, stop_strings=("never", stop)).text[0] + "\n" == text[: text.index(stop)] + "\n"


def test_the_prompt_is_read_from_standard_input(ask, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("The lazy\n"))
    assert json.loads(ask("--json", prompt="-")[0])["prompt"] == "The lazy\n"
    assert json.loads(ask("--json", prompt="- lazy")[0])["prompt"] == "- lazy"


def test_text_comes_piece_by_piece(ask, expect, tokenizer, monkeypatch):
    """Whenever the model runs for one more token, the text of all before it is on the screen."""
    screen, seen, decode = io.StringIO(), [], MoEDecoder.decode

    def watched(*args, **settings):
        seen.append(screen.getvalue())
        return decode(*args, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", screen)
        patch.setattr(MoEDecoder, "decode", watched)
        ask()
    stream, expected = TextStream(tokenizer), [""]
    for token in expect().tokens[0][:-1]:
        expected.append(expected[-1] + stream.push(token))
    assert seen[-len(expected) :] == expected
    assert len(set(expected)) > 4


@pytest.mark.parametrize("strategy", [SelfSpeculative(5, 1), SelfSpeculative(5, 3)])
def test_accepted_drafts_are_green(ask, expect, tokenizer, strategy):
    """The whole model drafts for itself: every draft is accepted, and the token after them is its own."""
    given = ["--strategy", "self-speculative", "--exit-layer", 5, "--draft-length", strategy.draft_length]
    out, _ = ask(*given, "--color", "always")
    stream, expected = TextStream(tokenizer), ""
    for place, token in enumerate(expect(strategy).tokens[0]):
        piece = stream.push(token)
        draft = place % (strategy.draft_length + 1) < strategy.draft_length
        expected += f"{GREEN}{piece}{PLAIN}" if draft and piece else piece
    assert out == expected + stream.finish() + "\n"
    assert re.sub(r"\x1b\[\d+m", "", out) == expect(strategy).text[0] + "\n"


@pytest.mark.parametrize(
    ("terminal", "no_color", "color", "green"),
    [
        (True, None, "auto", True),
        (True, "", "auto", True),
        (True, "1", "auto", False),
        (False, None, "auto", False),
        (True, None, "never", False),
        (False, "1", "always", True),
    ],
)
def test_when_there_are_colours(ask, monkeypatch, terminal, no_color, color, green):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    if no_color is not None:
        monkeypatch.setenv("NO_COLOR", no_color)
    given = ["--strategy", "self-speculative", "--exit-layer", 5, "--color", color]
    assert (GREEN in ask(*given)[0]) == green


def test_plain_decoding_has_no_drafts_to_colour(ask):
    assert GREEN not in ask("--color", "always")[0]


def test_characters_that_a_terminal_lacks_are_written_out(ask, expect, monkeypatch):
    screen = io.TextIOWrapper(io.BytesIO(), encoding="ascii", newline="\n")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", screen)
        ask()
    shown = screen.buffer.getvalue().decode("ascii")
    assert shown == expect().text[0].encode("ascii", "backslashreplace").decode("ascii") + "\n"
    assert "\\u" in shown or "\\x" in shown


def test_every_strategy_has_its_own_help(shell):
    code, out, err = shell("generate", "--strategy", "early-exit", "--help")
    assert (code, err) == (0, "")
    assert "--threshold" in out and "--draft-length" not in out
    assert "--draft-checkpoint" in shell("generate", "--strategy=speculative", "--help")[1]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--strategy", "early"], "--strategy early is unknown; it is one of autoregressive, self-speculative,"),
        (["--threshold", "0.5"], "--threshold is no option of layerskip-moe generate --strategy autoregressive"),
        (["--strategy", "speculative"], "needs --draft-checkpoint"),
        (["--strategy", "speculative", "--draft-checkpoint", "nowhere"], "nowhere does not exist"),
        (["--strategy", "self-speculative", "--exit-layer", "6"], "exit_layer=6 must be between 1 and n_layers=5"),
        (["--strategy", "self-speculative", "--coupling", "x"], "--coupling x does not fit"),
        (["--strategy", "early-exit", "--threshold", "nowhere.json"], "nowhere.json"),
        (["--strategy", "layer-skipping", "--layers", "9"], "names 9, but layers are 0 to 4"),
        (["--temperature", "-1"], "temperature=-1.0 must be 0 (greedy)"),
        (["--top-p", "2"], "top_p=2.0"),
        (["--stop-strings", ""], "stop_strings"),
        (
            ["--stop-tokens", "a"],
            "--stop-tokens a does not fit: it is any number of values, each a whole",
        ),
        (["--device", "meta"], "device='meta' is not supported"),
        (["--max-new-tokens", "0"], "max_new_tokens=0"),
        (["--max-new-tokens", "500"], "past max_seq_len=64"),
        (["--prompt", ""], "prompt 0 is empty"),
        (["--prompt", "\udcff"], "the prompt is not text in UTF-8"),
        (["--device", "banana"], "device='banana'"),
        (["--checkpoint", "nowhere"], "nowhere does not exist"),
    ],
)
def test_a_mistake_is_one_sentence(shell, checkpoint, arguments, sentence):
    given = ["--checkpoint", checkpoint, "--prompt", PROMPT, "--max-new-tokens", 12, *arguments]
    code, out, err = shell("generate", *given)
    assert (code, out) == (1, "")
    assert err.startswith("error: ") and sentence in err and err.count("\n") == 1


def test_a_model_without_a_tokenizer_is_refused(shell, checkpoint):
    MoEDecoder.from_pretrained(checkpoint).save_pretrained("bare")
    code, _, err = shell("generate", "--checkpoint", "bare", "--prompt", PROMPT)
    assert code == 1 and "holds no tokenizer" in err
