"""Stop strings: where they end a row's tokens and its text, under every strategy."""

import pytest
import torch.nn.functional as F

from layerskip_moe.generation import Autoregressive, EarlyExit, SelfSpeculative, Speculative, generate

NUMBERS = [b"%d," % number for number in range(60)]
STRATEGIES = {
    "plain": lambda draft: Autoregressive(),
    "its own layers": lambda draft: SelfSpeculative(2, 4),
    "one draft": lambda draft: SelfSpeculative(1, 1),
    "rejection": lambda draft: SelfSpeculative(2, 4, coupling="rejection"),
    "a draft model": lambda draft: Speculative(draft, 5),
}


@pytest.fixture
def counting_up(table_model):
    """A stub whose every depth says that after token x comes x + 1, of 60 tokens; its `draft_model` is wrong about
    every token that 5 divides."""

    def after(tokens, positions):
        return F.one_hot(tokens + 1, 60).float()

    def wrong_at_times(tokens, positions):
        return F.one_hot(tokens + 1 + ((tokens + 1) % 5 == 0), 60).float()

    model = table_model(60, after, wrong_at_times, n_layers=4)
    model.draft_model = table_model(60, wrong_at_times, wrong_at_times, n_layers=2)
    return model


BY_HAND = {
    "a whole token": (["13,"], 13, "11,12,"),
    "across two tokens": (["2,1"], 13, "11,1"),
    "inside a token": (["4"], 14, "11,12,13,1"),
    "the first token": (["1"], 11, ""),
    "across many rounds": (["2,13,14,15,16,17,18,1"], 19, "11,1"),
    "in the last token": (["22,"], 22, "11,12,13,14,15,16,17,18,19,20,21,"),
    "begun in the prompt": (["10,11,", ",11", "9,10,"], 22, None),
    "never": (["23", "12,14", "x"], 22, None),
    "the first of several": (["19,", "3,1", "17"], 14, "11,12,1"),
    "two that end in one token": (["5,", "4,1"], 15, "11,12,13,1"),
    "two that begin alike": (["13,14,", "13,1"], 14, "11,12,"),
    "one inside another": (["12,13,14,", "3"], 13, "11,12,1"),
}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("case", BY_HAND)
def test_where_tokens_and_text_end(counting_up, byte_level_tokenizer, strategy, case):
    stops, last, text = BY_HAND[case]
    tokenizer, told = byte_level_tokenizer(NUMBERS), []
    out = generate(
        counting_up,
        [[8, 9, 10]],
        STRATEGIES[strategy](counting_up.draft_model),
        max_new_tokens=12,
        tokenizer=tokenizer,
        stop_strings=stops,
        on_token=lambda row, token: told.append(token),
    )
    assert out.tokens == [list(range(11, last + 1))] == [told]
    assert out.text == [tokenizer.decode(told) if text is None else text]
    assert out.layers_run == [[4] * len(told)] and out.stats.generated == len(told)


@pytest.mark.parametrize("strategy", ["plain", "its own layers", "a draft model"])
def test_characters_of_several_tokens(counting_up, byte_level_tokenizer, strategy):
    """12 and 13 share the é, 16 ends in the first byte of the € that 17 completes."""
    pieces = [b"<%d>" % number for number in range(60)]
    pieces[12:18] = [b" caf\xc3", b"\xa9!", b" 5", b" ", b"END\xe2", b"\x82\xac."]

    def made(*stops):
        out = generate(
            counting_up,
            [[10]],
            STRATEGIES[strategy](counting_up.draft_model),
            max_new_tokens=8,
            tokenizer=byte_level_tokenizer(pieces),
            stop_strings=stops,
        )
        return out.tokens[0][-1], out.text[0]

    assert made("é") == (13, "<11> caf")
    assert made("caf") == (12, "<11> ")
    assert made("END") == (16, "<11> café! 5 ")
    assert made("D€") == (17, "<11> café! 5 EN")
    assert made("\xc3") == (18, "<11> café! 5 END€.<18>")


def test_a_row_that_stops_leaves_and_the_others_go_on(counting_up, byte_level_tokenizer):
    out = generate(
        counting_up,
        [[10], [31, 32], [5, 6, 7, 8, 9, 10], [39]],
        SelfSpeculative(2, 3),
        max_new_tokens=9,
        tokenizer=byte_level_tokenizer(NUMBERS),
        stop_strings=["2,13", "41"],
        stop_tokens=[36],
    )
    assert out.tokens == [[11, 12, 13], [33, 34, 35], [11, 12, 13], [40, 41]]
    assert out.text == ["11,1", "33,34,35,", "11,1", "40,"]
    assert [stats.generated for stats in out.row_stats] == [3, 3, 3, 2]
    alone = [rows for _, _, rows, _ in counting_up.calls]
    assert alone[0] == 4 and alone == sorted(alone, reverse=True)


