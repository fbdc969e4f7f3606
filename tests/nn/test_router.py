"""The router: softmax over the active experts in float32, the K best chosen, their weights as configured."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layerskip_moe.nn import ModelConfig
from layerskip_moe.nn.router import Router


def make_router(experts=6, width=8, seed=0, **switches):
    router = Router(ModelConfig(vocab_size=2, d_model=width, n_heads=1, num_experts=experts, **switches))
    torch.nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(seed))
    return router


def inputs(tokens=40, width=8, seed=1):
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("top_k", [1, 3, 6])
def test_top_k_of_the_softmax(normalize, top_k):
    router, x = make_router(top_k=top_k, normalize_top_k=normalize), inputs()
    routing = router(x)
    probabilities = (x @ router.weight.T).softmax(-1)
    for token in range(len(x)):
        order = sorted(range(6), key=lambda e: -probabilities[token, e].item())[:top_k]
        weights = probabilities[token, order]
        if normalize:
            weights = weights / weights.sum()
        assert routing.chosen[token].tolist() == order
        torch.testing.assert_close(routing.weights[token], weights)
    torch.testing.assert_close(routing.logits, x @ router.weight.T)
    assert routing.load.tolist() == [int((routing.chosen == e).sum()) for e in range(6)]
    assert int(routing.load.sum()) == 40 * top_k


def test_top_k_can_be_lowered_for_a_call():
    router, x = make_router(top_k=3), inputs()
    one, three = router(x, top_k=1), router(x)
    assert torch.equal(one.chosen, three.chosen[:, :1])
    assert torch.equal(one.weights, torch.ones(40, 1))
    assert router(x).chosen.shape == (40, 3)  # the call before left nothing behind


@given(
    mask=st.lists(st.booleans(), min_size=6, max_size=6).filter(lambda mask: sum(mask) >= 2),
    balancing=st.booleans(),
    normalize=st.booleans(),
    seed=st.integers(0, 20),
)
@settings(max_examples=40, deadline=None)
@torch.no_grad()
def test_masked_experts_are_never_chosen_and_the_gate_redistributes(mask, balancing, normalize, seed):
    """With experts masked the router is the one that has the active experts only."""
    router = make_router(seed=seed, top_k=2, bias_balancing=balancing, normalize_top_k=normalize)
    active, x = torch.tensor(mask), inputs(seed=seed + 1)
    if balancing:  # a bias far above any probability must not bring an inactive expert back
        router.balance_bias.copy_(torch.where(active, 0.0, 100.0))
    routing = router(x, expert_mask=active)
    smaller = make_router(experts=sum(mask), top_k=2, normalize_top_k=normalize)
    smaller.weight.data = router.weight[active]
    expected = smaller(x)
    indices = active.nonzero()[:, 0]
    assert torch.equal(routing.chosen, indices[expected.chosen])
    torch.testing.assert_close(routing.weights, expected.weights)
    torch.testing.assert_close(routing.logits[:, active], expected.logits)
    assert routing.logits[:, ~active].isneginf().all() and not routing.load[~active].any()


@torch.no_grad()
def test_bias_steers_the_choice_but_not_the_weights():
    router, plain, x = make_router(bias_balancing=True, normalize_top_k=False), make_router(), inputs()
    assert torch.equal(router.balance_bias, torch.zeros(6)) and plain.balance_bias is None
    assert torch.equal(router(x).chosen, plain(x).chosen)
    router.balance_bias[4] = 2.0  # above any difference of probabilities
    routing = router(x)
    assert (routing.chosen[:, 0] == 4).all()
    probabilities = (x @ router.weight.T).softmax(-1)
    torch.testing.assert_close(routing.weights, probabilities.gather(1, routing.chosen))
    others = probabilities.clone()
    others[:, 4] = 0
    assert torch.equal(routing.chosen[:, 1], others.argmax(-1))


def test_bias_gets_no_gradient_and_the_router_does():
    router = make_router(bias_balancing=True)
    (router(inputs()).weights * torch.tensor([1.0, 2.0])).sum().backward()
    assert router.weight.grad.abs().max() > 0
    assert not router.balance_bias.requires_grad and "balance_bias" in router.state_dict()


def test_float32_in_a_bf16_model():
    router, x = make_router().bfloat16(), inputs().bfloat16()
    routing = router(x)
    assert routing.logits.dtype == routing.weights.dtype == torch.float32
    torch.testing.assert_close(routing.logits, x.float() @ router.weight.float().T)


def test_float32_under_autocast():
    router, x = make_router(), inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (x @ router.weight.T).dtype == torch.bfloat16  # what autocast would have made of it
        routing = router(x)
    assert torch.equal(routing.logits, router(x).logits)
    assert torch.equal(routing.weights, router(x).weights)
