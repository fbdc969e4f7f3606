"""Which experts a trained model uses: the load of each, layer by layer, on held-out text.

E experts. Knows nothing of the losses that shape the load. Next: `training/balance.py`, which defines the
metrics, and `figures.expert_heat_map`, which shows the load.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from layerskip_moe.analysis.held_out import held_out_runs
from layerskip_moe.nn import MoEDecoder
from layerskip_moe.training.balance import balance_metrics


@dataclass(frozen=True)
class ExpertUse:
    """Both keyed by the index (0..L-1) of the layers that hold experts; empty for a dense model.

    load:    how many (token, choice) pairs each of the E experts got
    metrics: `balance_metrics` of that load: max_violation, normalized_entropy, ...
    tokens:  how many tokens were routed
    """

    load: dict[int, list[int]]
    metrics: dict[int, dict[str, float]]
    tokens: int


def expert_use(
    model: MoEDecoder,
    tokens: Tensor,
    *,
    seq_len: int,
    batch_size: int,
    max_windows: int | None = None,
    progress: bool = True,
) -> ExpertUse:
    """Count what the routers choose on held-out text (1-D token ids), in evaluation mode.

    The text is cut into windows as in `evaluate_exits`, with the same errors; the model's training mode is
    put back.
    """
    config = model.config
    load = {i: torch.zeros(config.num_experts, dtype=torch.int64) for i in range(config.n_layers) if config.is_moe(i)}
    n_tokens = 0
    with held_out_runs(
        model,
        tokens,
        seq_len=seq_len,
        batch_size=batch_size,
        max_windows=max_windows,
        progress=progress,
        description="counting experts",
    ) as batches:
        for inputs, _, out in batches:
            for layer, routing in out.routing.items():
                load[layer] += routing.load.cpu()
            n_tokens += inputs.numel()
    return ExpertUse(
        load={layer: counts.tolist() for layer, counts in load.items()},
        metrics={layer: balance_metrics(counts) for layer, counts in load.items()},
        tokens=n_tokens,
    )
