"""transformers, at its defaults: `generate`, a forward pass over a prompt, a training step.

Its choice of attention and of the experts' arithmetic is left as it is. Imports transformers inside its functions
only. Next: `ours.py`, which does the same work.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from layerskip_moe.bench.interleave import seconds_of
from layerskip_moe.bench.ours import Decoded
from layerskip_moe.generation.generate import now
from layerskip_moe.quiet_import import quiet_import


def load(folder: Path, dtype: torch.dtype | Literal["auto"], device: str) -> Any:
    """The model that was exported to folder, in evaluation mode. dtype: "auto": as it is stored."""
    with quiet_import():
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        logging.set_verbosity_error()
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()


def settings(model: Any) -> dict[str, Any]:
    """What transformers chose, for the record."""
    return {
        "class": type(model).__name__,
        "attention": model.config._attn_implementation,
        "experts": model.get_experts_implementation().get(""),
        "threads": torch.get_num_threads(),
    }


class _Streamer:
    """Notes tokens as `generate` gives them; what it gives first is the prompt."""

    def __init__(self) -> None:
        self.decoded: Decoded | None = None

    def put(self, tokens: Tensor) -> None:
        if self.decoded is None:
            self.decoded = Decoded()
        else:
            self.decoded.add(tokens.flatten().tolist())

    def end(self) -> None:
        pass


def decode(model: Any, prompt: Sequence[int], new_tokens: int, **drafting: Any) -> Decoded:
    """Greedy `generate` of one prompt. drafting: fields of GenerationConfig, such as assistant_early_exit."""
    from transformers import GenerationConfig

    # Anew for each run: some schedules of drafting change it as they go.
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0, **drafting)
    ids, streamer = torch.tensor([prompt], device=model.device), _Streamer()
    with torch.inference_mode():
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, streamer=streamer)
    assert streamer.decoded is not None, "generate hands over the prompt before all else"
    return streamer.decoded


def prefill_seconds(model: Any, prompt: Sequence[int]) -> float:
    """Seconds from a prompt to its first new token: a forward pass that fills a cache, with the last logits alone."""
    ids = torch.tensor([prompt], device=model.device)
    with torch.inference_mode():
        return seconds_of(lambda: model(ids, use_cache=True, logits_to_keep=1).logits.argmax(-1).item(), model.device)


def training_step(
    model: Any, optimizer: torch.optim.Optimizer, inputs: Tensor, labels: Tensor, dtype: torch.dtype | None
) -> tuple[float, float]:
    """(seconds, loss) of one step: the model's own loss, gradients, optimizer. inputs, labels [B, T], the labels one
    token on; dtype: of autocast, None: without."""
    start = now(model.device)
    model.train()
    with torch.autocast(model.device.type, dtype=dtype, enabled=dtype is not None):
        # `labels` it would shift by itself, and the last input would have none.
        loss = model(input_ids=inputs, labels=labels, shift_labels=labels, use_cache=False).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return now(model.device) - start, loss.item()
