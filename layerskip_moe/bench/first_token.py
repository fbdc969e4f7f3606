"""Seconds from a loaded model to its first new token, compilation included, each in a process of its own.

The first process finds empty caches, as on a new machine; the second finds what the first compiled; the third does
not compile. Next: `alone.py` (the processes).
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from layerskip_moe.bench import ours
from layerskip_moe.bench.alone import in_fresh_process
from layerskip_moe.bench.networks import Precision, at_precision, random_tokens
from layerskip_moe.generation.generate import now
from layerskip_moe.nn import MoEDecoder

_CASES = {"empty caches": True, "a new process": True, "compile=False": False}


def first_token(
    model: MoEDecoder, precisions: tuple[Precision, ...], prompt_tokens: int, *, seed: int
) -> dict[str, dict[str, Any]]:
    """Precision -> case -> {"seconds" to the first token, "second_call": seconds when the same is asked again, all
    compiled}, for a float32 model."""
    told: dict[str, dict[str, Any]] = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        tqdm(total=len(precisions) * 3, desc="first token", leave=False) as bar,
    ):
        for precision in precisions:
            told[precision] = {}
            at_precision(model, precision).save_pretrained(Path(folder) / precision)
            caches = Path(folder) / f"{precision} caches"
            environment = {
                "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
                "LAYERSKIP_MOE_CACHE": str(caches / "ours"),
            }
            for name, compile in _CASES.items():
                arguments = {
                    "folder": str(Path(folder) / precision),
                    "prompt": random_tokens(prompt_tokens, model.config.vocab_size, seed=seed),
                    "device": str(model.device),
                    "threads": torch.get_num_threads(),
                    "compile": compile,
                }
                told[precision][name] = in_fresh_process(_first_token, arguments, environment)
                bar.update()
    return told


def _first_token(*, folder: str, prompt: list[int], device: str, threads: int, compile: bool) -> dict[str, float]:
    """In the process: load, then the time of the first token, twice."""
    torch.set_num_threads(threads)
    model = MoEDecoder.from_pretrained(folder, device=device)
    seconds = []
    for _ in range(2):
        start = now(model.device)
        decoded = ours.decode(model, prompt, 2, compile=compile)
        seconds.append(decoded.arrivals[0][0] - start)
    return {"seconds": seconds[0], "second_call": seconds[1]}
