"""The proof that excuses a difference: it accepts real ties, and nothing else."""

import copy

import pytest
import torch

from layerskip_moe.generation import Autoregressive, Sampling, generate

TEXT = [5, 1, 7, 2]
PROMPTS = [[3], TEXT, [8, 8, 1, 0, 2, 3]]


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(0.8, seed=3), Sampling(0.9, top_k=5, top_p=0.9, seed=1)], ids=str
)
def test_a_forged_difference_is_never_excused(trained_model, assert_same_text, sampling):
    """One token changed, at every place of every row in turn."""
    model = trained_model()
    text = generate(
        model,
        PROMPTS,
        Autoregressive(),
        max_new_tokens=12,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        seed=sampling.seed,
    ).tokens
    assert_same_text(model, PROMPTS, text, text, sampling)
    for row in range(3):
        for place in range(12):
            forged = copy.deepcopy(text)
            forged[row][place] = (forged[row][place] + 1) % 29
            with pytest.raises(AssertionError, match=f"row {row}: token {place} is .* no tie"):
                assert_same_text(model, PROMPTS, text, forged, sampling)


def test_a_missing_token_is_never_excused(trained_model, assert_same_text):
    with pytest.raises(AssertionError, match="row 0: 2 tokens against 1"):
        assert_same_text(trained_model(), [[3]], [[1, 2]], [[1]], Sampling())


@torch.no_grad()
def test_two_equal_tokens_are_a_tie_only_when_they_lead(trained_model, find_tie):
    model = copy.deepcopy(trained_model())
    best, second, third, *_, last = model(torch.tensor([TEXT]))[0, -1].argsort(descending=True).tolist()
    assert find_tie(model, TEXT, 0, Sampling(), (best, second)) is None
    model.head.weight[last] = model.head.weight[third]
    assert find_tie(model, TEXT, 0, Sampling(), (third, last)) is None
    model.head.weight[second] = model.head.weight[best]
    assert find_tie(model, TEXT, 0, Sampling(), (best, second)) == f"tokens {best} and {second} tie"
    assert find_tie(model, TEXT, 0, Sampling(), (best, third)) is None


@torch.no_grad()
def test_a_tie_for_the_last_chosen_expert_is_found_at_any_position(trained_model, find_tie):
    for position in range(4):
        model = copy.deepcopy(trained_model())
        router, seen = model.blocks[1].mlp.router, []
        router.register_forward_hook(lambda _, inputs, routing, seen=seen: seen.append(routing.logits))
        model(torch.tensor([TEXT]))
        _, second, third, *_ = seen[0][position].argsort(descending=True).tolist()
        router.weight[third] = router.weight[second]
        assert find_tie(model, TEXT, 0, Sampling(), (0, 1)).startswith("layer 1's router has a gap of ")


@torch.no_grad()
def test_experts_that_are_chosen_together_are_no_tie(trained_model, find_tie):
    model = copy.deepcopy(trained_model())
    router, seen = model.blocks[1].mlp.router, []
    router.register_forward_hook(lambda _, inputs, routing: seen.append(inputs[0]))
    model(torch.tensor([TEXT]))
    favourite = torch.linalg.lstsq(seen[0], torch.full((4, 1), 20.0)).solution[:, 0]  # logit 20 at every position
    router.weight[:2] = favourite
    assert find_tie(model, TEXT, 0, Sampling(), (0, 1)) is None
    router.weight[2] = favourite
    assert "layer 1's router" in find_tie(model, TEXT, 0, Sampling(), (0, 1))


@torch.no_grad()
def test_the_edges_of_the_filters(trained_model, find_tie):
    model = copy.deepcopy(trained_model())
    probabilities, order = model(torch.tensor([TEXT]))[0, -1].double().softmax(-1).sort(descending=True)
    edge = float(probabilities[:2].sum())
    assert find_tie(model, TEXT, 0, Sampling(1.0, top_p=edge), (0, 1)) == "a token stands on the edge of top_p"
    assert find_tie(model, TEXT, 0, Sampling(1.0, top_p=float(probabilities[0]) / 2), (0, 1)) is None
    assert find_tie(model, TEXT, 0, Sampling(1.0, top_k=3), (0, 1)) is None
    model.head.weight[order[3]] = model.head.weight[order[2]]
    assert "top k" in find_tie(model, TEXT, 0, Sampling(1.0, top_k=3), (0, 1))


@torch.no_grad()
def test_the_tolerance_is_what_rounding_needs_and_little_more(trained_model):
    """Float32 against float64, over whole texts: within ROUNDING = 5e-5 and above a hundredth of it."""
    tokens = torch.arange(29).repeat(2)[:48].view(3, 16)
    for switches in ({}, dict(num_experts=0), dict(moe_layers="every other", tie_embeddings=True)):
        model = trained_model(**switches)
        error = float((copy.deepcopy(model).double()(tokens) - model(tokens)).abs().max())
        assert 5e-7 < error < 5e-5
