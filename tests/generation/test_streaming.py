"""Text and tokens as they come: `TextStream` gives out what is certain and never takes it back, `on_token` tells each
row's tokens in order."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerskip_moe.generation import (
    Autoregressive,
    EarlyExit,
    LayerSkipping,
    SelfSpeculative,
    Speculative,
    TextStream,
    generate,
)

some = settings(max_examples=60, deadline=None, derandomize=True)
TRAINING_TEXT = "café €uro “quoted” naïve. END. 😀 😁 日本語 . “a” “b” … " * 9


def letters_and_pieces_of_characters():
    """Bytes from every place of the UTF-8 of é, € and 😀, and tokens that end inside one."""
    alone = [b"\xc3", b"\xa9", b"\xe2", b"\x82", b"\xac", b"\xf0", b"\x9f", b"\x98", b"\x80", b"\xff", b"\xe2\x82"]
    return [*alone, b"a", b"b", b"ab", b" ", b"\n", b"a\xe2", b"\xacb", b"\xa9a\xc3", "é€".encode(), "\ufffd".encode()]


def trained(kind):
    from layerskip_moe.data.tokenizer import train_tokenizer

    return train_tokenizer(kind, 310, [("train", TRAINING_TEXT)], progress=False)


def whole_words():
    """No decoder: tokens are joined by spaces."""
    import tokenizers

    vocabulary = {word: token for token, word in enumerate(["one", "two", "three", "<|endoftext|>"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="one"))
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer


def falling_back_on_bytes():
    """As Llama's and Mixtral's: the first token's leading space is dropped, and unknown characters are byte tokens."""
    import tokenizers
    from tokenizers import decoders

    words = ["▁", "▁a", "b", "▁b"]
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {word: 256 + n for n, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


@pytest.fixture(scope="module")
def tokenizers_by_name(byte_level_tokenizer):
    return {
        "pieces": byte_level_tokenizer(letters_and_pieces_of_characters()),
        "bpe": trained("bpe"),
        "unigram": trained("unigram"),
        "words": whole_words(),
    }


def stream(tokenizer, tokens, stop_strings=()):
    """(what each push gave until it stopped, what `finish` gave, the stream)."""
    text, given_out = TextStream(tokenizer, stop_strings), []
    for token in tokens:
        given_out.append(text.push(token))
        if text.stopped:
            break
    return given_out, text.finish(), text


@pytest.mark.parametrize("name", ["pieces", "bpe", "unigram", "words"])
@given(data=st.data())
@some
def test_what_is_given_out_is_the_text(tokenizers_by_name, name, data):
    """For any ids, invalid bytes and special tokens among them; and what is given out early is its beginning."""
    tokenizer = tokenizers_by_name[name]
    tokens = data.draw(st.lists(st.integers(0, tokenizer.get_vocab_size() - 1), max_size=14))
    given_out, rest, text = stream(tokenizer, tokens)
    assert "".join(given_out) + rest == text.text == tokenizer.decode(tokens)
    assert not text.stopped


def cut_by_decoding_anew(tokenizer, tokens, stop_strings):
    """(tokens, text, stopped): decode all so far after each token, and search it."""
    for count in range(1, len(tokens) + 1):
        told = tokenizer.decode(tokens[:count])
        found = [told.find(stop) for stop in stop_strings if stop in told]
        if found:
            return count, told[: min(found)], True
    return len(tokens), tokenizer.decode(tokens), False


@pytest.mark.parametrize("name", ["pieces", "bpe", "words"])
@given(data=st.data())
@some
def test_stop_strings_are_found_as_by_decoding_anew(tokenizers_by_name, name, data):
    tokenizer = tokenizers_by_name[name]
    tokens = data.draw(st.lists(st.integers(0, tokenizer.get_vocab_size() - 1), min_size=1, max_size=14))
    whole = tokenizer.decode(tokens)
    inside = st.tuples(st.integers(0, max(0, len(whole) - 1)), st.integers(1, 5)).map(
        lambda at: whole[at[0] :][: at[1]]
    )
    strings = (inside | st.text("ab €é", min_size=1, max_size=3)).filter(lambda stop: stop and "\ufffd" not in stop)
    stops = data.draw(st.lists(strings, max_size=3))
    given_out, rest, text = stream(tokenizer, tokens, stops)
    count, expected, stopped = cut_by_decoding_anew(tokenizer, tokens, stops)
    assert (len(given_out), text.text, text.stopped) == (count, expected, stopped)
    assert "".join(given_out) + rest == expected, "part of a stop string was given out, or something is missing"


@pytest.mark.parametrize(
    ("stops", "tokens", "given_out", "rest"),
    [
        ([], [b"a", b"\xe2", b"\x82", b"\xac", b"b"], ["a", "", "", "€", "b"], ""),
        ([], [b"a", b"\xe2", b"b", b"\xff"], ["a", "", "\ufffdb", ""], "\ufffd"),
        ([], [b"a\xe2", b"\x82", b"\xacb"], ["a", "", "€b"], ""),
        (["ab "], [b"a", b"b", b"a", b"b", b" "], ["", "", "ab", "", ""], ""),
        (["ab "], [b"a", b"b"], ["", ""], "ab"),
        (["aab"], [b"a", b"a", b"a", b"b"], ["", "", "a", ""], ""),
        (["€"], [b"a", b"\xe2", b"\x82", b"\xac"], ["a", "", "", ""], ""),
        (["a"], [b"b", b"a\xe2"], ["b", ""], ""),
    ],
    ids=str,
)
def test_what_is_held_back_and_until_when(byte_level_tokenizer, stops, tokens, given_out, rest):
    pieces = letters_and_pieces_of_characters()
    got = stream(byte_level_tokenizer(pieces), [pieces.index(token) for token in tokens], stops)
    assert got[:2] == (given_out, rest)


def test_a_tokenizer_that_falls_back_on_bytes():
    """Its decoder calls a newline invalid once an invalid byte follows: what was given out stands, and goes on."""
    tokenizer = falling_back_on_bytes()
    euro, newline = [0xE2, 0x82, 0xAC], 0x0A
    valid = [257, 256, 256, newline, *euro, newline, 259, *euro, *euro, 258]
    given_out, rest, _ = stream(tokenizer, valid)
    assert given_out == ["a", " ", " ", "\n", "", "", "€", "\n", " b", "", "", "€", "", "", "€", "b"] and rest == ""
    assert "".join(given_out) == tokenizer.decode(valid)
    assert stream(tokenizer, [257, newline, 0xE2, 258])[0] == ["a", "\n", "", "\ufffdb"]
    assert tokenizer.decode([257, newline, 0xE2, 258]) == "a\ufffd\ufffdb"
    assert stream(tokenizer, [257, newline, 258], ["\n"])[0] == ["a", ""]


def strategies(draft_model):
    return {
        "plain": Autoregressive(),
        "an early layer": Autoregressive(2),
        "its own layers": SelfSpeculative(1, 3),
        "rejection": SelfSpeculative(2, 2, coupling="rejection"),
        "a draft model": Speculative(draft_model, 3),
        "early exit": EarlyExit(0.3, cache="exact"),
        "layer skipping": LayerSkipping(random=1),
    }


NAMES = list(strategies(None))


@pytest.mark.parametrize("batch_size", [None, 2])
@pytest.mark.parametrize("name", NAMES)
def test_tokens_are_told_in_order(trained_model, name, batch_size):
    prompts = [[3], [5, 1, 7, 2], [8, 8, 1], [1, 2], [4]]
    arguments = dict(max_new_tokens=9, temperature=0.8, stop_tokens=[7, 11], batch_size=batch_size)
    strategy, told = strategies(trained_model(n_layers=1))[name], []
    out = generate(
        trained_model(), prompts, strategy, on_token=lambda row, token: told.append((row, token)), **arguments
    )
    assert [[token for row, token in told if row == wanted] for wanted in range(5)] == out.tokens
    assert all(type(row) is int and type(token) is int for row, token in told)
    assert 5 < len(told) < 45, "rows were to stop early"
    if batch_size:
        groups = [row // batch_size for row, _ in told]
        assert groups == sorted(groups)
    assert out.tokens == generate(trained_model(), prompts, strategy, **arguments).tokens


def test_a_token_is_told_before_the_next_round(tiny_model):
    """As soon as it is settled: between two tokens of plain decoding the model runs."""
    model, events = tiny_model(), []
    model.norm.register_forward_hook(lambda *_: events.append("ran"))
    generate(model, [[1, 2]], max_new_tokens=3, compile=False, on_token=lambda row, token: events.append("told"))
    assert events == ["ran", "told"] * 3


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("name", NAMES)
def test_an_error_in_on_token_leaves_the_models_as_found(trained_model, tiny_model, name, error):
    model, draft = tiny_model(dropout=0.3).train(), tiny_model(n_layers=1, dropout=0.3).train()
    draft.blocks[0].eval()
    modes = [[module.training for module in each.modules()] for each in (model, draft)]
    strategy, prompts = strategies(draft)[name], [[1, 2], [3], [4, 4, 4]]
    expected = generate(model, prompts, strategy, max_new_tokens=6).tokens

    told = []

    def interrupt(row, token):
        assert not model.training and (name != "a draft model" or not draft.training)
        told.append(token)
        if len(told) == 5:
            raise error

    with pytest.raises(error):
        generate(model, prompts, strategy, max_new_tokens=6, on_token=interrupt)
    assert len(told) == 5
    assert [[module.training for module in each.modules()] for each in (model, draft)] == modes
    assert generate(model, prompts, strategy, max_new_tokens=6).tokens == expected
