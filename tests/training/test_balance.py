"""Balance losses against hand-made routings, metrics within their ranges."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from layerskip_moe.training.balance import (
    balance_metrics,
    bias_update,
    load_balance_loss,
    router_coherence_loss,
    router_z_loss,
)


def routed(logits, top_k):
    return logits.topk(top_k, dim=-1).indices


def test_balance_loss_equals_its_weight_when_balanced():
    # Each expert is the favourite of one token and the runner-up of another.
    logits = torch.eye(4).add(0.5 * torch.eye(4).roll(1, 0)).mul(3.0).requires_grad_()
    weight = 0.01
    loss = weight * load_balance_loss(logits, routed(logits, 2))
    assert loss.item() == pytest.approx(weight)


def test_balance_loss_by_hand():
    probability = torch.tensor([[0.5, 0.3, 0.2], [0.6, 0.1, 0.3]])
    chosen = torch.tensor([[0], [0]])  # f = 1, 0, 0; mean P_0 = 0.55
    assert load_balance_loss(probability.log(), chosen).item() == pytest.approx(3 * 0.55)


def test_balance_loss_of_a_collapsed_router_is_experts_over_chosen():
    logits = torch.full((16, 8), -50.0)
    logits[:, :2] = 50.0
    assert load_balance_loss(logits, routed(logits, 2)).item() == pytest.approx(8 / 2)


def test_balance_loss_gradient_moves_probability_off_the_busy_expert():
    torch.manual_seed(0)
    logits = torch.randn(64, 4, dtype=torch.float64)
    logits[:, 0] += 2
    logits.requires_grad_()
    chosen = routed(logits, 2)
    load_balance_loss(logits, chosen).backward()
    assert logits.grad[:, 0].sum() > 0  # descent lowers the busy expert's logits
    assert torch.autograd.gradcheck(lambda z: load_balance_loss(z, chosen), logits)


def test_layers_that_are_imbalanced_in_opposite_ways_do_not_cancel():
    one = torch.full((8, 2), -20.0)
    one[:, 0] = 20.0
    other = one.flip(1)
    per_layer = [load_balance_loss(z, routed(z, 1)).item() for z in (one, other)]
    assert per_layer == pytest.approx([2.0, 2.0])  # pooled, they would look perfectly balanced: 1


@given(n=st.integers(1, 30), experts=st.integers(2, 8), data=st.data())
def test_losses_stay_finite_with_dropped_experts(n, experts, data):
    top_k = data.draw(st.integers(1, experts - 1))
    dropped = data.draw(st.sets(st.integers(0, experts - 1), max_size=experts - top_k))
    logits = torch.randn(n, experts, generator=torch.Generator().manual_seed(n)).requires_grad_()
    mask = torch.tensor([e in dropped for e in range(experts)])
    masked = logits.masked_fill(mask, -torch.inf)
    loss = load_balance_loss(masked, routed(masked, top_k)) + router_z_loss(masked)
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all()
    kept = logits.detach()[:, ~mask]  # the same as a layer that has only the active experts
    alone = load_balance_loss(kept, routed(kept, top_k)) + router_z_loss(kept)
    assert loss.item() == pytest.approx(alone.item(), rel=1e-5)


def test_z_loss_by_hand():
    logits = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0]])
    assert router_z_loss(logits).item() == pytest.approx((math.log(2) ** 2 + math.log(4) ** 2) / 2)


def test_a_layer_without_tokens_costs_nothing():
    logits = torch.zeros(0, 4, requires_grad=True)
    loss = load_balance_loss(logits, torch.zeros(0, 2, dtype=torch.int64)) + router_z_loss(logits)
    loss.backward()
    assert loss.item() == 0.0


def test_bias_update_by_hand():
    assert bias_update(torch.tensor([10, 4, 6, 4])).tolist() == [-1, 1, 0, 1]
    # Among the active experts (10, 4, 7) the mean is 7; the inactive one is left alone.
    active = torch.tensor([True, True, False, True])
    assert bias_update(torch.tensor([10, 4, 0, 7]), active).tolist() == [-1, 1, 0, 0]
    assert bias_update(torch.full((7,), 3)).tolist() == [0] * 7


def test_bias_updates_balance_a_skewed_router():
    logits = torch.randn(2000, 8, generator=torch.Generator().manual_seed(0)) + torch.linspace(-1, 1, 8)
    scores, bias = logits.softmax(-1), torch.zeros(8)

    def load():
        return torch.bincount(routed(scores + bias, 2).flatten(), minlength=8)

    before = balance_metrics(load())["max_violation"]
    for _ in range(300):
        bias += 1e-3 * bias_update(load())
    assert balance_metrics(load())["max_violation"] < 0.1 < 0.5 < before


def test_metrics_by_hand():
    metrics = balance_metrics(torch.tensor([3, 1, 0, 0]))
    assert metrics == pytest.approx(
        {
            "max_violation": 2.0,
            "normalized_entropy": -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(4),
            "coefficient_of_variation": math.sqrt(1.5),
            "dead_experts": 0.5,
        }
    )


def test_metrics_without_choices_are_nan():
    assert all(math.isnan(value) for value in balance_metrics(torch.zeros(4, dtype=torch.int64)).values())


@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=64).filter(any))
def test_metrics_keep_their_ranges(load):
    metrics, n = balance_metrics(torch.tensor(load)), len(load)
    assert -1e-12 <= metrics["max_violation"] <= (n - 1) * (1 + 1e-12)
    assert 0 <= metrics["normalized_entropy"] <= 1
    assert 0 <= metrics["coefficient_of_variation"] <= math.sqrt(n - 1) * (1 + 1e-12)
    assert metrics["dead_experts"] == load.count(0) / n


@given(st.integers(1, 10**9), st.integers(1, 64))
def test_an_even_load_is_perfect(each, n):
    expected = {
        "max_violation": 0.0,
        "normalized_entropy": 1.0,
        "coefficient_of_variation": 0.0,
        "dead_experts": 0.0,
    }
    assert balance_metrics(torch.full((n,), each)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("load", [[], [1, -1]])
def test_impossible_loads_are_refused(load):
    with pytest.raises(ValueError, match="one count"):
        balance_metrics(torch.tensor(load))


def everywhere(*shape):
    return torch.ones(shape, dtype=torch.bool)


def test_coherence_by_hand():
    # One sample: 0.5 (0.2 + 0.1 + 0.1) = 0.2, then 0.5 (0.6 + 0 + 0.6) = 0.6; another that stays: 0, 0.
    first = torch.tensor([[0.5, 0.3, 0.2], [0.7, 0.2, 0.1], [0.1, 0.2, 0.7]])
    second = torch.tensor([[0.1, 0.1, 0.8]] * 3)
    logits = torch.cat([first, second]).log()
    assert router_coherence_loss(logits, everywhere(2, 3)).item() == pytest.approx(0.8 / 4)
    padded = torch.tensor([[True, True, False], [False, True, True]])
    assert router_coherence_loss(logits, padded).item() == pytest.approx(0.2 / 2)


def test_coherence_is_0_where_nothing_moves_and_1_where_everything_does():
    still = torch.tensor([[3.0, 1.0, -2.0]]).repeat(6, 1) + torch.arange(6.0)[:, None]  # shifts change no probability
    assert router_coherence_loss(still, everywhere(2, 3)).item() == pytest.approx(0, abs=1e-6)
    jumping = 100 * torch.eye(3).repeat(2, 1)
    assert router_coherence_loss(jumping, everywhere(1, 6)).item() == pytest.approx(1)
    # The same rows as samples of one position: nobody has a neighbour.
    assert router_coherence_loss(jumping, everywhere(6, 1)).item() == 0


def test_coherence_without_pairs_is_0_and_has_gradients():
    for n, counted in [(0, everywhere(0, 4)), (4, ~everywhere(1, 4)), (4, everywhere(4, 1))]:
        logits = torch.randn(n, 3, generator=torch.Generator().manual_seed(1)).requires_grad_()
        loss = router_coherence_loss(logits, counted)
        loss.backward()
        assert loss == 0 and logits.grad.equal(torch.zeros(n, 3))


def test_coherence_gradient():
    logits = torch.randn(10, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
    counted = torch.tensor([[True] * 5, [True, True, False, True, True]])
    assert torch.autograd.gradcheck(lambda z: router_coherence_loss(z, counted), logits)
    dropped = logits.detach().clone().requires_grad_()
    router_coherence_loss(
        dropped.masked_fill(torch.tensor([False, True, False, False]), -torch.inf), counted
    ).backward()
    assert dropped.grad.isfinite().all() and dropped.grad[:, 1].eq(0).all() and dropped.grad.abs().sum() > 0
