"""What cannot be decoded is refused before anything runs, in one sentence that names it."""

import math
from types import SimpleNamespace

import pytest
import torch

from layerskip_moe.generation import Autoregressive, EarlyExit, Sampling, SelfSpeculative, Speculative, generate
from layerskip_moe.generation.policies import DEL, Cascade, DraftVerify, Fixed, Heuristic


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model()  # 29 tokens, 3 layers, max_seq_len 20


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "there are no prompts; give at least one"),
        ([[1], []], {}, "prompt 1 is empty; give at least one token"),
        ([[1, 29]], {}, "prompt 0 holds token id 29, but the vocabulary has ids 0 to 28"),
        ([[3], [1, -1]], {}, "prompt 1 holds token id -1"),
        ("text", {}, r"prompts is one string; give a list of prompts, such as \[prompt\]"),
        ([[1], "text"], {}, "prompt 1 is a string; give tokenizer="),
        ([1, 2, 3], {}, r"prompt 0 is the number 1; give a list of prompts, such as \[\[1, 2, 3\]\]"),
        (
            [[1], [1] * 13],
            dict(max_new_tokens=8),
            "prompt 1 has 13 tokens, .*max_new_tokens=8 is past max_seq_len=20",
        ),
        ([[1]], dict(max_new_tokens=20), "prompt 0 has 1 tokens.*max_seq_len=20"),
        ([[1]], {}, "max_new_tokens=128 is past max_seq_len=20"),
        ([[1]], dict(max_new_tokens=0), "max_new_tokens=0 must be 1 or more"),
        ([[1]], dict(max_new_tokens=-3), "max_new_tokens=-3"),
        ([[1]], dict(batch_size=0), "batch_size=0 must be 1 or more"),
        ([[1]], dict(batch_size=-1), "batch_size=-1"),
        ([[1]], dict(temperature=-0.1), "temperature=-0.1 must be 0"),
        ([[1]], dict(temperature=math.nan), "temperature=nan"),
        ([[1]], dict(temperature=math.inf), "temperature=inf"),
        ([[1]], dict(top_k=0), "top_k=0 must be 1 or more"),
        ([[1]], dict(top_k=-2), "top_k=-2"),
        ([[1]], dict(top_k=math.nan), "top_k=nan"),
        ([[1]], dict(top_p=0.0), "top_p=0.0 must be above 0 and at most 1"),
        ([[1]], dict(top_p=1.01), "top_p=1.01"),
        ([[1]], dict(top_p=math.nan), "top_p=nan"),
        ([[1]], dict(strategy="autoregressive"), "strategy='autoregressive' is not a strategy; give an object"),
        ([[1]], dict(strategy=Autoregressive), "is not a strategy; give an object, such as Autoregressive"),
        ([[1]], dict(stop_tokens=5), r"stop_tokens=5 is one id; give a list, such as \[5\]"),
        ([[1]], dict(strategy=Speculative("runs/x/model")), "draft_model='runs/x/model' is no model; load it"),
        ([[1]], dict(strategy=Autoregressive(0)), "exit_layer=0 must be between 1 and n_layers=3"),
        ([[1]], dict(strategy=Autoregressive(4)), "exit_layer=4 must be between 1 and n_layers=3"),
        ([[1]], dict(strategy=EarlyExit(0.5, min_layer=0)), "min_layer=0 must be between 1 and n_layers=3"),
        ([[1]], dict(strategy=EarlyExit(1.0, min_layer=4)), "min_layer=4 must be between 1 and n_layers=3"),
        ([[1]], dict(strategy=SelfSpeculative(0)), "exit_layer=0 must be between 1 and n_layers=3"),
        ([[1]], dict(strategy=SelfSpeculative(4)), "exit_layer=4 must be between 1 and n_layers=3"),
        ([[1]], dict(strategy=SelfSpeculative(-1, coupling="rejection")), "exit_layer=-1"),
        ([[1]], dict(strategy=SelfSpeculative(policy=Fixed(4, 1))), "exit_layer=4 must be between 1 and n_layers=3"),
    ],
    ids=str,
)
def test_generate_refuses(model, monkeypatch, prompts, options, message):
    monkeypatch.setattr(model, "run", lambda *_, **__: pytest.fail("the model ran"))
    arguments = {"strategy": Autoregressive(), "max_new_tokens": 4, **options}
    if "is past max_seq_len" in message and not options:
        del arguments["max_new_tokens"]  # the default of 128
    with pytest.raises(ValueError, match=message) as refused:
        generate(model, prompts, **arguments)
    assert str(refused.value).endswith(".") and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(draft_length=0), r"draft_length=0 must be 1 or more; plain decoding is Autoregressive\(\)"),
        (dict(draft_length=-4), "draft_length=-4"),
        (dict(coupling="none"), "coupling='none' is unknown; it is 'shared' or 'rejection'"),
        (dict(exit_layer=None, draft_length=3), "draft_length and draft_model go with an exit_layer"),
        (dict(exit_layer=Fixed(1, 2)), "a policy is given as policy="),
        (dict(exit_layer=1.5), "must be a whole number"),
        (dict(exit_layer=None, policy=Fixed), "is not a policy; give an object"),
        (dict(exit_layer=None, policy="DEL"), "is not a policy; give an object"),
        (dict(policy=Fixed(1, 2)), "a policy says which layers draft how much; leave out exit_layer, draft_length and"),
        (dict(exit_layer=None, policy=Fixed(1, 2), draft_length=2), "a policy says which layers draft how much"),
        (dict(exit_layer=None, policy=Fixed(1, 2), coupling="none"), "coupling='none' is unknown"),
    ],
    ids=str,
)
def test_self_speculative_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        SelfSpeculative(**{"exit_layer": 2, **arguments})


