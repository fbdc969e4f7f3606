"""llama.cpp, through llama-cpp-python: decoding and a prompt's evaluation, on as many threads as torch has.

The greedy choice is numpy's argmax of the logits: llama-cpp-python's own sampler takes 0.15 ms a token more. Imports
llama_cpp inside its functions only. Next: `ours.py`, which does the same work.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from layerskip_moe.bench.interleave import seconds_of
from layerskip_moe.bench.networks import Precision
from layerskip_moe.bench.ours import Decoded

_BATCH = 512  # tokens of a prompt evaluated together


def load(path: Path, positions: int, precision: Precision) -> Any:
    """The model of a GGUF file, with a cache for so many positions: float32 in float32, as ours, else llama.cpp's
    own choice, float16."""
    import llama_cpp

    kind = llama_cpp.GGML_TYPE_F32 if precision == "float32" else llama_cpp.GGML_TYPE_F16
    threads = torch.get_num_threads()
    return llama_cpp.Llama(
        str(path),
        n_ctx=positions,
        n_batch=_BATCH,
        n_ubatch=_BATCH,
        n_threads=threads,
        n_threads_batch=threads,
        type_k=kind,
        type_v=kind,
        verbose=False,
    )


def settings(precision: Precision) -> dict[str, Any]:
    """For the record."""
    threads = torch.get_num_threads()
    return {
        "weights": "q8_0" if precision == "int8" else precision,
        "cache": "float32" if precision == "float32" else "float16",
        "n_batch": _BATCH,
        "flash_attn": False,  # on, it rounds to float16 on the way: its float32 text soon is not ours
        "threads": threads,
    }


def decode(model: Any, prompt: Sequence[int], new_tokens: int) -> Decoded:
    """Greedy decoding of one prompt."""
    model.reset()
    model.eval(prompt)
    decoded = Decoded()
    decoded.add([_best(model)])
    for _ in range(new_tokens - 1):
        model.eval(decoded.tokens[-1:])
        decoded.add([_best(model)])
    return decoded


def prefill_seconds(model: Any, prompt: Sequence[int]) -> float:
    """Seconds from a prompt to its first new token."""

    def work() -> None:
        model.reset()
        model.eval(prompt)
        _best(model)

    return seconds_of(work, torch.device("cpu"))


def _best(model: Any) -> int:
    """The most likely next token."""
    import llama_cpp

    logits = llama_cpp.llama_get_logits_ith(model.ctx, -1)
    return int(np.ctypeslib.as_array(logits, shape=(model.n_vocab(),)).argmax())
