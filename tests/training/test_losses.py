"""What a step computes: the total against a naive sum, who learns from it, and what dropout leaves out."""

import pytest
import torch
import torch.nn.functional as F

from layerskip_moe.training import training_losses
from layerskip_moe.training.exit_loss import active_exits, exit_weights
from layerskip_moe.training.expert_dropout import expert_mask
from layerskip_moe.training.layer_dropout import (
    BLOCK_STREAM,
    EXPERT_SUBLAYER_STREAM,
    layer_dropout_rates,
    layer_keep,
)
from layerskip_moe.training.losses import step_losses, validation_losses

B, T, V, L, E, K = 6, 8, 16, 4, 4, 2
CURRICULA = ("rotational", "gradual", "all", "none")
# Half of the samples at every layer and step.
HALF = dict(layer_dropout_max=0.5, layer_dropout_depth="uniform", layer_dropout_time="uniform")


@pytest.fixture
def batch():
    """inputs, labels [B, T] and sample ids from the middle of a run."""
    tokens = torch.randint(V, (B, T + 1), generator=torch.Generator().manual_seed(5))
    return tokens[:, :-1], tokens[:, 1:], torch.arange(120, 120 + B)


def at(model, batch, config, step=3, max_steps=8):
    return training_losses(model, *batch, config, step=step, max_steps=max_steps)


def layer_by_layer(model, inputs):
    """Every layer's logits [L, B, T, V], all alive at once, and its router's logits and choices."""
    hidden = model.embed(inputs)
    positions = torch.arange(inputs.shape[1]).expand(inputs.shape)
    logits, routing = [], []
    for layer in range(L):
        out = model.run(hidden, [layer], positions=positions)
        hidden = out.hidden
        logits.append(model.unembed(hidden))
        routing += out.routing.values()
    return torch.stack(logits), routing


