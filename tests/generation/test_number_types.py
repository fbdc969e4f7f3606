"""Every strategy in the number types and on the devices that models are decoded in: no reference, for rounding decides
between tokens there; but what a strategy keeps must fit the model's type and device, and rows must come and go."""

import pytest
import torch

from layerskip_moe.generation import (
    Autoregressive,
    EarlyExit,
    LayerSkipping,
    SelfSpeculative,
    Speculative,
    generate,
)

PROMPTS = [[3, 4, 1], [5], [8, 8, 1, 0, 2]]
PLACES = [("cpu", torch.bfloat16), ("cpu", torch.float16), ("cuda", torch.float32), ("cuda", torch.bfloat16)]
STRATEGIES = {
    "plain": lambda draft: Autoregressive(),
    "early layers": lambda draft: Autoregressive(2),
    "self-speculative": lambda draft: SelfSpeculative(1, 3),
    "rejection": lambda draft: SelfSpeculative(1, 3, coupling="rejection"),
    "a draft model": lambda draft: Speculative(draft, 3),
    "propagate": lambda draft: EarlyExit(0.2),
    "exact": lambda draft: EarlyExit(0.2, cache="exact"),
    "state": lambda draft: EarlyExit(0.9, confidence="state"),
    "every": lambda draft: LayerSkipping(every=3),
    "random": lambda draft: LayerSkipping(random=1),
}


@pytest.mark.parametrize("device, dtype", PLACES, ids=lambda value: str(value))
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_decodes_in(tiny_model, strategy, device, dtype):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    model, draft = (tiny_model(n_layers=n).to(device, dtype) for n in (3, 1))
    settings = dict(max_new_tokens=12, temperature=0.9, repetition_penalty=1.2, stop_tokens=[7], seed=2)
    out = generate(model, PROMPTS, STRATEGIES[strategy](draft), **settings)
    again = generate(model, PROMPTS, STRATEGIES[strategy](draft), **settings)
    assert out.tokens == again.tokens and out.layers_run == again.layers_run
    assert all(0 <= token < 29 and token != 7 for row in out.tokens for token in row)
    assert sum(map(len, out.tokens)) > 3
    assert [len(row) for row in out.layers_run] == [len(row) for row in out.tokens]
