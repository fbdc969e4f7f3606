"""What one `generate` leaves to the next: recordings are made once, and never used for a model that was changed."""

import copy
import gc
import weakref

import pytest
import torch

from layerskip_moe.generation import (
    Autoregressive,
    EarlyExit,
    Sampling,
    SelfSpeculative,
    Session,
    Speculative,
    generate,
    kept_caches,
)
from layerskip_moe.nn import steps
from layerskip_moe.nn.kernels import has_kernels

PROMPTS = [[3, 9, 21], [5], [1, 2, 3, 4, 5, 6, 7, 8]]


@pytest.fixture(autouse=True)
def tiny_weights(monkeypatch):
    """Beside the weights of models as small as these, no cache is small."""
    monkeypatch.setattr(kept_caches, "_LARGEST", 9)


@pytest.fixture
def model(trained_model):
    """One that nothing was decoded with."""
    return copy.deepcopy(trained_model(max_seq_len=60))


@pytest.fixture
def made(monkeypatch):
    """The recordings made since."""
    made = []

    class Counted(steps.Recording):
        def __init__(self, *arguments, **how):
            super().__init__(*arguments, **how)
            made.append(self)

    monkeypatch.setattr(steps, "Recording", Counted)
    return made


needs_kernels = pytest.mark.skipif(not has_kernels(), reason="there is no C++ compiler")
STRATEGIES = {
    "plain": lambda draft: Autoregressive(),
    "self-speculative": lambda draft: SelfSpeculative(1, 3),
    "a draft model": lambda draft: Speculative(draft, 3),
    "early exit": lambda draft: EarlyExit(0.3),
}


@needs_kernels
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_second_text_is_recorded_no_more(model, trained_model, made, strategy):
    one = STRATEGIES[strategy](copy.deepcopy(trained_model(n_layers=2, max_seq_len=60)))
    first = generate(model, PROMPTS, one, max_new_tokens=20)
    assert made
    made.clear()
    assert generate(model, PROMPTS, one, max_new_tokens=20).tokens == first.tokens
    assert not made


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_texts_do_not_depend_on_what_went_before(model, trained_model, strategy):
    one = STRATEGIES[strategy](copy.deepcopy(trained_model(n_layers=2, max_seq_len=60)))
    for prompts, count in ((PROMPTS, 9), (PROMPTS[:1], 20), (PROMPTS[::-1], 30), (PROMPTS[1:], 3), (PROMPTS, 9)):
        new = copy.deepcopy(model)
        for sampling in (dict(), dict(temperature=0.9, seed=2)):
            expected = generate(new, prompts, one, max_new_tokens=count, **sampling)
            assert generate(model, prompts, one, max_new_tokens=count, **sampling).tokens == expected.tokens


def replace_a_module(model):
    model.blocks[1] = copy.deepcopy(model.blocks[0])


def drop_a_block(model):
    model.blocks[1].mlp.experts.down.data = torch.zeros_like(model.blocks[1].mlp.experts.down)


def load_other_weights(model):
    other = {name: weight + 0.1 * torch.randn_like(weight) for name, weight in model.state_dict().items()}
    model.load_state_dict(other, assign=True)


def change_weights_in_place(model):
    with torch.no_grad():
        model.blocks[0].attention.qkv.weight.mul_(-1)


def set_a_parameter(model):
    model.blocks[0].attention.output.weight = torch.nn.Parameter(
        torch.zeros_like(model.blocks[0].attention.output.weight)
    )


def go_to_float64(model):
    model.double()


def choose_one_expert(model):
    model.blocks[1].mlp.router.top_k = 1


def replace_a_buffer(model):
    model.blocks[1].mlp.router.balance_bias = torch.tensor([9.0, -9, 0, 0, 0])[: model.config.num_experts]


class Shy(type(torch.nn.Linear(1, 1))):
    """A projection that says nothing."""

    def forward(self, x):
        return 0 * super().forward(x)


def take_a_class_of_one_s_own(model):
    output = model.blocks[0].attention.output
    model.blocks[0].attention.output = Shy(output.in_features, output.out_features, bias=False)


@pytest.mark.parametrize(
    "change",
    [
        replace_a_module,
        drop_a_block,
        load_other_weights,
        change_weights_in_place,
        set_a_parameter,
        go_to_float64,
        choose_one_expert,
        replace_a_buffer,
        take_a_class_of_one_s_own,
    ],
    ids=lambda change: change.__name__,
)
def test_a_model_that_was_changed_is_decoded_as_it_is_now(model, change):
    before = generate(model, PROMPTS, max_new_tokens=20)
    torch.manual_seed(0)
    change(model)
    expected = generate(copy.deepcopy(model), PROMPTS, max_new_tokens=20)
    after = generate(model, PROMPTS, max_new_tokens=20)
    assert after.tokens == expected.tokens
    assert after.tokens != before.tokens or change is go_to_float64


def test_hooks_and_other_forwards_are_called_at_every_step(model):
    plain = generate(model, PROMPTS[:1], max_new_tokens=10)
    calls = []
    handle = model.blocks[0].register_forward_hook(lambda *_: calls.append("hook"))
    assert generate(model, PROMPTS[:1], max_new_tokens=10).tokens == plain.tokens
    assert len(calls) == 11  # the prompt, and ten tokens
    handle.remove()
    own = model.blocks[0].forward
    model.blocks[0].forward = lambda *arguments, **keywords: calls.append("forward") or own(*arguments, **keywords)
    assert generate(model, PROMPTS[:1], max_new_tokens=10).tokens == plain.tokens
    assert calls.count("forward") == 11


@needs_kernels
def test_what_is_kept_is_small_and_goes_with_the_model(model, monkeypatch):
    generate(model, PROMPTS, max_new_tokens=10)
    assert model in kept_caches._kept
    monkeypatch.setattr(kept_caches, "_LARGEST", 0.25)
    generate(model, PROMPTS, max_new_tokens=10)
    assert model in kept_caches._kept, "64 MiB are"
    monkeypatch.setattr(kept_caches, "_SMALL", 0)
    generate(model, PROMPTS, max_new_tokens=10)
    assert model not in kept_caches._kept
    monkeypatch.undo()
    own = copy.deepcopy(model)
    gone = weakref.ref(own)
    generate(own, PROMPTS[:1], max_new_tokens=10)
    del own
    gc.collect()
    assert gone() is None


def test_a_failed_text_leaves_nothing(model):
    def stop(row, token):
        raise KeyboardInterrupt

    generate(model, PROMPTS, max_new_tokens=10)
    with pytest.raises(KeyboardInterrupt):
        generate(model, PROMPTS, max_new_tokens=10, on_token=stop)
    assert model not in kept_caches._kept


def test_what_was_kept_in_inference_mode_serves_there_alone(model):
    generate(model, PROMPTS, max_new_tokens=4)
    with torch.no_grad():
        session = Session(model, PROMPTS, Sampling(), max_new_tokens=4)
        session.prefill()
        assert not session.cache.keys.is_inference()
