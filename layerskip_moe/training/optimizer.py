"""AdamW, its learning rate over the run, and the number type a device trains in.

Knows nothing of the recipe. Next: `loop.py`.
"""

import math

import torch

from layerskip_moe.nn import MoEDecoder
from layerskip_moe.training.config import Precision, TrainConfig


def make_optimizer(model: MoEDecoder, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only: not on norms, biases or the embedding."""
    matrices: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (matrices if parameter.dim() >= 2 and "embedding" not in name else others).append(parameter)
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        groups,
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        fused=model.device.type in ("cpu", "cuda", "mps"),
    )


def learning_rate_at(step: int, max_steps: int, config: TrainConfig) -> float:
    """Linear warm-up to the peak, then half a cosine down to its min_learning_rate_ratio; a pure function of
    the step (0 .. max_steps - 1)."""
    warmup = config.warmup_steps if config.warmup_steps is not None else min(500, max_steps // 20)
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(max_steps - 1 - warmup, 1)
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))
    low = config.min_learning_rate_ratio
    return config.learning_rate * (low + (1.0 - low) * cosine)


def autocast_dtype(precision: Precision, device: torch.device) -> torch.dtype | None:
    """The type matrix products run in, None for the weights' own (float32).

    "auto" takes bfloat16 where the hardware multiplies it: emulated, it is a hundred times slower than
    float32 (measured on a CPU without AVX-512). float16 is for GPUs before Ampere, the T4 among them.
    """
    if precision == "auto":
        if device.type == "cuda":
            precision = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
        elif device.type == "cpu" and _cpu_multiplies_bfloat16():
            precision = "bfloat16"
        else:
            precision = "float32"
    return {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}[precision]


def _cpu_multiplies_bfloat16() -> bool:
    # torch has no public name for these yet; without them, float32 is right everywhere.
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in names)
