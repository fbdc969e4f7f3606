"""How likely a model, or its first layers alone, finds given continuations: many, of any lengths, in batches.

B batch, T positions, D width, V vocabulary. Unlike `continuations.py`, which tells one mean of a whole set, this
tells each continuation's own.
Knows nothing of text or tokenizers. Next: `lm_eval.py`, whose tasks ask this.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from layerskip_moe.analysis.held_out import chunks, judge, run_layers
from layerskip_moe.nn import MoEDecoder
from layerskip_moe.nn.modes import evaluating

Pair = tuple[list[int], list[int]]  # token ids of a context and of what continues it, at least one each


def log_likelihoods(
    model: MoEDecoder, pairs: Sequence[Pair], *, exit_layer: int, batch_size: int, max_length: int
) -> Iterator[tuple[int, float, bool]]:
    """(which pair, its continuation's log-likelihood in nats, whether greedy decoding would say it), as they are found.

    exit_layer: how many layers run before the head, 1..L; max_length: positions that are run, and so the longest
    continuation. What is longer with its context loses its beginning.

    Logits are judged in float32 and summed in float64. Longest first, so that memory that is too small shows at once;
    padded on the right, where attention is causal and experts have no capacity, so that it changes nothing. Pairs that
    differ in their last token only, as the answers of many tasks do, share one pass.
    """
    inputs: dict[tuple[int, ...], list[int]] = {}  # what is run, all but the last token: the pairs it serves
    for index, (context, continuation) in enumerate(pairs):
        assert context and 1 <= len(continuation) <= max_length
        inputs.setdefault(tuple([*context, *continuation][-(max_length + 1) : -1]), []).append(index)
    order = sorted(inputs, key=len, reverse=True)
    for start in range(0, len(order), batch_size):
        texts = order[start : start + batch_size]
        served = [(row, index) for row, text in enumerate(texts) for index in inputs[text]]
        ends = [(row, len(texts[row]), len(pairs[index][1])) for row, index in served]
        labels = torch.tensor([token for _, index in served for token in pairs[index][1]], device=model.device)
        with evaluating(model):
            hidden = run_layers(model, _pad(texts).to(model.device), n_layers=exit_layer).hidden
            states = torch.cat([hidden[row, end - length : end] for row, end, length in ends])
            nats, same = _judge(model, states, labels)
        lengths = [length for _, _, length in ends]
        for (_, index), own_nats, own_same in zip(served, nats.split(lengths), same.split(lengths), strict=True):
            yield index, -float(own_nats.sum()), bool(own_same.all())


def _pad(texts: list[tuple[int, ...]]) -> Tensor:
    """Texts, the longest first, -> token ids [B, T]."""
    return torch.tensor([[*text, *[0] * (len(texts[0]) - len(text))] for text in texts])


def _judge(model: MoEDecoder, states: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """States [N, D] and the tokens after them [N] -> their cross entropies [N] in nats, and which are the likeliest."""
    nats, same = [], []
    for part, answers in chunks(model, states, labels):
        loss, choice = judge(model.unembed(part), answers)
        nats.append(loss.cpu().double())  # on the CPU, because not every accelerator has float64
        same.append((choice == answers).cpu())
    return torch.cat(nats), torch.cat(same)