@pytest.mark.parametrize(
    ("plan", "stops", "message"),
    [
        ([(1, 2)], False, "the policy planned for 1 rows, and 2 are active; give one pair for each"),
        ([(1, 2), (4, 1)], False, "the policy planned exit layer 4 and 1 drafts; exit layers are 1 to 3"),
        ([(1, 2), (0, 1)], False, "exit layer 0 and 1 drafts"),
        ([(1, 2), (1, -1)], False, "exit layer 1 and -1 drafts; .* and 0 drafts or more"),
        ([(1, 2), (2, 2)], torch.tensor([True]), r"should_stop returned shape \[1\] for 2 drafts; it must return one"),
    ],
    ids=str,
)
def test_what_a_policy_may_not_say(model, plan, stops, message):
    policy = SimpleNamespace(shadow=False, plan=lambda session: plan, should_stop=lambda *_: stops)
    with pytest.raises(ValueError, match=message) as refused:
        generate(model, [[1], [2]], SelfSpeculative(policy=policy), max_new_tokens=5)
    assert str(refused.value).endswith(".")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Fixed(1, -1), "draft_length=-1 must be 0 or more: it counts tokens"),
        (lambda: Heuristic(1, length=0), "length=0 must be 1 or more"),
        (lambda: Heuristic(1, threshold=1.1), r"threshold=1.1 must be between 0 \(never stop\) and 1"),
        (lambda: DraftVerify(1, threshold=math.nan), "threshold=nan"),
        (lambda: DEL(decay=-0.1), "decay=-0.1 must be between 0"),
        (lambda: Cascade(1, start=0), "start=0 must be 1 or more"),
        (lambda: Cascade(1, rounds=0), "rounds=0 must be 1 or more"),
    ],
)
def test_policies_refuse(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("sizes", "device", "message"),
    [
        (dict(vocab_size=30), "cpu", "draft model has vocab_size=30 and the model 29; they must share one tokenizer"),
        (dict(max_seq_len=8), "cpu", "max_seq_len=8 is less than prompt and new tokens, 9; ask for less, or build it"),
        ({}, "meta", "the draft model is on meta and the model on cpu; move one"),
    ],
    ids=str,
)
def test_a_draft_model_that_does_not_fit_is_refused(model, tiny_model, monkeypatch, sizes, device, message):
    draft = tiny_model(n_layers=1, **sizes).to(device)
    for each in (model, draft):
        monkeypatch.setattr(each, "run", lambda *_, **__: pytest.fail("a model ran"))
    with pytest.raises(ValueError, match=message) as refused:
        generate(model, [[1, 2], [3, 4, 5, 6, 7]], Speculative(draft), max_new_tokens=4)
    assert str(refused.value).endswith(".")


def test_a_draft_model_may_be_just_long_enough(model, tiny_model):
    draft = tiny_model(n_layers=1, max_seq_len=9)
    out = generate(model, [[1, 2], [3, 4, 5, 6, 7]], Speculative(draft, 7), max_new_tokens=4)
    assert out.tokens == generate(model, [[1, 2], [3, 4, 5, 6, 7]], max_new_tokens=4).tokens


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(dict(draft_length=0), "draft_length=0 must be 1 or more"), (dict(coupling="none"), "coupling='none' is unknown")],
)
def test_speculative_refuses(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        Speculative(model, **arguments)


def test_an_empty_string_is_an_empty_prompt(model):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        generate(model, ["a", ""], max_new_tokens=4, tokenizer=tokenizer)


@pytest.mark.parametrize("strategy", [Autoregressive(), SelfSpeculative(1, 8), SelfSpeculative(3, 8)], ids=str)
def test_the_last_place_of_max_seq_len_can_be_reached(model, strategy):
    for length in (1, 10, 19):
        out = generate(model, [[1] * length, [2]], strategy, max_new_tokens=20 - length)
        assert [len(row) for row in out.tokens] == [20 - length] * 2


def test_settings_at_their_limits_are_taken(model):
    assert Sampling(0.0, top_k=1, top_p=1.0).greedy
    out = generate(model, [[0, 28]], temperature=5.0, top_k=1000, top_p=1e-6, max_new_tokens=1, batch_size=7)
    assert len(out.tokens[0]) == 1
