"""Every strategy, compiled and not: the same text as plain decoding, token for token, and nothing compiled on the way.

Few rows are computed alike whatever their number, so that no tie can be broken otherwise. Next:
`../nn/test_few_rows_models.py`, where that is tested; `test_losslessness.py`, which tries more settings.
"""

import copy
import warnings

import pytest
import torch
from torch._dynamo.utils import counters

from layerskip_moe.generation import Autoregressive, EarlyExit, LayerSkipping, SelfSpeculative, Speculative, generate
from layerskip_moe.generation.policies import DEL, Cascade, DraftVerify, Heuristic
from layerskip_moe.nn import kernels, steps
from layerskip_moe.nn.kernels import has_kernels
from layerskip_moe.pretrained.quantize import quantize

PROMPTS = [[3, 9, 21], [5], [1, 2, 3, 4, 5, 6, 7, 8], [20, 11]]  # times a draft of 8 and one more: 36 rows at most
SAMPLINGS = [dict(), dict(temperature=0.9, seed=3)]
MODELS = {
    "Mixtral": dict(qk_norm=None),
    "OLMoE": dict(qk_norm="full", clip_qkv=5.0, normalize_top_k=False, n_kv_heads=4),
    "Qwen2-MoE": dict(qk_norm=None, qkv_bias=True, shared_expert_d_ff=8, shared_expert_gate=True),
    "sliding window": dict(sliding_window=4),
    "dense": dict(num_experts=0),
}
# Whose text is plain decoding's. The draft model is of two layers; `int8` is the model itself, quantised; `chance`
# makes a policy at random.
POLICIES = {
    "heuristic": lambda draft, int8, chance: SelfSpeculative(policy=Heuristic(2, length=3)),
    "draft & verify": lambda draft, int8, chance: SelfSpeculative(policy=DraftVerify(1, length=3, threshold=0.3)),
    "DEL": lambda draft, int8, chance: SelfSpeculative(policy=DEL(length=3)),
    "cascade": lambda draft, int8, chance: SelfSpeculative(policy=Cascade(2, start=2, length=3, trial=1, rounds=3)),
    "a policy at random": lambda draft, int8, chance: SelfSpeculative(policy=chance(seed=3)),
}
LOSSLESS = POLICIES | {
    "one layer drafts one": lambda draft, int8, chance: SelfSpeculative(1, 1),
    "one layer drafts eight": lambda draft, int8, chance: SelfSpeculative(1, 8),
    "two layers draft three": lambda draft, int8, chance: SelfSpeculative(2, 3),
    "all layers draft": lambda draft, int8, chance: SelfSpeculative(3, 4),
    "int8 layers draft": lambda draft, int8, chance: SelfSpeculative(2, 4, draft_model=int8),
    "a draft model": lambda draft, int8, chance: Speculative(draft, 4),
    "a draft model's first layer": lambda draft, int8, chance: Speculative(draft, 2, exit_layer=1),
    "int8 drafts": lambda draft, int8, chance: Speculative(int8, 3),
    "exits never taken": lambda draft, int8, chance: EarlyExit(1.0),
    "exits never taken, exact": lambda draft, int8, chance: EarlyExit(1.0, cache="exact"),
}
LOSSY = {
    "first layers": lambda draft, int8, chance: Autoregressive(2),
    "early exit": lambda draft, int8, chance: EarlyExit(0.3),
    "early exit, exact": lambda draft, int8, chance: EarlyExit(0.3, cache="exact"),
    "layers left out": lambda draft, int8, chance: LayerSkipping(layers=(1,)),
    "layers left out at random": lambda draft, int8, chance: LayerSkipping(random=1),
    "rejection": lambda draft, int8, chance: SelfSpeculative(2, 3, coupling="rejection"),
}


@pytest.fixture(scope="module")
def helpers(trained_model, random_policy):
    """helpers(**ModelConfig fields) -> the draft model, the quantised model and the policy that strategies take."""

    def make(**fields):
        return trained_model(n_layers=2), quantize(trained_model(**fields), "int8"), random_policy

    return make