def test_groups_of_rows_have_streams_of_their_own(counting_up, byte_level_tokenizer):
    arguments = dict(max_new_tokens=9, tokenizer=byte_level_tokenizer(NUMBERS), stop_strings=["3,1", "7"])
    prompts = [[10], [21], [11], [14]]
    together = generate(counting_up, prompts, **arguments)
    assert together.text == ["11,12,1", "22,23,24,25,26,2", "12,1", "15,16,1"]
    apart = generate(counting_up, prompts, batch_size=1, **arguments)
    assert (apart.tokens, apart.text) == (together.tokens, together.text)


LETTERS = [bytes([byte]) for byte in b"abc ,"] + [a + b for a in (b"a", b"b", b"c", b" ") for b in (b"a", b"b", b" ,")]
LETTERS += [
    b"\xc3",
    b"\xa9",
    b"\xc3\xa9",
    b"\xe2",
    b"\x82\xac",
    b"\xac",
    b"c\xe2",
    b"\x82",
    b"abc",
    b"  ",
    b"ca,",
    b"cc",
]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_network_s_text_is_cut_where_decoding_anew_finds_it(exact_model, byte_level_tokenizer, temperature):
    """Every strategy that promises the full model's text, against a search of that text token by token."""
    model, prompts = exact_model(), [[3], [5, 1, 7, 2], [4] * 8, [1, 2]]
    tokenizer = byte_level_tokenizer(LETTERS)
    arguments = dict(max_new_tokens=12, temperature=temperature, seed=3, tokenizer=tokenizer)
    whole = generate(model, prompts, **arguments)
    found_at = set()
    for start in range(0, 12, 3):
        text = whole.text[start % 4]
        stops = [
            stop for stop in (text[start : start + 3], text[start + 4 : start + 6]) if stop and "\ufffd" not in stop
        ]
        expected = []
        for tokens in whole.tokens:
            texts = [tokenizer.decode(tokens[:count]) for count in range(13)]
            count = next((count for count in range(13) if any(stop in texts[count] for stop in stops)), None)
            found_at.add(count)
            text = texts[-1 if count is None else count]
            expected.append(
                (tokens[:count], text[: min((text.find(stop) for stop in stops if stop in text), default=99)])
            )
        for strategy in (
            Autoregressive(),
            SelfSpeculative(1, 4),
            Speculative(exact_model(n_layers=1), 3),
            EarlyExit(1),
        ):
            out = generate(model, prompts, strategy, stop_strings=stops, **arguments)
            assert list(zip(out.tokens, out.text, strict=True)) == expected
    assert len(found_at) >= 4, "stop strings were to be found at various places"


@pytest.mark.parametrize(
    ("stop_strings", "with_tokenizer", "message"),
    [
        ("END", True, r"stop_strings is one string; give a list, such as \['END'\]"),
        (["END"], False, "stop_strings are looked for in the text; give tokenizer= as well"),
        (["END", ""], True, "stop_strings holds something other than a text of at least one character; leave it out"),
        (["END", 13], True, "stop_strings holds something other than a text"),
    ],
)
def test_stop_strings_refused(counting_up, byte_level_tokenizer, stop_strings, with_tokenizer, message):
    tokenizer = byte_level_tokenizer(NUMBERS) if with_tokenizer else None
    with pytest.raises(ValueError, match=message) as refused:
        generate(counting_up, [[1]], max_new_tokens=4, stop_strings=stop_strings, tokenizer=tokenizer)
    assert str(refused.value).endswith(".") and not counting_up.calls


def test_a_special_token_is_refused_as_a_stop_string(counting_up, byte_level_tokenizer):
    """Decoding leaves it out, so it would never be found."""
    tokenizer = byte_level_tokenizer(NUMBERS)
    tokenizer.add_special_tokens(["<|end|>"])
    token = tokenizer.token_to_id("<|end|>")
    with pytest.raises(ValueError, match=rf"special token, which no text shows; give its id, {token}, in stop_tokens"):
        generate(counting_up, [[1]], max_new_tokens=4, stop_strings=["7", "<|end|>"], tokenizer=tokenizer)


def test_stop_strings_may_come_from_a_generator(counting_up, byte_level_tokenizer):
    tokenizer = byte_level_tokenizer(NUMBERS)
    out = generate(counting_up, [[1]], stop_strings=(f"{n}," for n in (9, 5)), max_new_tokens=9, tokenizer=tokenizer)
    assert (out.tokens, out.text) == ([[2, 3, 4, 5]], ["2,3,4,"])