@pytest.mark.parametrize(
    ("kind", "curriculum"),
    [(kind, of) for kind in ("equal", "paper", "drafting") for of in CURRICULA if (kind, of) != ("drafting", "none")],
)
@pytest.mark.parametrize("distillation", [0.0, 0.3])
def test_the_total_is_the_naive_sum_of_its_weighted_parts(decoder, batch, recipe, kind, curriculum, distillation):
    model = decoder(dtype=torch.float64, moe_layers=(1, 3))
    config = recipe(
        exit_weights=kind, exit_curriculum=curriculum, exit_rotation=3, exit_loss_scale=0.4,
        exit_distillation=distillation, moe_loss_weight=0.7, router_z_loss_weight=0.2,
    )  # fmt: skip
    losses = at(model, batch, config)
    logits, routing = layer_by_layer(model, batch[0])
    labels = batch[1]
    weights = exit_weights(active_exits(3, 8, L, curriculum=curriculum, rotation=3, kind=kind), kind=kind, scale=0.4)
    expected = 0.0
    for layer in range(L):
        hard = F.cross_entropy(logits[layer].flatten(0, 1), labels.flatten())
        soft = F.cross_entropy(logits[layer].flatten(0, 1), logits[-1].softmax(-1).flatten(0, 1).detach())
        share = distillation if layer < L - 1 else 0.0
        expected += weights[layer] * ((1 - share) * hard + share * soft)
        if weights[layer] > 0:
            torch.testing.assert_close(losses.exits[layer + 1], hard)
            if share:
                torch.testing.assert_close(losses.distillation[layer + 1], soft)
    balance = sum(
        E * (F.one_hot(r.chosen, E).double().mean((0, 1)) * r.logits.double().softmax(-1).mean(0)).sum()
        for r in routing
    )
    router_z = sum(r.logits.double().exp().sum(-1).log().square().mean() for r in routing)
    assert len(routing) == 2
    torch.testing.assert_close(losses.balance.double(), balance / 2, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(losses.router_z.double(), router_z / 2, atol=1e-6, rtol=1e-6)
    expected = expected + 0.7 * balance / 2 + 0.2 * router_z / 2
    torch.testing.assert_close(losses.total.double(), expected, atol=1e-6, rtol=1e-6)
    assert set(losses.exits) == {layer + 1 for layer in range(L) if weights[layer] > 0}
    for r, layer in zip(routing, (1, 3), strict=True):
        assert losses.load[layer].tolist() == torch.bincount(r.chosen.flatten(), minlength=E).tolist()


@pytest.mark.parametrize("curriculum", CURRICULA)
@pytest.mark.parametrize("step", [0, 3, 7])
def test_the_last_layers_weights_learn(decoder, batch, recipe, curriculum, step):
    model = decoder()
    config = recipe(exit_curriculum=curriculum, moe_loss_weight=0.0, router_z_loss_weight=0.0)
    at(model, batch, config, step=step).total.backward()
    last = model.blocks[-1]
    for parameter in (
        last.attention.qkv.weight,
        last.attention.output.weight,
        last.attention_norm.weight,
        last.mlp_norm.weight,
        last.mlp.router.weight,
        last.mlp.experts.gate_up,
        last.mlp.experts.down,
    ):
        assert parameter.grad.norm() > 0


@pytest.mark.parametrize("layer", range(L))
def test_an_exits_loss_is_on_its_layers_output(decoder, batch, recipe, layer):
    model, config = decoder(), recipe(exit_curriculum="all")
    before = at(model, batch, config).exits
    with torch.no_grad():
        model.blocks[layer].mlp.experts.down.add_(0.5)
    after = at(model, batch, config).exits
    changed = [exit_layer for exit_layer in before if before[exit_layer] != after[exit_layer]]
    assert changed == list(range(layer + 1, L + 1))


@pytest.mark.parametrize("kind, reached", [("paper", {2, 3, 4}), ("equal", {1, 2, 3, 4})])
@pytest.mark.parametrize("curriculum", ["rotational", "gradual", "all"])
def test_every_exit_with_a_weight_has_its_turn(decoder, batch, recipe, kind, reached, curriculum):
    model = decoder()
    config = recipe(exit_weights=kind, exit_curriculum=curriculum, exit_rotation=3)
    supervised = [set(at(model, batch, config, step=step).exits) for step in range(8)]
    assert set.union(*supervised) == reached
    assert all(L in exits for exits in supervised)


def test_a_step_is_a_function_of_its_number_and_its_samples(decoder, batch, recipe):
    model, config = decoder(), recipe(**HALF, expert_dropout=0.3)
    torch.manual_seed(1)
    first = at(model, batch, config)
    torch.manual_seed(2)
    again = at(model, batch, config)
    assert first.total == again.total and first.exits == again.exits
    assert all(torch.equal(first.load[layer], again.load[layer]) for layer in first.load)
    others = (at(model, batch, config, step=4), at(model, (*batch[:2], batch[2] + 1), config))
    assert all(other.total != first.total for other in others)


def test_layer_dropout_draws_do_not_depend_on_the_batch(decoder, batch, recipe):
    model = decoder(dtype=torch.float64)
    config = recipe(**HALF, expert_dropout=0.3, moe_loss_weight=0.0, router_z_loss_weight=0.0)
    whole = at(model, batch, config)
    part = step_losses([at(model, [x[rows] for x in batch], config) for rows in (slice(0, 3), slice(3, 6))])
    torch.testing.assert_close(part.total, whole.total.detach())
    torch.testing.assert_close(part.exits, whole.exits)
    assert whole.load.keys() == part.load.keys()
    assert all(torch.equal(part.load[layer], whole.load[layer]) for layer in whole.load)


def test_a_steps_losses_are_means_over_its_batches_and_its_load_a_sum(decoder, batch, recipe):
    model, config = decoder(), recipe(exit_curriculum="all", exit_distillation=0.5)
    parts = [at(model, [x[rows] for x in batch], config) for rows in (slice(0, 3), slice(3, 6))]
    parts[1] = parts[1]._replace(load={0: torch.tensor([1, 0, 0, 5])})  # as if all samples skipped the others
    step = step_losses(parts)
    for name in ("total", "balance", "router_z"):
        values = [getattr(part, name).item() for part in parts]
        assert getattr(step, name).item() == pytest.approx(sum(values) / 2)
    for name in ("exits", "distillation"):
        for layer, value in getattr(step, name).items():
            assert value.item() == pytest.approx(sum(getattr(part, name)[layer].item() for part in parts) / 2)
    assert step.load[0].tolist() == (parts[0].load[0] + torch.tensor([1, 0, 0, 5])).tolist()
    assert step.load[3].tolist() == parts[0].load[3].tolist()
    assert not step.total.requires_grad


def test_the_balance_loss_moves_the_router_and_is_its_weight_when_balanced(decoder, batch, recipe):
    model = decoder()
    config = recipe(moe_loss_weight=0.25, router_z_loss_weight=0.0)
    plain = recipe(moe_loss_weight=0.0, router_z_loss_weight=0.0)
    (at(model, batch, config).total - at(model, batch, plain).total).backward()
    for block in model.blocks:
        assert block.mlp.router.weight.grad.norm() > 1e-6
    with torch.no_grad():  # even probabilities are balanced, whatever the choices
        for block in model.blocks:
            block.mlp.router.weight.zero_()
        balanced = at(model, batch, config)
        added = balanced.total - at(model, batch, plain).total
    assert balanced.balance.item() == pytest.approx(1.0)
    assert added.item() == pytest.approx(0.25, abs=1e-5)


def rows_seen(module):
    """How many samples each call of a module gets, from here on."""
    seen = []
    module.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    return seen


@pytest.mark.parametrize("part", ["block", "experts"])
def test_dropped_samples_do_not_reach_the_layer(decoder, batch, recipe, part):
    model = decoder()
    config = recipe(**HALF, layer_dropout_part=part, seed=9)
    rates = layer_dropout_rates(3, 8, L, p_max=0.5, depth="uniform", time="uniform")
    stream = BLOCK_STREAM if part == "block" else EXPERT_SUBLAYER_STREAM
    kept = layer_keep(rates, seed=9, step=3, sample_ids=batch[2], stream=stream).sum(1).tolist()
    assert any(0 < count < B for count in kept)
    attention = [rows_seen(block.attention) for block in model.blocks]
    experts = [rows_seen(block.mlp) for block in model.blocks]
    losses = at(model, batch, config)
    assert attention == ([[count] for count in kept] if part == "block" else [[B]] * L)
    assert experts == [[count] for count in kept]
    assert [int(losses.load[layer].sum()) for layer in range(L)] == [count * T * K for count in kept]


@pytest.mark.parametrize("part", ["block", "experts"])
def test_a_layer_without_samples_runs_on_none_and_its_gradient_is_0(decoder, batch, recipe, part):
    model = decoder()
    config = recipe(**{**HALF, "layer_dropout_max": 1.0}, layer_dropout_part=part)
    attention = [rows_seen(block.attention) for block in model.blocks]
    experts = [rows_seen(block.mlp) for block in model.blocks]
    losses = at(model, batch, config)
    losses.total.backward()
    assert attention == [[0 if part == "block" else B]] * L
    assert experts == [[0]] * L
    assert losses.balance == 0 and losses.router_z == 0
    assert [int(load.sum()) for load in losses.load.values()] == [0] * L
    assert all(
        not p.grad.any() for block in model.blocks for p in (block if part == "block" else block.mlp).parameters()
    )
    assert model.embedding.weight.grad.norm() > 0


def test_inactive_experts_get_no_tokens_and_no_gradient(decoder, batch, recipe):
    model = decoder(moe_layers=(0, 1, 3))
    config = recipe(expert_dropout=0.4, seed=2)
    losses = at(model, batch, config)
    losses.total.backward()
    active = expert_mask(0.4, E, K, seed=2, step=3, layers=range(L))
    assert torch.equal(losses.active_experts, active)
    idle_ones = 0
    for layer in (0, 1, 3):
        mlp = model.blocks[layer].mlp
        for expert in range(E):
            gradients = (mlp.experts.gate_up.grad, mlp.experts.down.grad, mlp.router.weight.grad)
            norms = [gradient[expert].norm() for gradient in gradients]
            if active[layer, expert]:
                assert norms[2] > 0
            else:
                idle_ones += 1
                assert losses.load[layer][expert] == 0 and max(norms) == 0
    assert idle_ones > 0 and losses.total.isfinite()


def test_validation_is_every_exits_cross_entropy_without_dropout(decoder, recipe):
    model = decoder(dtype=torch.float64, dropout=0.5)
    tokens = torch.randint(V, (8 * 7 + 3,), generator=torch.Generator().manual_seed(0))
    config = recipe(**HALF, expert_dropout=0.5, batch_size=4, validation_windows=6)  # batches of 4 and of 2
    losses = validation_losses(model.train(), tokens, config)
    assert model.training
    logits, _ = layer_by_layer(model.eval(), tokens[:48].view(6, 8))
    expected = [F.cross_entropy(exit_logits.flatten(0, 1), tokens[1:49]).item() for exit_logits in logits]
    assert losses == pytest.approx(expected, rel=1e-9)


def moved_probability(probability):
    """The mean total variation of neighbours, one pair after the other; probability [B, T, E]."""
    pairs = [(b, t) for b in range(len(probability)) for t in range(1, probability.shape[1])]
    probability = probability.detach()
    return sum(0.5 * float((probability[b, t] - probability[b, t - 1]).abs().sum()) for b, t in pairs) / len(pairs)


def test_router_coherence_is_the_mean_over_moe_layers_and_adds_to_the_total(decoder, batch, recipe):
    model = decoder(moe_layers=(1, 3))
    losses = at(model, batch, recipe(router_coherence_weight=0.4))
    _, routing = layer_by_layer(model, batch[0])
    by_layer = [moved_probability(routed.logits.softmax(-1).view(B, T, E)) for routed in routing]
    assert losses.router_coherence.item() == pytest.approx(sum(by_layer) / 2, rel=1e-5)
    without = at(model, batch, recipe())
    assert without.router_coherence is None
    assert (losses.total - without.total).item() == pytest.approx(0.4 * losses.router_coherence.item(), rel=1e-4)


@pytest.mark.parametrize("part", ["block", "experts"])
def test_router_coherence_leaves_out_samples_that_a_layer_did_not_see_and_padding(decoder, batch, recipe, part):
    model = decoder(moe_layers=(2,))
    config = recipe(**HALF, layer_dropout_part=part, router_coherence_weight=1.0, seed=9)
    rates = layer_dropout_rates(3, 8, L, p_max=0.5, depth="uniform", time="uniform")
    stream = BLOCK_STREAM if part == "block" else EXPERT_SUBLAYER_STREAM
    stay = layer_keep(rates, seed=9, step=3, sample_ids=batch[2], stream=stream)[2]
    assert 2 < stay.sum() < B
    first, second = stay.nonzero()[:2, 0].tolist()
    inputs, labels, ids = batch
    labels = labels.clone()
    labels[first, 3:] = -100  # padded from there on
    labels[second] = -100
    seen = []
    model.blocks[2].mlp.router.register_forward_hook(lambda module, given, routing: seen.append(routing.logits))
    losses = at(model, (inputs, labels, ids), config)
    probability = seen[0].detach().softmax(-1).view(int(stay.sum()), T, E)
    pairs = [(0, t) for t in range(1, 3)] + [(b, t) for b in range(2, len(probability)) for t in range(1, T)]
    moved = sum(0.5 * float((probability[b, t] - probability[b, t - 1]).abs().sum()) for b, t in pairs)
    assert len(pairs) == 2 + 7 * (int(stay.sum()) - 2)
    assert losses.router_coherence.item() == pytest.approx(moved / len(pairs), rel=1e-5)


def test_router_coherence_teaches_routers_to_stay(decoder, batch, recipe):
    model = decoder()
    config = recipe(router_coherence_weight=50.0, moe_loss_weight=0.0, router_z_loss_weight=0.0)
    routers = [block.mlp.router.weight for block in model.blocks]
    before = at(model, batch, config)
    optimizer = torch.optim.SGD(routers, lr=0.05)
    for _ in range(20):
        optimizer.zero_grad()
        at(model, batch, config).total.backward()
        optimizer.step()
    assert at(model, batch, config).router_coherence < 0.9 * before.router_coherence


def test_a_batchs_router_coherences_are_averaged(decoder, batch, recipe):
    one = at(decoder(), batch, recipe(router_coherence_weight=0.1))
    other = one._replace(router_coherence=one.router_coherence + 0.5)
    assert step_losses([one, other]).router_coherence.item() == pytest.approx(one.router_coherence.item() + 0.25)
    assert step_losses([one._replace(router_coherence=None)] * 2).router_coherence is None
