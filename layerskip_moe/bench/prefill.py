"""One prompt to its first new token: prompt tokens per second, which the matrix peak bounds.

Next: `ours.py`, `peers.py` (who runs it), `tables.py` (how the result is told).
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from layerskip_moe.bench import ours, peer_llama_cpp, peer_transformers
from layerskip_moe.bench.decode import OURS
from layerskip_moe.bench.interleave import interleave, ratio, summary
from layerskip_moe.bench.networks import Network, Precision, at_precision, random_tokens
from layerskip_moe.bench.peers import Peer, check_peers, load_peer, reason_to_skip
from layerskip_moe.bench.roofline import describe_roofline, roofline_runs
from layerskip_moe.generation.generate import check_prompts
from layerskip_moe.nn import MoEDecoder


@dataclass(frozen=True)
class PrefillSettings:
    """What is run, by whom, how often.

    Attributes:
        peers: hf (transformers), llama-cpp
        precisions: float32, bfloat16, int8 (llama.cpp's q8_0 beside our int8)
        prompt_tokens: of the one prompt
        repeats: timed runs of each
        compile: of `generate`
    """

    peers: tuple[Peer, ...] = ("hf", "llama-cpp")
    precisions: tuple[Precision, ...] = ("float32", "bfloat16", "int8")
    prompt_tokens: int = 512
    repeats: int = 7
    compile: bool = True


def prefill_benchmark(model: MoEDecoder, network: Network, settings: PrefillSettings) -> dict[str, Any]:
    """Time the float32 model at each precision, and its peers with the same weights.

    All compute every prompt token's keys, values and states, and the last one's logits. Returns as `decode_benchmark`;
    a row has "name", "value" (tokens/s), "ours_over_this" and "settings", a group "rows" and "roofline". Raises
    ValueError as it.
    """
    check_peers(settings.peers)
    if "hf-early-exit" in settings.peers:
        raise ValueError("hf-early-exit runs a prompt as hf does; give that.")
    prompt = random_tokens(settings.prompt_tokens, model.config.vocab_size, seed=network.seed)
    check_prompts([prompt], model.config, 1)
    groups, skipped = {}, []
    for precision in settings.precisions:
        with tempfile.TemporaryDirectory() as folder:
            ready = at_precision(model, precision)
            runs: dict[str, Callable[[], float]] = {
                OURS: partial(ours.prefill_seconds, ready, prompt, compile=settings.compile)
            }
            told: dict[str, Any] = {OURS: {"compile": settings.compile}}
            for peer in settings.peers:
                reason = reason_to_skip(peer, model.config, precision, str(model.device))
                if reason is not None:
                    skipped.append({"peer": peer, "precision": precision, "reason": reason})
                    continue
                theirs, told[peer] = load_peer(peer, model, network, precision, len(prompt) + 1, Path(folder))
                program = peer_llama_cpp if peer == "llama-cpp" else peer_transformers
                runs[peer] = partial(program.prefill_seconds, theirs, prompt)
            dtype = torch.float32 if precision == "int8" else getattr(torch, precision)
            results = interleave(
                runs | roofline_runs(model.device, dtype), settings.repeats, describe=f"prefill, {precision}"
            )
        speeds = {name: [len(prompt) / seconds for seconds in results[name]] for name in runs}
        groups[precision] = {
            "rows": [
                {
                    "name": name,
                    "value": summary(speeds[name]),
                    "ours_over_this": ratio(speeds[OURS], speeds[name]),
                    "settings": told[name],
                }
                for name in runs
            ],
            "roofline": describe_roofline(results),
        }
    return {"benchmark": "prefill", "unit": "tokens/s", "groups": groups, "skipped": skipped}
