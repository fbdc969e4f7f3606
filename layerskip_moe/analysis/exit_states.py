"""What every layer makes of given texts, one pass for all layers: what thresholds and probes are chosen by.

L layers, D width, V vocabulary, N positions, C layers at which a token may stop (the allowed exits, then L).
Knows nothing of thresholds. Next: `exit_shape.py` and `train_classifier.py`, which do the choosing.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from layerskip_moe.analysis.held_out import chunks, run_layers
from layerskip_moe.generation.confidence import Confidence, confidence_of
from layerskip_moe.nn import MoEDecoder
from layerskip_moe.nn.modes import evaluating


@dataclass(frozen=True)
class ExitOpinions:
    """What layers first..L say of N positions.

    Attributes:
        confidence: [C - 1, N] float32, of layers first..L-1
        choice: [C, N] int64, the most likely token
        labels: [N] int64, what the text says
    """

    confidence: Tensor
    choice: Tensor
    labels: Tensor


def exit_states(
    model: MoEDecoder,
    prompts: Sequence[Sequence[int]],
    texts: Sequence[Sequence[int]],
    *,
    batch_size: int,
    progress: bool,
    description: str,
) -> Iterator[tuple[list[Tensor], Tensor]]:
    """Batch by batch, the states that each token of texts[i], after prompts[i], is predicted from: L + 1 states [N, D],
    the embeddings first, then after each layer; and those tokens, labels [N].

    Nothing of a text is predicted from its own last token, so that one may be no token at all (-1).
    """
    pairs, starts = list(zip(prompts, texts, strict=True)), range(0, len(prompts), batch_size)
    for start in tqdm(starts, desc=description, disable=not progress, leave=False):
        rows = pairs[start : start + batch_size]
        width = max(len(prompt) + len(text) for prompt, text in rows) - 1
        # Padded on the right: attention is causal, so what stands after a row's end changes nothing before it.
        inputs = torch.tensor([[*p, *t, *[0] * (width + 1 - len(p) - len(t))][:width] for p, t in rows]).clamp(min=0)
        scored = torch.tensor([[len(p) - 1 <= i < len(p) + len(t) - 1 for i in range(width)] for p, t in rows])
        labels = torch.tensor([token for _, text in rows for token in text], device=model.device)
        inputs, scored = inputs.to(model.device), scored.to(model.device)
        with evaluating(model):
            collected = run_layers(model, inputs, collect=True).collected
            states = [model.embed(inputs), *(collected[layer] for layer in range(model.config.n_layers))]
            states = [state[scored] for state in states]
        yield states, labels


def exit_opinions(
    model: MoEDecoder,
    prompts: Sequence[Sequence[int]],
    texts: Sequence[Sequence[int]],
    *,
    confidence: Confidence,
    first: int,
    batch_size: int,
    progress: bool,
) -> ExitOpinions:
    """Confidences and choices of layers first..L along texts, everything before a position having gone through all
    layers. Of the logits only one chunk of one layer's is held at a time."""
    sure, chosen, told = [], [], []
    batches = exit_states(
        model, prompts, texts, batch_size=batch_size, progress=progress, description="asking every exit"
    )
    for states, answers in batches:
        for *hidden, labels in chunks(model, *states[first - 1 :], answers):
            with evaluating(model):
                logits = [model.unembed(state) for state in hidden[1:]]
                sure.append(
                    [
                        confidence_of(confidence, hidden[i + 1], hidden[i], logits[i], layer=first + i).float()
                        for i in range(len(logits) - 1)
                    ]
                )
            chosen.append(torch.stack([layer.argmax(dim=-1) for layer in logits]))
            told.append(labels)
    confidences = [torch.stack(layers) if layers else torch.zeros(0, len(told[i])) for i, layers in enumerate(sure)]
    return ExitOpinions(torch.cat(confidences, dim=1).cpu(), torch.cat(chosen, dim=1).cpu(), torch.cat(told).cpu())
