"""Prompts that are texts: encoded as the tokenizer encodes a text, its special tokens included."""

import pytest

from layerskip_moe.generation import Autoregressive, generate

WORDS = ["a", "b", "c", "<begin>", "<end>"]


@pytest.fixture
def word_tokenizer():
    """word_tokenizer(template=None) -> token i is WORDS[i]; the template says what stands around a text, $A."""
    tokenizers = pytest.importorskip("tokenizers")

    def build(template=None):
        vocabulary = {word: token for token, word in enumerate(WORDS)}
        tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="a"))
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
        tokenizer.add_special_tokens(WORDS[3:])
        if template is not None:
            special = [(word, vocabulary[word]) for word in WORDS[3:]]
            tokenizer.post_processor = tokenizers.processors.TemplateProcessing(template, special_tokens=special)
        return tokenizer

    return build


@pytest.fixture
def started_with(tiny_model):
    """started_with(prompts, tokenizer) -> the token ids that decoding began with."""

    class Remembering(Autoregressive):
        def start(self, session):
            ends = (session.cache.lengths + 1).tolist()
            started.extend(tokens[:end] for tokens, end in zip(session.tokens.tolist(), ends, strict=True))
            super().start(session)

    started = []

    def run(prompts, tokenizer):
        generate(tiny_model(), prompts, Remembering(), max_new_tokens=2, tokenizer=tokenizer)
        return started

    return run


@pytest.mark.parametrize(
    ("template", "prompts"),
    [
        (None, [[2, 0, 1], [1]]),
        ("<begin> $A", [[3, 2, 0, 1], [3, 1]]),  # Llama's
        ("<begin> $A <end>", [[3, 2, 0, 1, 4], [3, 1, 4]]),
    ],
)
def test_the_tokenizers_special_tokens_stand_around_a_text(started_with, word_tokenizer, template, prompts):
    assert started_with(["c a b", "b"], word_tokenizer(template)) == prompts


def test_a_text_is_encoded_as_transformers_does(started_with, word_tokenizer):
    transformers = pytest.importorskip("transformers")
    tokenizer = word_tokenizer("<begin> $A")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=word_tokenizer("<begin> $A"))
    assert started_with(["b c", "a"], tokenizer) == theirs(["b c", "a"])["input_ids"]


def test_an_empty_text_is_a_prompt_where_a_token_stands_before_it(started_with, word_tokenizer):
    assert started_with([""], word_tokenizer("<begin> $A")) == [[3]]


def test_token_ids_are_taken_as_they_are(started_with, word_tokenizer):
    assert started_with([[2, 0], [1]], word_tokenizer("<begin> $A")) == [[2, 0], [1]]
