"""Expert dropout: which experts sit out a step.

A random subset of each layer's experts is inactive for a whole forward pass; the router masks their logits
before its softmax, so the gate redistributes over the active ones. (Relatives: Gating Dropout, arXiv
2205.14336, and NLLB's expert output masking; no paper has tried this form.)

Knows nothing of routers: `MoEDecoder.run(expert_mask=...)` applies the mask. Next: `balance.py`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from layerskip_moe.nn.noise import hash_uniform

_STREAM = 3  # layer dropout draws from streams 1 and 2


def expert_mask(rate: float, num_experts: int, top_k: int, *, seed: int, step: int, layers: Sequence[int]) -> Tensor:
    """Which experts are active at a step: bool [len(layers), E] on the CPU, True = active.

    rate: the probability, 0 to 1, that an expert is inactive. Expert e of layer l draws
    u = hash_uniform(seed, stream, step, l, e) and is inactive when u < rate; but the top_k experts with the
    largest draws are always active, since every token needs that many. So the share that is inactive on
    average is 1 - mean(max(n, top_k)) / E with n ~ Binomial(E, 1 - rate): `rate` itself as long as n < top_k
    is rare (E=8, top_k=2, rate 0.2: 0.19999; rate 0.5: 0.495), and 1 - top_k/E at rate 1.
    layers: layer indices, in the order of the result's rows.
    Raises ValueError for a rate outside [0, 1] or top_k outside 1..num_experts.
    """
    if not 0.0 <= rate <= 1.0:
        raise ValueError(f"the expert dropout rate is a probability between 0 and 1, got {rate}")
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k must be between 1 and num_experts={num_experts}, got {top_k}")
    layer_ids = torch.tensor(list(layers), dtype=torch.int64)[:, None]
    draws = hash_uniform(seed, _STREAM, step, layer_ids, torch.arange(num_experts)[None, :])
    active = draws >= rate
    return active.scatter(1, draws.topk(top_k, dim=1).indices, True)
