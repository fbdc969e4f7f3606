"""Walking a trained model over text and asking what it says: the part that every measurement here shares.

N positions, V vocabulary. Knows nothing of what is measured. Next: `exits.py` and `expert_use.py`, which measure.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from layerskip_moe.data import steps_per_epoch, windows
from layerskip_moe.nn import MoEDecoder, RunOutput
from layerskip_moe.nn.modes import evaluating

LIVE_LOGITS = 2**24  # logits held at one time: 64 MiB in float32, whatever the vocabulary


@contextmanager
def held_out_runs(
    model: MoEDecoder,
    tokens: Tensor,
    *,
    seq_len: int,
    batch_size: int,
    max_windows: int | None,
    progress: bool,
    description: str,
    collect: bool = False,
) -> Iterator[Iterator[tuple[Tensor, Tensor, RunOutput]]]:
    """Within the block, the model in evaluation mode and without gradients, batch after batch of held-out text: inputs
    [B, T] and labels [B, T] on the model's device, and what all layers made of the inputs, see `run_layers`.

    tokens: 1-D. max_windows: at most this many windows of seq_len tokens; None: all. description: of the progress bar.
    Raises ValueError for a text shorter than one window and for token ids the model does not have.
    """
    with evaluating(model):
        batches = _batches(model, tokens, seq_len, batch_size, max_windows, progress, description)
        yield ((inputs, labels, run_layers(model, inputs, collect=collect)) for inputs, labels in batches)


def _batches(
    model: MoEDecoder,
    tokens: Tensor,
    seq_len: int,
    batch_size: int,
    max_windows: int | None,
    progress: bool,
    description: str,
) -> Iterator[tuple[Tensor, Tensor]]:
    n_batches = steps_per_epoch(tokens, seq_len, batch_size)
    if max_windows is not None:
        n_batches = min(n_batches, -(-max_windows // batch_size))
    pairs = windows(tokens, seq_len, batch_size, max_windows)
    for inputs, labels in tqdm(pairs, total=n_batches, desc=description, disable=not progress, leave=False):
        vocab_size = model.config.vocab_size
        if max(int(inputs.max()), int(labels.max())) >= vocab_size:
            raise ValueError(
                f"The text holds token ids beyond the model's vocabulary of {vocab_size}; "
                "use the tokenizer that the model was trained with."
            )
        yield inputs.to(model.device), labels.to(model.device)


def run_layers(model: MoEDecoder, inputs: Tensor, *, n_layers: int | None = None, collect: bool = False) -> RunOutput:
    """One pass of inputs [B, T] through the first n layers (None: all), every layer's output collected if asked for."""
    layers = range(model.config.n_layers if n_layers is None else n_layers)
    positions = torch.arange(inputs.shape[1], device=inputs.device).expand(inputs.shape)
    return model.run(model.embed(inputs), layers, positions=positions, collect=layers if collect else ())


def chunks(model: MoEDecoder, *parts: Tensor) -> Iterator[tuple[Any, ...]]:
    """Tensors [N, ...] side by side, as many of their rows at a time as may have their logits held."""
    rows = max(1, LIVE_LOGITS // model.config.vocab_size)
    return zip(*(part.split(rows) for part in parts), strict=True)


def judge(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Of logits [N, V] and labels [N]: the cross entropies [N], float32 in nats, and the most likely tokens [N]."""
    return F.cross_entropy(logits.float(), labels, reduction="none"), logits.argmax(dim=-1)
