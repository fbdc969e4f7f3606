"""Probes against the condition of their optimum, on states that are computed one text at a time."""

import numpy as np
import pytest
import torch

from layerskip_moe.analysis import evaluate_early_exit
from layerskip_moe.analysis.exit_states import exit_opinions
from layerskip_moe.analysis.train_classifier import train_classifier
from layerskip_moe.generation import EarlyExit, generate

TEXTS = [[3, 5, 1, 7, 2, 9, 16, 0], [8, 8, 1], [4, 11, 2, 2, 13, 6], [1, 2]] + [
    [i, (3 * i) % 17, 5, i] for i in range(17)
]


def states_of(model, text):
    """[L + 1][T, D] of one text."""
    positions = torch.arange(len(text))[None]
    states = [model.embed(torch.tensor([text]))]
    for layer in range(model.config.n_layers):
        states.append(model.run(states[-1], [layer], positions=positions).hidden)
    return [state[0] for state in states]


@torch.no_grad()
def test_probes_are_the_optimum_of_their_loss(decoder):
    """The gradient of the balanced cross entropy and the penalty is nought, layer by layer, in numpy."""
    model = decoder(n_layers=4).eval()
    classifier = train_classifier(model, TEXTS, batch_size=3, progress=False)
    by_text = [states_of(model, text[:-1]) for text in TEXTS]
    states = [torch.cat([text[layer] for text in by_text]) for layer in range(5)]
    last = model.unembed(states[4]).argmax(-1)
    for layer in range(1, 4):
        y = (model.unembed(states[layer]).argmax(-1) == last).numpy()
        x = states[layer].numpy()
        x = x / np.sqrt((x**2).mean(-1, keepdims=True))
        w, b = classifier.weight[layer - 1].double().numpy(), float(classifier.bias[layer - 1])
        assert 0 < y.sum() < len(y)
        share = np.where(y, 0.5 / y.sum(), 0.5 / (~y).sum())
        residual = share * (1 / (1 + np.exp(-(x @ w + b))) - y)
        np.testing.assert_allclose(residual @ x + 1e-3 * w, 0, atol=1e-3)
        assert residual.sum() + 1e-3 * b == pytest.approx(0, abs=1e-3)
        sure = x @ w + b
        assert sure[y].mean() > sure[~y].mean()


def test_it_depends_on_the_texts_alone(decoder):
    model = decoder().train()
    one, other = (train_classifier(model, TEXTS, batch_size=size, progress=False) for size in (2, 50))
    torch.testing.assert_close(one.weight, other.weight, rtol=1e-3, atol=1e-3)
    assert model.training and not one.weight.requires_grad
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_a_layer_that_always_agrees_has_a_finite_probe(decoder):
    model = decoder(n_layers=2)
    with torch.no_grad():  # the last layer writes nothing
        model.blocks[1].attention.output.weight.zero_()
        for name, parameter in model.blocks[1].named_parameters():
            if name.endswith("down"):
                parameter.zero_()
    classifier = train_classifier(model, TEXTS, progress=False)
    assert bool(classifier.weight.isfinite().all()) and float(classifier.bias[0]) > 0


def test_they_serve_early_exit_and_its_evaluation(decoder):
    """What exact decoding decides by probes is what the evaluation of the same text finds."""
    model = decoder(n_layers=4)
    classifier = train_classifier(model, TEXTS, progress=False)
    out = generate(model, [[3]], EarlyExit(0.6, classifier, cache="exact"), max_new_tokens=20)
    text = torch.tensor([3, *out.tokens[0]])
    found = evaluate_early_exit(
        model, text, thresholds=[0.6], confidence=classifier, seq_len=20, batch_size=1, progress=False
    )
    assert found.exits == [[out.layers_run[0].count(n) for n in range(1, 5)]]
    with pytest.raises(ValueError, match="trained for 4 layers"):
        evaluate_early_exit(
            decoder(n_layers=3), text, thresholds=[0.6], confidence=classifier, seq_len=20, batch_size=1, progress=False
        )


@pytest.mark.parametrize("first", [1, 2])
@pytest.mark.parametrize("kind", ["softmax_diff", "state"])
@torch.no_grad()
def test_exit_opinions_are_those_of_each_text_alone(decoder, kind, first):
    """Ragged texts, -1 for the end of one."""
    model = decoder(n_layers=4).eval()
    prompts, texts = [[3, 1], [5], [2, 2, 2]], [[4, 1, 9], [7, -1], [0]]
    first = max(first, 2) if kind == "state" else first
    found = exit_opinions(model, prompts, texts, confidence=kind, first=first, batch_size=2, progress=False)
    assert found.labels.tolist() == [4, 1, 9, 7, -1, 0]
    place = 0
    for prompt, text in zip(prompts, texts, strict=True):
        states = [state[len(prompt) - 1 :] for state in states_of(model, prompt + text[:-1])]
        for layer in range(first, 5):
            logits = model.unembed(states[layer])
            rows = slice(place, place + len(text))
            assert found.choice[layer - first, rows].tolist() == logits.argmax(-1).tolist()
            if layer < 4:
                best = logits.softmax(-1).topk(2).values
                sure = best[:, 0] - best[:, 1]
                if kind == "state":
                    sure = torch.cosine_similarity(states[layer], states[layer - 1], dim=-1)
                torch.testing.assert_close(found.confidence[layer - first, rows].double(), sure, atol=1e-5, rtol=1e-5)
        place += len(text)


@pytest.mark.parametrize("texts", [[], [[1, 2], [3]]])
def test_texts_without_a_second_token_are_refused(decoder, texts):
    with pytest.raises(ValueError, match="every text must have 2 tokens or more"):
        train_classifier(decoder(), texts, progress=False)


def test_a_model_of_one_layer_is_refused(decoder):
    with pytest.raises(ValueError, match="there is nothing to train"):
        train_classifier(decoder(n_layers=1), TEXTS, progress=False)
