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
from layerskip_moe.generation.policies import DEL, Heuristic
from layerskip_moe.pretrained.quantize import quantize

PROMPTS = [[3, 4, 1], [5], [8, 8, 1, 0, 2]]
PLACES = [  # device, number type, quantisation of model and draft
    ("cpu", torch.bfloat16, None),
    ("cpu", torch.bfloat16, "int4"),
    ("cpu", torch.float16, None),
    ("cpu", torch.float16, "int8"),
    ("cuda", torch.float32, None),
    ("cuda", torch.bfloat16, None),
    ("cuda", torch.bfloat16, "int8"),
    ("cuda", torch.float16, "int4"),
]
STRATEGIES = {
    "plain": lambda draft: Autoregressive(),
    "early layers": lambda draft: Autoregressive(2),
    "self-speculative": lambda draft: SelfSpeculative(1, 3),
    "rejection": lambda draft: SelfSpeculative(1, 3, coupling="rejection"),
    "a draft model": lambda draft: Speculative(draft, 3),
    "early layers of a draft model": lambda draft: SelfSpeculative(1, 3, draft_model=draft),
    "rejection of theirs": lambda draft: SelfSpeculative(1, 3, coupling="rejection", draft_model=draft),
    "what was right lately": lambda draft: SelfSpeculative(policy=DEL(length=3)),
    "heuristic, rejection": lambda draft: SelfSpeculative(policy=Heuristic(1, length=3), coupling="rejection"),
    "propagate": lambda draft: EarlyExit(0.2),
    "exact": lambda draft: EarlyExit(0.2, cache="exact"),
    "state": lambda draft: EarlyExit(0.9, confidence="state"),
    "every": lambda draft: LayerSkipping(every=3),
    "random": lambda draft: LayerSkipping(random=1),
}


@pytest.mark.parametrize("device, dtype, quantization", PLACES, ids=lambda value: str(value))
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_decodes_in(tiny_model, strategy, device, dtype, quantization):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    model, draft = (tiny_model(n_layers=n, d_ff=16).to(device, dtype) for n in (3, 1))
    if quantization is not None:
        model, draft = quantize(model, quantization), quantize(draft, quantization)
    settings = dict(max_new_tokens=12, temperature=0.9, repetition_penalty=1.2, stop_tokens=[7], seed=2)
    out = generate(model, PROMPTS, STRATEGIES[strategy](draft), **settings)
    again = generate(model, PROMPTS, STRATEGIES[strategy](draft), **settings)
    assert out.tokens == again.tokens and out.layers_run == again.layers_run
    assert all(0 <= token < 29 and token != 7 for row in out.tokens for token in row)
    assert sum(map(len, out.tokens)) > 3
    assert [len(row) for row in out.layers_run] == [len(row) for row in out.tokens]
