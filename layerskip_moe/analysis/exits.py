"""How good the model is when it stops early: perplexity and agreement at every exit layer.

L layers, V vocabulary, N positions of a batch. Exit layer n (1..L) means that the first n layers ran, then
the one norm and head. Agreement is what bounds a greedy draft: the share of positions, given the true text
so far, at which an exit proposes the token that the whole model would choose.
Knows nothing of decoding. Next: `report.py`, which tells the result.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from layerskip_moe.analysis.held_out import chunks, held_out_runs, judge
from layerskip_moe.nn import MoEDecoder


@dataclass(frozen=True)
class ExitEvaluation:
    """Results on the same text for exit layers 1..L; entry n - 1 belongs to exit layer n.

    perplexity: exp of the mean cross entropy per token, in nats
    agreement:  share of positions, 0 to 1, where the exit's most likely token is the last layer's
    tokens:     how many predictions these are means of
    """

    perplexity: list[float]
    agreement: list[float]
    tokens: int


def evaluate_exits(
    model: MoEDecoder,
    tokens: Tensor,
    *,
    seq_len: int,
    batch_size: int,
    max_windows: int | None = None,
    progress: bool = True,
) -> ExitEvaluation:
    """Perplexity and agreement of every exit layer on held-out text.

    tokens: 1-D token ids, cut into windows of seq_len predictions that do not overlap; max_windows: at most
    this many, all by default. One pass through the layers serves all exits, and only one chunk of one exit's
    logits is held at a time. Cross entropies are computed in float32 and summed in float64.
    The model's training mode is put back. Raises ValueError for a text shorter than one window, for unknown
    token ids, and for a seq_len beyond the model's max_seq_len.
    """
    n_layers = model.config.n_layers
    loss = torch.zeros(n_layers, dtype=torch.float64)
    agreed = torch.zeros(n_layers, dtype=torch.int64)
    n_tokens = 0
    with held_out_runs(
        model,
        tokens,
        seq_len=seq_len,
        batch_size=batch_size,
        max_windows=max_windows,
        progress=progress,
        description="evaluating exits",
        collect=True,
    ) as batches:
        for _, labels, out in batches:
            exits = [out.collected[layer].flatten(0, 1) for layer in range(n_layers)]
            for *hidden, answers in chunks(model, *exits, labels.flatten()):
                opinions = [judge(model.unembed(state), answers) for state in hidden]
                losses, choices = (torch.stack(part) for part in zip(*opinions, strict=True))
                # Summed on the CPU, because not every accelerator has float64.
                loss += losses.cpu().double().sum(dim=1)
                agreed += (choices == choices[-1]).sum(dim=1).cpu()
            n_tokens += labels.numel()
    return ExitEvaluation((loss / n_tokens).exp().tolist(), (agreed.double() / n_tokens).tolist(), n_tokens)
