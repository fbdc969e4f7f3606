"""How many experts rows of a text need together: what a verification of so many drafts reads.

E experts, K chosen per row. Knows nothing of how long reading them takes. Next: `expert_use.py`, the load of each;
`bench/scaling.py`, which times rows of random routing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from layerskip_moe.analysis.held_out import held_out_runs
from layerskip_moe.nn import MoEDecoder


@dataclass(frozen=True)
class ExpertUnion:
    """Experts that adjacent rows of held-out text need together, under the model's own routing.

    Attributes:
        spans: how many adjacent rows are taken together
        experts: layer (0..L-1, those that hold experts) -> for each span, how many different experts its rows need,
            on average
        over_top_k: for each span, mean over layers of experts / K: 1 where all rows need the same, at most
            min(span, E / K); nothing for a dense model
        independent: the same if rows chose K of E at random, see `independent_union`
        tokens: how many tokens were routed
    """

    spans: list[int]
    experts: dict[int, list[float]]
    over_top_k: list[float]
    independent: list[float]
    tokens: int


def expert_union(
    model: MoEDecoder,
    tokens: Tensor,
    spans: Sequence[int] = (2, 4, 8),
    *,
    seq_len: int,
    batch_size: int,
    max_windows: int | None = None,
    progress: bool = True,
) -> ExpertUnion:
    """Count the different experts of every `span` adjacent rows of held-out text (1-D token ids), in evaluation mode.

    The text is cut into windows as in `evaluate_exits`, with the same errors, and a span never reaches over two of
    them: a window has seq_len + 1 - span spans, which overlap. The model's training mode is put back. Raises
    ValueError for a span that is no whole number from 1 to seq_len.
    """
    wrong = [span for span in spans if isinstance(span, bool) or not isinstance(span, int) or not 1 <= span <= seq_len]
    if wrong or not spans:
        raise ValueError(f"spans={list(spans)} must be whole numbers from 1 to seq_len={seq_len}, at least one.")
    config = model.config
    layers = [layer for layer in range(config.n_layers) if config.is_moe(layer)]
    needed = {layer: torch.zeros(len(spans), dtype=torch.int64) for layer in layers}
    n_windows = 0
    with held_out_runs(
        model,
        tokens,
        seq_len=seq_len,
        batch_size=batch_size,
        max_windows=max_windows,
        progress=progress,
        description="counting experts of adjacent rows",
    ) as batches:
        for inputs, _, out in batches:
            for layer, routing in out.routing.items():
                chosen = torch.zeros(len(routing.chosen), config.num_experts, dtype=torch.bool, device=inputs.device)
                chosen = chosen.scatter_(1, routing.chosen, True).view(*inputs.shape, -1)  # [B, T, E]
                counts = [chosen.unfold(1, span, 1).any(dim=-1).sum() for span in spans]
                needed[layer] += torch.stack(counts).cpu()
            n_windows += len(inputs)
    places = torch.tensor([n_windows * (seq_len + 1 - span) for span in spans], dtype=torch.float64)
    means = {layer: (counts / places).tolist() for layer, counts in needed.items()}
    columns = zip(*means.values(), strict=True)
    return ExpertUnion(
        spans=list(spans),
        experts=means,
        over_top_k=[sum(column) / len(column) / config.top_k for column in columns],
        independent=[independent_union(span, config.num_experts, config.top_k) for span in spans] if layers else [],
        tokens=n_windows * seq_len,
    )


def independent_union(span: int, num_experts: int, top_k: int) -> float:
    """Experts over top_k that `span` rows would need if each chose at random: E (1 - (1 - K/E)^span) / K."""
    return num_experts * (1 - (1 - top_k / num_experts) ** span) / top_k
