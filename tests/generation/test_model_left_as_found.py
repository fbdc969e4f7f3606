"""Decoding borrows a model: mode, weights and gradients are afterwards what they were, whatever happened."""

import pytest
import torch

from layerskip_moe.generation import (
    Autoregressive,
    EarlyExit,
    Generation,
    LayerSkipping,
    SelfSpeculative,
    Speculative,
    generate,
)

STRATEGIES = [
    Autoregressive(),
    SelfSpeculative(1, 3),
    SelfSpeculative(2, 2, coupling="rejection"),
    EarlyExit(0.3, cache="exact"),
    EarlyExit(0.3),
    LayerSkipping((1,)),
    LayerSkipping(random=1),
]


class Interrupted:
    """A strategy that gives up in its second round."""

    def __init__(self):
        self.steps = 0

    def check(self, config):
        pass

    def start(self, session):
        session.prefill()

    def step(self, session):
        assert not session.model.training
        self.steps += 1
        if self.steps == 2:
            raise RuntimeError("interrupted")
        Autoregressive().step(session)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_mode_weights_and_gradients(tiny_model, training, strategy):
    model = tiny_model(dropout=0.5).train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    out = generate(model, [[1, 2], [3]], strategy, max_new_tokens=5, temperature=0.7)
    assert all(module.training == training for module in model.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert isinstance(out, Generation) and all(type(token) is int for row in out.tokens for token in row)


@pytest.mark.parametrize("training", [True, False])
def test_mode_when_a_strategy_raises(tiny_model, training):
    model = tiny_model().train(training)
    with pytest.raises(RuntimeError, match="interrupted"):
        generate(model, [[1, 2], [3]], Interrupted(), max_new_tokens=5)
    assert all(module.training == training for module in model.modules())
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def test_mode_when_the_prompts_are_refused(tiny_model):
    model = tiny_model().train()
    with pytest.raises(ValueError, match="empty"):
        generate(model, [[]], max_new_tokens=5)
    assert model.training


def test_dropout_does_not_reach_the_text(tiny_model):
    """A model in training mode decodes as in evaluation mode, and draws nothing from the global generator."""
    model = tiny_model(dropout=0.5)
    state = torch.get_rng_state()
    texts = [
        generate(model.train(mode), [[1, 2], [3]], max_new_tokens=8, temperature=1.0).tokens for mode in (True, False)
    ]
    assert texts[0] == texts[1]
    assert torch.equal(torch.get_rng_state(), state)


def test_no_graph_is_built(tiny_model):
    """No state that the model computes asks for a gradient, so a long text holds no graph."""
    model, graphs = tiny_model(), []
    model.norm.register_forward_hook(lambda _, inputs, output: graphs.append(output.requires_grad))
    generate(model, [[1, 2]], SelfSpeculative(1, 2), max_new_tokens=6, compile=False)
    assert len(graphs) > 4 and not any(graphs)


def test_training_goes_on_afterwards(tiny_model):
    model = tiny_model().train()
    generate(model, [[1, 2, 3]], SelfSpeculative(1, 2), max_new_tokens=6)
    model(torch.tensor([[1, 2, 3]])).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert model.embedding.weight.grad.any() and model.blocks[2].attention.qkv.weight.grad.any()


def test_the_prompts_are_not_written_into(tiny_model):
    prompts = [[1, 2], [3]]
    first = generate(tiny_model(), prompts, max_new_tokens=4)
    assert prompts == [[1, 2], [3]] and first.tokens[0] is not prompts[0]


def test_a_module_frozen_in_eval_mode_stays_so(tiny_model):
    model = tiny_model().train()
    model.blocks[1].eval()
    modes = [module.training for module in model.modules()]
    generate(model, [[1, 2]], max_new_tokens=2)
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("error", [None, "of the model", "of the draft model"])
def test_a_draft_model_is_left_as_found_too(tiny_model, monkeypatch, training, error):
    """Each in its own mode, whichever raises; in between both are in evaluation mode."""
    model, draft = tiny_model(dropout=0.5).train(not training), tiny_model(n_layers=2, dropout=0.5).train(training)
    draft.blocks[0].train(not training)
    modes = [[module.training for module in each.modules()] for each in (model, draft)]
    weights = {name: value.clone() for name, value in draft.state_dict().items()}
    expected = generate(model, [[1, 2], [3]], max_new_tokens=6).tokens
    if error is None:
        assert generate(model, [[1, 2], [3]], Speculative(draft, 2), max_new_tokens=6).tokens == expected
    else:
        culprit, runs = (model if error == "of the model" else draft), []
        run = culprit.run

        def fail_at_the_third(*arguments, **others):
            assert not any(module.training for each in (model, draft) for module in each.modules())
            runs.append(1)
            if len(runs) == 3:
                raise RuntimeError("interrupted")
            return run(*arguments, **others)

        monkeypatch.setattr(culprit, "run", fail_at_the_third)
        with pytest.raises(RuntimeError, match="interrupted"):
            generate(model, [[1, 2], [3]], Speculative(draft, 2), max_new_tokens=6, compile=False)
        monkeypatch.undo()
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    assert [[module.training for module in each.modules()] for each in (model, draft)] == modes
    assert all(torch.equal(value, weights[name]) for name, value in draft.state_dict().items())
    assert generate(model, [[1, 2], [3]], Speculative(draft, 2), max_new_tokens=6).tokens == expected


def test_the_model_as_its_own_draft_keeps_its_mode(tiny_model):
    model = tiny_model().train()
    generate(model, [[1, 2]], Speculative(model, 2), max_new_tokens=4)
    assert all(module.training for module in model.modules())
