"""Drafts from the text itself: what is found in it, and how many each row gets."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layerskip_moe.generation import Autoregressive, LookupSpeculative, PromptLookup, generate
from layerskip_moe.generation.ngrams import Text, Texts


def by_search(said, longest, shortest, count, drafts):
    """`Text.continuation` without an index: look for the end at every place of the text, the latest first."""
    whole = said + drafts
    for length in range(min(longest, len(whole)), shortest - 1, -1):
        for end in range(len(said) - 1, length - 1, -1):
            if said[end - length : end] == whole[-length:]:
                for _ in range(count):
                    whole = [*whole, whole[end + len(whole) - len(said) - len(drafts)]]
                return whole[len(said) + len(drafts) :]
    return []


@given(
    said=st.lists(st.integers(0, 3), min_size=1, max_size=30),
    later=st.lists(st.integers(0, 3), max_size=6),
    drafts=st.lists(st.integers(0, 3), max_size=4),
    lengths=st.tuples(st.integers(1, 4), st.integers(1, 4)).map(sorted),
    count=st.integers(1, 9),
)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_the_latest_occurrence_of_the_longest_end_goes_on(said, later, drafts, lengths, count):
    shortest, longest = lengths
    text = Text(said, longest, shortest)
    text.extend(later)
    assert text.continuation(count, drafts) == by_search(said + later, longest, shortest, count, drafts)


def test_a_repetition_goes_on_repeating():
    assert Text([7, 1, 2, 1, 2], 3, 1).continuation(5) == [1, 2, 1, 2, 1]
    assert Text([5, 5], 3, 1).continuation(3) == [5, 5, 5]
    assert Text([5], 3, 1).continuation(3) == []
    assert Text([1, 2, 9, 3, 1], 3, 2).continuation(3) == [], "one token is less than min_ngram"
    assert Text([1, 2, 9, 3, 1], 3, 2).continuation(3, [2]) == [9, 3, 1]


def test_texts_follow_the_rows_that_stay():
    texts = Texts(SimpleNamespace(texts=lambda: [[1, 2], [3], [4, 5, 4]]), 3, 1)
    texts.extend(torch.tensor([[1, 9], [3, 3], [8, 8]]), [0, 1, 0])
    texts.select(torch.tensor([0, 2]))
    assert [text.continuation(2) for text in texts.rows] == [[2, 1], []]


def alternating(tokens, positions):
    """After every token but the last two the next one, then 0: 0 1 2 .. 9 0 1 ..: a text that repeats itself."""
    return torch.nn.functional.one_hot((tokens + 1) % 10, 12).float()


def never(tokens, positions):
    return torch.nn.functional.one_hot(torch.full_like(tokens, 11), 12).float()


def test_rows_without_a_match_are_decoded_plainly(table_model):
    """Row 0 knows its period, row 1 meets it after ten tokens; every layer runs over each place once."""
    model = table_model(12, alternating, never)
    prompts = [[*range(10), 0, 1], [3]]
    plain = generate(model, prompts, Autoregressive(), max_new_tokens=24)
    model.calls.clear()
    out = generate(model, prompts, PromptLookup(3, 2, 1), max_new_tokens=24)
    assert out.tokens == plain.tokens
    assert out.row_stats[0].drafted == out.row_stats[0].accepted == 18 and out.row_stats[0].rounds == 6
    # 10 plain steps to know its period, then 14 tokens, 4 at a time, the last two in one round
    assert (out.row_stats[1].rounds, out.row_stats[1].drafted, out.row_stats[1].accepted) == (14, 10, 10)
    # 6 rounds of row 0's four places beside row 1's one, then row 1 alone
    _prefill, *calls = model.calls
    assert calls == [(0, 4, 5, 1)] * 6 + [(0, 4, 1, 1)] * 4 + [(0, 4, 1, 4)] * 3 + [(0, 4, 1, 2)]


@pytest.mark.parametrize("lookup", ["after", "instead"])
def test_early_layers_and_the_text_together(table_model, lookup):
    """The early layers know the next token, the text knows more: every place is run once by every layer."""
    model = table_model(12, alternating, alternating)
    out = generate(model, [[*range(10), 0]], LookupSpeculative(1, 2, 5, lookup, min_ngram=1), max_new_tokens=16)
    assert out.tokens == [[(1 + place) % 10 for place in range(16)]]
    assert out.stats.drafted == out.stats.accepted
    _, *calls = model.calls
    if lookup == "after":  # three places one by one, five together; the rest over all eight
        assert calls == [(0, 1, 1, 1)] * 3 + [(0, 1, 1, 5), (1, 4, 1, 8)] + [(0, 1, 1, 1)] * 3 + [
            (0, 1, 1, 5),
            (1, 4, 1, 8),
        ]
    else:  # the text knows, so nobody else is asked
        assert calls == [(0, 4, 1, 6), (0, 4, 1, 6), (0, 4, 1, 4)]


def test_the_early_layers_draft_where_the_text_is_new(table_model):
    model = table_model(12, alternating, alternating)
    out = generate(model, [[3], [*range(10), 0]], LookupSpeculative(1, 2, 2, "instead", min_ngram=1), max_new_tokens=6)
    assert [stats.rounds for stats in out.row_stats] == [2, 2]
    _, *calls = model.calls
    assert calls[:3] == [(0, 1, 1, 1)] * 3, "row 0 alone drafts"
    assert calls[3:5] == [(0, 1, 3, 1), (1, 4, 6, 1)], "row 1's places start as tokens"


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: PromptLookup(0), "must be 1 or more"),
        (lambda: PromptLookup(2, ngram=1), "min_ngram=2 must be 1 or more and at most ngram=1"),
        (lambda: PromptLookup(2, min_ngram=0), "min_ngram=0"),
        (lambda: PromptLookup(2, 2, 3), "min_ngram=3"),
        (lambda: LookupSpeculative(1, 0), "draft_length=0"),
        (lambda: LookupSpeculative(1, 2, 0), "lookup_length=0"),
        (lambda: LookupSpeculative(1, lookup="before"), "'after' or 'instead'"),
    ],
)
def test_what_is_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_an_exit_layer_the_model_lacks(tiny_model):
    with pytest.raises(ValueError, match="exit_layer=4 must be between"):
        generate(tiny_model(), [[1]], LookupSpeculative(4), max_new_tokens=2)