@pytest.mark.parametrize("compile", [True, False], ids=["compiled", "not compiled"])
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", MODELS)
def test_lossless_strategies_give_plain_decoding_s_text(trained_model, helpers, name, sampling, compile):
    model, others = trained_model(**MODELS[name]), helpers(**MODELS[name])
    arguments = dict(max_new_tokens=12 if compile else 7, compile=compile, **sampling)  # what is slow, for shorter
    plain = generate(model, PROMPTS, Autoregressive(), **arguments).tokens
    assert [len(row) for row in plain] == [arguments["max_new_tokens"]] * 4 and len(set(plain[0])) > 3
    for strategy in LOSSLESS:
        assert generate(model, PROMPTS, LOSSLESS[strategy](*others), **arguments).tokens == plain, strategy
    alone = [generate(model, [prompt], **arguments).tokens[0] for prompt in PROMPTS]
    assert alone[0] == plain[0] if sampling else alone == plain  # the noise is that of the row


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "sampled"])
def test_no_ties_in_half_precision_either(tiny_model, random_policy, sampling, dtype):
    model = tiny_model(seed=2).to(dtype)
    others = tiny_model(seed=3, n_layers=2).to(dtype), quantize(model, "int8"), random_policy
    for compile in (True, False):
        arguments = dict(max_new_tokens=12 if compile else 5, compile=compile, **sampling)
        plain = generate(model, PROMPTS, **arguments).tokens
        for strategy in LOSSLESS:
            assert generate(model, PROMPTS, LOSSLESS[strategy](*others), **arguments).tokens == plain, strategy


@pytest.mark.parametrize("strategy", [*LOSSLESS, *LOSSY])
def test_recorded_or_not_is_the_same_text(trained_model, helpers, monkeypatch, strategy):
    """With recordings, and with the same kernels called one by one."""
    model, others = trained_model(), helpers()
    made = (LOSSLESS | LOSSY)[strategy](*others)
    for sampling in SAMPLINGS:
        arguments = dict(max_new_tokens=12, **sampling)
        recorded = generate(model, PROMPTS, made, **arguments)
        with monkeypatch.context() as patch:
            # What is never complete is made anew each time.
            patch.setattr(steps.Recording, "complete", property(lambda self: False, lambda self, value: None), False)
            one_by_one = generate(copy.deepcopy(model), PROMPTS, made, **arguments)  # which has no recordings yet
        assert recorded.tokens == one_by_one.tokens and recorded.layers_run == one_by_one.layers_run


@pytest.mark.skipif(not has_kernels(), reason="there is no C++ compiler")
@pytest.mark.parametrize("strategy", ["plain", *(name for name in LOSSLESS if name not in POLICIES), *LOSSY])
def test_nothing_is_recorded_as_the_text_grows(trained_model, random_policy, monkeypatch, strategy):
    given, made = [], []  # the new tokens; how many there were at each recording

    class Counted(steps.Recording):
        def __init__(self, *arguments, **how):
            super().__init__(*arguments, **how)
            assert self.complete
            made.append(len(given))

    monkeypatch.setattr(steps, "Recording", Counted)
    model = copy.deepcopy(trained_model(max_seq_len=70))  # a model that was decoded before may have its recordings
    draft = copy.deepcopy(trained_model(max_seq_len=70, n_layers=2))
    one = (LOSSLESS | LOSSY).get(strategy, lambda *_: None)(draft, quantize(model, "int8"), random_policy)
    generate(model, [[3, 9, 21]], one, max_new_tokens=60, on_token=lambda row, token: given.append(token))
    if strategy.startswith("early exit") or strategy.endswith("random"):
        assert 2 <= len(made) <= 30  # a depth, and how much is to be made up for, may be met late
    else:
        # The first round may be another than the rest, and the last ones draft what is left.
        assert made and not [at for at in made if 12 <= at < 60 - 12]


