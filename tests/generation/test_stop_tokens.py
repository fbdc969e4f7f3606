"""Stop tokens: where they end a row, that they are not in the output, and what other rows see of it; and text."""

import pytest
import torch
import torch.nn.functional as F

from layerskip_moe.generation import Autoregressive, Sampling, SelfSpeculative, generate
from layerskip_moe.generation.policies import DEL, Heuristic

SPECULATIVE = SelfSpeculative(2, 4)
STRATEGIES = [
    Autoregressive(),
    SPECULATIVE,
    SelfSpeculative(1, 1),
    SelfSpeculative(2, 4, coupling="rejection"),
]
POLICIES = {"DEL": DEL(length=4), "heuristic": Heuristic(2)}  # which learn from one test for the next


@pytest.fixture
def counting_up(table_model):
    """A stub whose every depth says that after token x comes x + 1, of 60 tokens."""

    def after(tokens, positions):
        return F.one_hot(tokens + 1, 60).float()

    return table_model(60, after, after, n_layers=4)


@pytest.mark.parametrize(
    "strategy",
    [*STRATEGIES, *(SelfSpeculative(policy=policy) for policy in POLICIES.values())],
    ids=[*map(str, STRATEGIES), *POLICIES],
)
@pytest.mark.parametrize(
    ("stop", "left"),
    [
        ([11], []),  # the first token of all
        ([13], [11, 12]),  # inside the first accepted draft, 11 to 14
        ([14], [11, 12, 13]),  # its last token
        ([15], [11, 12, 13, 14]),  # the full model's own token after the draft
        ([16], [11, 12, 13, 14, 15]),  # the first of the second draft
        ([22], list(range(11, 22))),  # the very last token asked for
        ([23, 9, 10], list(range(11, 23))),  # never met; a stop token in the prompt stops nothing
        ([17, 13, 15], [11, 12]),  # the first of several
    ],
    ids=str,
)
def test_where_a_row_ends(counting_up, strategy, stop, left):
    out = generate(counting_up, [[8, 9, 10]], strategy, max_new_tokens=12, stop_tokens=stop)
    assert out.tokens == [left]
    assert out.stats.generated == out.row_stats[0].generated == len(left)


def test_a_round_that_stops_counts_what_the_full_model_agreed_with(counting_up):
    """The drafts behind the stop token were verified and right: they are accepted, though not in the output."""
    out = generate(counting_up, [[10]], SPECULATIVE, max_new_tokens=12, stop_tokens=[13])
    stats = out.stats
    assert (stats.generated, stats.rounds, stats.drafted, stats.accepted) == (2, 1, 4, 4)


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_rows_that_stop_leave_and_the_others_go_on(counting_up, strategy):
    prompts = [[10], [31, 32], [5, 6, 7, 8, 9, 10], [40]]
    out = generate(counting_up, prompts, strategy, max_new_tokens=10, stop_tokens=[13, 41])
    assert out.tokens == [[11, 12], list(range(33, 43 - 2)), [11, 12], []]
    rows = [rows for _, _, rows, _ in counting_up.calls]
    assert rows == sorted(rows, reverse=True) and rows[0] == 4 and rows[-1] == 1


def test_no_work_is_done_for_rows_that_left(counting_up):
    generate(counting_up, [[10], [20], [30]], Autoregressive(), max_new_tokens=5, stop_tokens=[11, 22])
    assert [rows for _, _, rows, _ in counting_up.calls] == [3, 2, 1, 1, 1]


@pytest.mark.parametrize("strategy", [Autoregressive(), SelfSpeculative(1, 3), SelfSpeculative(2, 6)], ids=str)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_stopping_only_cuts_a_network_s_text(trained_model, assert_same_text, strategy, temperature):
    model, prompts = trained_model(), [[3], [5, 1, 7, 2], [4] * 8, [1, 2], [8, 8, 1, 0, 2, 3]]
    arguments = dict(max_new_tokens=12, temperature=temperature, seed=1)
    whole = generate(model, prompts, Autoregressive(), **arguments).tokens
    stops = {whole[0][4], whole[1][0], whole[4][9]}
    ends = [next((i for i, token in enumerate(row) if token in stops), 12) for row in whole]
    assert len(set(ends)) > 2, "the rows were to end at different places"
    stopped = generate(model, prompts, strategy, stop_tokens=stops, **arguments).tokens
    expected = [row[:end] for row, end in zip(whole, ends, strict=True)]
    assert_same_text(model, prompts, expected, stopped, Sampling(temperature, seed=1))


@pytest.fixture
def words():
    """A tokenizer whose words are the numbers' names; its end of text is token 13."""
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {("<|endoftext|>" if number == 13 else f"n{number}"): number for number in range(60)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="n0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_the_tokenizer_s_end_of_text_stops_and_text_comes_back(counting_up, words, strategy):
    out = generate(counting_up, ["n9 n10", "n20"], strategy, max_new_tokens=4, tokenizer=words)
    assert out.tokens == [[11, 12], [21, 22, 23, 24]]
    assert out.text == ["n11 n12", "n21 n22 n23 n24"]


def test_stop_tokens_given_win_over_the_tokenizer_s(counting_up, words):
    out = generate(counting_up, ["n10", [10]], max_new_tokens=4, tokenizer=words, stop_tokens=[])
    assert out.tokens == [[11, 12, 13, 14]] * 2
    out = generate(counting_up, ["n10"], max_new_tokens=4, tokenizer=words, stop_tokens={12})
    assert out.tokens == [[11]] and out.text == ["n11"]


def test_without_a_tokenizer_nothing_stops_and_there_is_no_text(counting_up):
    out = generate(counting_up, [[10]], max_new_tokens=20)
    assert out.tokens == [list(range(11, 31))] and out.text is None


@pytest.mark.parametrize("name", ["<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>"])
def test_the_usual_names_of_the_end_of_text(counting_up, name):
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {(name if number == 12 else f"n{number}"): number for number in range(60)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="n0"))
    assert generate(counting_up, [[10]], max_new_tokens=4, tokenizer=tokenizer).tokens == [[11]]


def test_the_end_of_a_turn_stops_a_text_as_the_end_of_a_document_does(counting_up):
    """Qwen's tokenizers have both."""
    tokenizers = pytest.importorskip("tokenizers")
    names = {12: "<|im_end|>", 22: "<|endoftext|>"}
    vocabulary = {names.get(number, f"n{number}"): number for number in range(60)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="n0"))
    out = generate(counting_up, [[10], [20]], max_new_tokens=4, tokenizer=tokenizer)
    assert out.tokens == [[11], [21]]


def test_a_tokenizer_without_an_end_of_text_stops_nothing(counting_up):
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {f"n{number}": number for number in range(60)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="n0"))
    assert generate(counting_up, [[10]], max_new_tokens=4, tokenizer=tokenizer).tokens == [[11, 12, 13, 14]]


def test_prompts_may_be_tensors_and_arrays(counting_up):
    prompts = torch.tensor([[9, 10], [19, 20]])
    assert generate(counting_up, prompts, max_new_tokens=2).tokens == [[11, 12], [21, 22]]
    assert generate(counting_up, prompts.numpy(), max_new_tokens=2).tokens == [[11, 12], [21, 22]]
