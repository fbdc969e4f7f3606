"""expert_use counts what the routers choose."""

from collections import Counter

import torch

from layerskip_moe.analysis import expert_use
from layerskip_moe.training.balance import balance_metrics


def test_counts_every_choice_of_every_moe_layer(decoder, tokens):
    model, text = decoder(n_layers=4, moe_layers="every other"), tokens(40)
    use = expert_use(model, text, seq_len=6, batch_size=4, progress=False)
    chosen = {1: Counter(), 3: Counter()}
    with torch.no_grad():
        for start in range(0, 36, 6):
            inputs = text[start : start + 6][None]
            out = model.eval().run(model.embed(inputs), range(4), positions=torch.arange(6)[None])
            for layer, routing in out.routing.items():
                chosen[layer].update(routing.chosen.flatten().tolist())
    assert use.load == {layer: [counts[e] for e in range(4)] for layer, counts in chosen.items()}
    assert use.tokens == 36 and all(sum(load) == 36 * 2 for load in use.load.values())
    assert use.metrics == {layer: balance_metrics(torch.tensor(load)) for layer, load in use.load.items()}


def test_a_router_that_always_chooses_the_same_two(decoder, tokens):
    model = decoder(bias_balancing=True)
    for block in model.blocks:
        block.mlp.router.balance_bias.copy_(torch.tensor([0.0, 5.0, 0.0, 5.0]))
    use = expert_use(model, tokens(31), seq_len=5, batch_size=3, max_windows=4, progress=False)
    assert use.load == {layer: [0, 20, 0, 20] for layer in range(3)}
    assert use.metrics[0]["max_violation"] == 1.0 and use.metrics[0]["dead_experts"] == 0.5


def test_a_dense_model_has_no_experts_to_count(decoder, tokens):
    use = expert_use(decoder(num_experts=0), tokens(31), seq_len=5, batch_size=3, progress=False)
    assert use.load == {} and use.metrics == {} and use.tokens == 30


def test_the_mode_is_put_back(decoder, tokens):
    model = decoder().train()
    expert_use(model, tokens(31), seq_len=5, batch_size=3, progress=False)
    assert all(module.training for module in model.modules())