@pytest.mark.parametrize("strategy", ["plain", *LOSSLESS, *LOSSY])
def test_pytorch_s_compiler_is_not_asked(trained_model, helpers, strategy):
    one = (LOSSLESS | LOSSY).get(strategy, lambda *_: None)(*helpers())
    counters.clear()
    generate(trained_model(), PROMPTS, one, max_new_tokens=10)
    assert not counters["stats"] and not counters["frames"] and not counters["inductor"]


@pytest.fixture
def no_kernels_yet(monkeypatch, tmp_path):
    """As in a new process with an empty cache, on a machine whose compiler fails; the file it leaves when called."""
    called, compiler = tmp_path / "called", tmp_path / "compiler"
    compiler.write_text(f"#!/bin/sh\ntouch {called}\necho no luck >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setattr(kernels, "_loaded", None)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("LAYERSKIP_MOE_CACHE", str(tmp_path / "cache"))
    return called


def test_not_compiling_asks_no_compiler(trained_model, helpers, no_kernels_yet):
    model, others = trained_model(), helpers()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = generate(model, PROMPTS, max_new_tokens=6, compile=False).tokens
        for strategy in LOSSLESS.values():
            assert generate(model, PROMPTS, strategy(*others), max_new_tokens=6, compile=False).tokens == plain
    assert not no_kernels_yet.exists() and kernels._loaded is None


def test_a_compiler_that_fails_is_told_of_once_and_done_without(trained_model, helpers, no_kernels_yet):
    model, others = trained_model(), helpers()
    expected = generate(model, PROMPTS, max_new_tokens=6, compile=False).tokens
    with pytest.warns(UserWarning, match="(?s)slower than it could be.*no luck") as told:
        plain = generate(model, PROMPTS, max_new_tokens=6).tokens
    assert len(told) == 1 and no_kernels_yet.exists() and plain == expected
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for strategy in LOSSLESS.values():
            assert generate(model, PROMPTS, strategy(*others), max_new_tokens=6).tokens == plain


def test_the_model_is_left_as_it_was(trained_model):
    model = trained_model()
    assert model.compiled is False
    generate(model, PROMPTS, max_new_tokens=3)
    assert model.compiled is False
    with pytest.raises(ZeroDivisionError):
        generate(model, PROMPTS, max_new_tokens=3, on_token=lambda row, token: 1 / 0)
    assert model.compiled is False


@pytest.mark.parametrize("compile", [True, False], ids=["compiled", "not compiled"])
def test_under_autocast(trained_model, compile):
    """Its products are in another type, which few rows' are not: what is many rows' way serves."""
    model = trained_model()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = generate(model, PROMPTS, SelfSpeculative(2, 3), max_new_tokens=6, compile=compile)
    assert [len(row) for row in out.tokens] == [6] * 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "sampled"])
@pytest.mark.parametrize("strategy", ["plain", *LOSSLESS])
def test_on_a_gpu_captured_steps_give_the_text_of_eager_ones(
    trained_model, random_policy, monkeypatch, strategy, sampling
):
    made = []

    class Counted(steps.Graph):
        def __init__(self, *arguments, **others):
            super().__init__(*arguments, **others)
            made.append(self.complete)

    monkeypatch.setattr(steps, "Graph", Counted)
    model, draft = trained_model().cuda(), trained_model(n_layers=2).cuda()
    try:
        one = LOSSLESS.get(strategy, lambda *_: None)(draft, quantize(model, "int8"), random_policy)
        eager = generate(model, PROMPTS, max_new_tokens=12, compile=False, **sampling).tokens
        assert generate(model, PROMPTS, one, max_new_tokens=12, **sampling).tokens == eager and made
        assert all(made) or "int8" in strategy  # whose experts wait for the GPU
    finally:
        model.cpu(), draft.cpu()  # other tests share them
