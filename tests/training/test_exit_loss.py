"""The early-exit loss against the naive one that keeps every logit, and against torchtune's."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from layerskip_moe.nn.config import ModelConfig
from layerskip_moe.nn.decoder import MoEDecoder
from layerskip_moe.training.exit_loss import _ChunkedExitLoss, active_exits, exit_loss, exit_weights

B, T, D, V, L = 2, 7, 6, 11, 4


class Head(nn.Module):
    """All that exit_loss needs of a model."""

    def __init__(self, dtype=torch.float64, vocab=V):
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.RMSNorm(D, eps=1e-6, dtype=dtype)
        self.head = nn.Linear(D, vocab, bias=False, dtype=dtype)
        self.layers = range(L)  # torchtune asks for their number

    @property
    def head_weight(self):
        return self.head.weight

    def unembed(self, hidden):
        return self.head(self.norm(hidden))


def batch(dtype=torch.float64, vocab=V, n_layers=L, ignored=True):
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randn(B, T, D, generator=generator, dtype=dtype) for _ in range(n_layers)]
    states = {layer: h.requires_grad_() for layer, h in enumerate(drawn)}
    labels = torch.randint(vocab, (B, T), generator=generator)
    if ignored:
        labels[0, :3] = -100
    return states, labels


def naive_loss(model, states, labels, weights, distillation=0.0):
    """The definition, written down with every logit in memory."""
    logits = {layer: model.unembed(h).flatten(0, 1) for layer, h in states.items()}
    last = max(states)
    teacher = logits[last].detach().softmax(-1)
    counted = labels.flatten() != -100
    total = 0.0
    for layer, z in logits.items():
        loss = F.cross_entropy(z, labels.flatten())
        if layer != last:
            soft = F.cross_entropy(z[counted], teacher[counted])
            loss = (1 - distillation) * loss + distillation * soft
        total = total + weights[layer] * loss
    return total


def gradients(loss, model, states):
    inputs = [*states.values(), *model.parameters()]
    return torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("distillation", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("chunk_rows", [1, 5, 14, 1000])
def test_loss_and_gradients_equal_the_naive_ones(distillation, chunk_rows):
    model, (states, labels) = Head(), batch()
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4])
    ours = exit_loss(model, states, labels, weights, distillation=distillation, chunk_rows=chunk_rows)
    theirs = naive_loss(model, states, labels, weights, distillation)
    torch.testing.assert_close(ours.total, theirs, check_dtype=False)
    # A factor in front, as loss scaling or accumulation puts there.
    for a, b in zip(gradients(3.0 * ours.total, model, states), gradients(3.0 * theirs, model, states), strict=True):
        torch.testing.assert_close(a, b)


def test_the_raw_parts_are_unweighted_and_detached():
    model, (states, labels) = Head(), batch()
    losses = exit_loss(model, states, labels, torch.tensor([0.1, 0.0, 0.3, 0.6]), distillation=0.25)
    assert list(losses.cross_entropy) == [0, 2, 3] and list(losses.distillation) == [0, 2]
    for layer, value in losses.cross_entropy.items():
        expected = F.cross_entropy(model.unembed(states[layer]).flatten(0, 1), labels.flatten())
        torch.testing.assert_close(value, expected.detach())
        assert not value.requires_grad
    assert losses.total.item() == pytest.approx(
        0.1 * (0.75 * losses.cross_entropy[0] + 0.25 * losses.distillation[0]).item()
        + 0.3 * (0.75 * losses.cross_entropy[2] + 0.25 * losses.distillation[2]).item()
        + 0.6 * losses.cross_entropy[3].item()
    )
    assert exit_loss(model, states, labels, torch.tensor([0.1, 0.0, 0.3, 0.6])).distillation == {}


def test_the_same_without_gradients():
    model, (states, labels) = Head(), batch()
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4])
    trained = exit_loss(model, states, labels, weights, distillation=0.5)
    with torch.no_grad():
        evaluated = exit_loss(model, states, labels, weights, distillation=0.5)
    assert not evaluated.total.requires_grad
    assert evaluated.total.item() == trained.total.item()
    assert evaluated.distillation == trained.distillation


def test_gradcheck():
    model, (states, labels) = Head(), batch(n_layers=2)

    def loss(head, *hidden):
        return _ChunkedExitLoss.apply(head, labels.flatten(), [0.3, 0.7], 0.0, 4, True, *hidden)[0]

    hidden = [h.detach().flatten(0, 1).requires_grad_() for h in states.values()]
    assert torch.autograd.gradcheck(loss, (model.head_weight, *hidden))


def test_gradcheck_of_distillation():
    # Only the early exit is varied: to the last layer and the head the teacher is a constant by definition,
    # which finite differences cannot know.
    model, (states, labels) = Head(), batch(n_layers=2)
    early, last = (h.detach().flatten(0, 1) for h in states.values())

    def loss(hidden):
        head = model.head_weight.detach()
        return _ChunkedExitLoss.apply(head, labels.flatten(), [0.3, 0.7], 0.6, 4, True, hidden, last)[0]

    assert torch.autograd.gradcheck(loss, early.requires_grad_())


def test_distillation_sends_no_gradient_into_the_teacher():
    model, (states, labels) = Head(), batch()
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4])
    grads = [
        torch.autograd.grad(exit_loss(model, states, labels, weights, distillation=a).total, states[L - 1])[0]
        for a in (0.0, 1.0)
    ]
    torch.testing.assert_close(*grads, rtol=0, atol=0)


def test_agrees_with_torchtunes_early_exit_loss():
    from torchtune.modules.early_exit_loss import early_exit_loss

    model, (states, labels) = Head(torch.float32), batch(torch.float32)
    weights = exit_weights(torch.ones(L, dtype=torch.bool), kind="equal", scale=1.0)
    ours = exit_loss(model, states, labels, weights).total
    theirs = early_exit_loss(model, states, labels, nn.CrossEntropyLoss(ignore_index=-100), e_scale=0.5)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("curriculum", ["rotational", "gradual", "all", "none"])
@pytest.mark.parametrize("kind", ["paper", "equal"])
def test_every_exit_with_a_weight_is_supervised_when_its_turn_comes(curriculum, kind):
    model, (states, labels) = Head(), batch()
    everyone = exit_weights(torch.ones(L, dtype=torch.bool), kind=kind)
    supervised = set()
    for step in range(12):
        active = active_exits(step, 12, L, curriculum=curriculum, rotation=3)
        weights = exit_weights(active, kind=kind)
        collected = {layer: states[layer] for layer in range(L) if weights[layer] > 0}
        total = exit_loss(model, collected, labels, weights).total
        grads = torch.autograd.grad(total, list(states.values()), allow_unused=True)
        reached = {layer for layer, g in enumerate(grads) if g is not None and g.abs().sum() > 0}
        assert reached == {layer for layer in range(L) if active[layer] and everyone[layer] > 0}
        supervised |= reached
    wanted = {L - 1} if curriculum == "none" else {layer for layer in range(L) if everyone[layer] > 0}
    assert supervised == wanted


@pytest.mark.parametrize("tied", [False, True])
def test_on_the_decoder_the_last_layer_learns_and_gradients_equal_the_naive_ones(tied):
    config = ModelConfig(vocab_size=17, n_layers=3, d_model=8, n_heads=2, d_ff=8, num_experts=4, tie_embeddings=tied)
    model = MoEDecoder(config, seed=0)
    tokens = torch.randint(17, (2, 6), generator=torch.Generator().manual_seed(0))
    labels = tokens.roll(-1, 1)
    weights = exit_weights(torch.ones(3, dtype=torch.bool), kind="equal")
    grads = []
    for loss in (lambda *a: exit_loss(*a, chunk_rows=5).total, naive_loss):
        positions = torch.arange(6).expand(2, 6)
        out = model.run(model.embed(tokens), range(3), positions=positions, collect=range(3))
        model.zero_grad()
        loss(model, out.collected, labels, weights).backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-4, atol=1e-7)
    assert all(grads[0][f"blocks.{layer}.attention_norm.weight"].abs().sum() > 0 for layer in range(3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_stays_close_to_float32(dtype):
    model, (states, labels) = Head(torch.float32), batch(torch.float32)
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4])
    exact = exit_loss(model, states, labels, weights, distillation=0.5).total
    with torch.autocast("cpu", dtype):
        mixed = exit_loss(model, states, labels, weights, distillation=0.5).total
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, exact, rtol=0.01, atol=0)
    pairs = zip(gradients(mixed, model, states), gradients(exact, model, states), strict=True)
    for a, b in pairs:
        assert a.dtype == torch.float32
        assert ((a - b).norm() / b.norm()).item() < 0.02


def test_float16_gradients_survive_with_a_scaled_loss():
    # An exit weight of 1e-6 puts every gradient below float16's smallest number, 6e-8, unless it is scaled
    # before it is rounded: what a GradScaler promises, and it only scales what comes after the loss.
    model, (states, labels) = Head(torch.float32), batch(torch.float32)
    weights = torch.tensor([1e-6, 0.0, 0.0, 1.0])
    half = {layer: h.detach().half().requires_grad_() for layer, h in states.items()}
    exact = torch.autograd.grad(exit_loss(model, states, labels, weights).total * 2**16, states[0])[0]
    model.norm.half()
    with torch.autocast("cpu", torch.float16):
        total = exit_loss(model, half, labels, weights).total
    scaled = torch.autograd.grad(total * 2**16, half[0])[0].float()
    assert ((scaled - exact).norm() / exact.norm()).item() < 0.02


class PeakLogits(TorchDispatchMode):
    """Counts the elements of live tensors [rows, vocabulary] and remembers the peak. The head is not one."""

    def __init__(self, vocab):
        super().__init__()
        self.vocab, self.sizes, self.peak = vocab, {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.shape[1:] == (self.vocab,):
                if tensor.shape[0] == D:  # the head, transposed
                    continue
                key = tensor.untyped_storage()._cdata  # views and in-place results share it
                if key not in self.sizes:
                    self.sizes[key] = tensor.numel()
                    weakref.finalize(tensor, self.sizes.pop, key, None)
                self.peak = max(self.peak, sum(self.sizes.values()))
        return out


def peak_logits(loss, n_exits, distillation):
    model, (states, labels) = Head(vocab=101), batch(vocab=101, n_layers=n_exits)
    weights = torch.full((n_exits,), 1 / n_exits)
    with PeakLogits(101) as mode:
        loss(model, states, labels, weights, distillation).backward()
    return mode.peak


@pytest.mark.parametrize("distillation", [0.0, 0.5])
def test_logit_memory_does_not_grow_with_the_exits(distillation):
    def chunked(model, states, labels, weights, distillation):
        return exit_loss(model, states, labels, weights, distillation=distillation, chunk_rows=4).total

    two, eight = (peak_logits(chunked, n, distillation) for n in (2, 8))
    assert two == eight
    assert 4 * 101 <= eight <= 4 * 4 * 101  # a few chunks of 4 of the 14 rows
    naive = [peak_logits(naive_loss, n, distillation) for n in (2, 8)]
    assert naive[1] > 3 * naive[0]  # the meter sees what it should


def test_a_batch_without_labels_costs_nothing():
    model, (states, labels) = Head(), batch()
    total = exit_loss(model, states, torch.full_like(labels, -100), torch.full((L,), 0.25)).total
    assert total.item() == 0.0
    assert all((g == 0).all() for g in gradients(total, model, states))


def test_ignored_positions_may_hold_anything():
    model, (states, labels) = Head(), batch(ignored=False)
    labels[1, 2] = -100
    weights = torch.full((L,), 0.25)
    clean = exit_loss(model, states, labels, weights).total
    spoiled = {layer: h.detach().clone() for layer, h in states.items()}
    for h in spoiled.values():
        h[1, 2] = torch.nan
    assert exit_loss(model, spoiled, labels, weights).total.item() == pytest.approx(clean.item())


def test_bad_arguments_are_refused():
    model, (states, labels) = Head(), batch()
    weights = torch.full((L,), 0.25)
    for collected, target, w, options in [
        ({0: states[0], 3: states[3]}, labels, weights, {}),
        (states, labels, torch.tensor([0.5, 0.5, 0.0, 0.0]), {}),
        (states, labels[:, :-1], weights, {}),
        (states, labels, weights, {"distillation": 1.5}),
        (states, labels, weights, {"chunk_rows": 0}),
    ]:
        with pytest.raises(ValueError):
            exit_loss(model, collected, target, w, **options)
    labels[1, 1] = -1  # neither a token nor the mark of an ignored position
    with pytest.raises(RuntimeError):
        exit_loss(model, states, labels, weights)


def test_distillation_is_summed_in_float32_under_autocast():
    """A mean over thousands of products, each rounded to bfloat16, would be off in the third digit."""
    model, (states, labels) = Head(torch.float32), batch(torch.float32)
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4])
    with torch.autocast("cpu", torch.bfloat16):
        mixed = exit_loss(model, states, labels, weights, distillation=1.0)
        logits = {layer: model.unembed(state).float() for layer, state in states.items()}
    teacher = logits[3].softmax(-1)
    for layer, loss in mixed.distillation.items():
        per_token = -(teacher * logits[layer].log_softmax(-1)).sum(-1)
        expected = per_token[labels != -100].mean()
        torch.testing.assert_close(loss, expected, rtol=1e-3, atol=0)
