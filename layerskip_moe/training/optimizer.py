"""AdamW, its learning rate over the run, and how a device trains: in what number type, and compiled or not.

Knows nothing of the recipe. Next: `run.py`.
"""

import contextlib
import math
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from layerskip_moe.nn import MoEDecoder
from layerskip_moe.nn.compiling import can_compile
from layerskip_moe.quiet_import import quiet_import
from layerskip_moe.training.config import Precision, TrainConfig
from layerskip_moe.training.parallel import Ranks
from layerskip_moe.training.sharding import mesh_of


def make_optimizer(model: MoEDecoder, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW with weight decay on matrices only: not on norms, biases or the embedding.

    "adamw8bit" is torchao's (after arXiv 2110.02861): means and squares of gradients as 8-bit numbers with a scale for
    every 256, in parameters of a multiple of 256 and at least 4096 of them; 2 bytes a parameter instead of 8. It
    compiles a step for every shape of parameter, which needs Triton on a GPU and a C++ compiler on a CPU. There, one
    AMD EPYC core, each shape takes 5 s, and a step over 9M parameters 0.48 s, against 0.01 s of the fused AdamW. Of
    divided parameters each rank rounds its own part, by the same rule; that step is not compiled (`uncompiled`).
    Raises ImportError where torchao is missing.
    """
    alike: dict[Any, list[torch.nn.Parameter]] = {}  # by whether they decay, and by what they are divided over
    for name, parameter in model.named_parameters():
        decays = parameter.dim() >= 2 and "embedding" not in name
        alike.setdefault((decays, mesh_of(parameter)), []).append(parameter)
    groups = [
        {"params": parameters, "weight_decay": config.weight_decay if decays else 0.0}
        for (decays, _), parameters in sorted(alike.items(), key=lambda item: not item[0][0])
    ]
    betas = (config.beta1, config.beta2)
    if config.optimizer == "adamw8bit":
        with quiet_import():
            from torchao.optim import AdamW8bit
        return AdamW8bit(groups, lr=config.learning_rate, betas=betas)
    fused = model.device.type in ("cpu", "cuda", "mps")
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, fused=fused)


def uncompiled(ranks: Ranks) -> AbstractContextManager[Any]:
    """Where the step of an optimizer that compiles itself is not compiled, if several ranks take it: it would mistake
    one parameter's part for another's (torch 2.13, whose compiler does not tell DTensors by what they hold)."""
    return torch.compiler.set_stance("force_eager") if ranks.size > 1 else contextlib.nullcontext()


def set_learning_rate(optimizer: torch.optim.Optimizer, step: int, max_steps: int, config: TrainConfig) -> float:
    """Give every group of parameters the step's rate, `learning_rate_at`; that rate."""
    rate = learning_rate_at(step, max_steps, config)
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)  # the 8-bit AdamW's compiled step reads it where it lies
        else:
            group["lr"] = rate
    return rate


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


def compiles(wanted: bool | None, device: torch.device) -> bool:
    """Whether training takes compiled blocks: as wanted, and for None on a GPU that Triton compiles for.

    Not on a CPU: at main.py's sizes in float32, on one AMD EPYC core, making the graphs took 32 s (14 s with a warm
    compile cache) and then saved 0.08 s of a step's 0.50 s.
    """
    if wanted is not None:
        return wanted
    return device.type == "cuda" and can_compile(device)


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
