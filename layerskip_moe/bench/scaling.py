"""How the cost of decoding grows: with the rows verified together, with the experts there are, with the position.

Each beside what the bytes read explain. Next: `decode.py`, for speeds at one size.
"""

from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch

from layerskip_moe.bench import ours
from layerskip_moe.bench.interleave import interleave, ratio, seconds_of, summary
from layerskip_moe.bench.networks import cache_bytes, random_tokens, weight_bytes, with_experts
from layerskip_moe.bench.roofline import READ, roofline_runs
from layerskip_moe.nn import MoEDecoder
from layerskip_moe.nn.block import MoEMLP

_ROWS = range(1, 9)
_PASSES = 5  # over all layers, in one timed run


def expert_rows(model: MoEDecoder, repeats: int, *, seed: int) -> dict[str, Any]:
    """The experts' arithmetic of verifying 1 to 8 rows: {"layers": MoE layers that it runs over, "rows": [{"rows",
    "seconds": summary for one layer, "over_one_row": summary, "union": experts that the rows need over top_k, mean
    over the layers}]}.

    The rows are random, and the layers run one after the other, so that no layer's experts wait in a processor's cache.
    """
    layers = [block.mlp for block in model.blocks if isinstance(block.mlp, MoEMLP)]
    generator = torch.Generator().manual_seed(seed)
    runs: dict[str, Callable[[], float]] = {}
    unions: dict[str, float] = {}
    with torch.inference_mode():
        for rows in _ROWS:
            drawn = torch.randn(len(layers), rows, model.config.d_model, generator=generator)
            work = [(mlp, x, mlp.router(x)) for mlp, x in zip(layers, drawn.to(model.device, model.dtype), strict=True)]
            unions[str(rows)] = sum(int((routing.load > 0).sum()) for _, _, routing in work) / len(layers)
            runs[str(rows)] = partial(_run_experts, work, model.device)
        results = interleave(runs, repeats, warm_up=2, describe="experts, 1 to 8 rows")
    seconds = {rows: [total / len(layers) for total in each] for rows, each in results.items()}
    return {
        "layers": len(layers),
        "rows": [
            {
                "rows": int(rows),
                "seconds": summary(seconds[rows]),
                "over_one_row": ratio(seconds[rows], seconds["1"]),
                "union": unions[rows] / model.config.top_k,
            }
            for rows in results
        ],
    }


def _run_experts(work: list[tuple[MoEMLP, torch.Tensor, Any]], device: torch.device) -> float:
    """Seconds of one pass over all layers."""

    def passes() -> None:
        for _ in range(_PASSES):
            for mlp, x, routing in work:
                mlp.experts(x, routing)

    return seconds_of(passes, device) / _PASSES


def expert_count(
    model: MoEDecoder,
    repeats: int,
    *,
    seed: int,
    counts: tuple[int, int] = (8, 64),
    new_tokens: int = 64,
    compile: bool,
) -> dict[str, Any]:
    """A token's cost with many experts and with few, top_k the same, random weights: {"experts": [few, many],
    "seconds_per_token": [summary, summary], "ratio": summary of many over few}."""
    prompt = random_tokens(8, model.config.vocab_size, seed=seed)
    names = [str(count) for count in counts]
    runs = {
        name: partial(ours.decode, with_experts(model, int(name), seed=seed), prompt, new_tokens, compile=compile)
        for name in names
    }
    results = interleave(runs, repeats, describe="few experts and many")
    few, many = ([1 / run.tokens_per_second for run in results[name]] for name in names)
    return {
        "experts": list(counts),
        "seconds_per_token": [summary(few), summary(many)],
        "ratio": ratio(many, few),
    }


def late_position(
    model: MoEDecoder,
    repeats: int,
    *,
    seed: int,
    positions: tuple[int, int] = (100, 4000),
    new_tokens: int = 32,
    compile: bool,
) -> dict[str, Any]:
    """A token's cost late in a text and early: {"positions": [early, late], "seconds_per_token": [summary, summary],
    "ratio": summary of late over early, "bytes": [early, late] that such a token reads, "read_seconds": what reading
    the additional bytes takes at the bandwidth measured beside, "explained": that over the seconds that were
    added}."""
    names = [str(position) for position in positions]
    runs: dict[str, Callable[[], Any]] = {
        name: partial(
            ours.decode,
            model,
            random_tokens(int(name), model.config.vocab_size, seed=seed),
            new_tokens,
            compile=compile,
        )
        for name in names
    }
    results = interleave(runs | roofline_runs(model.device), repeats, describe="early and late positions")
    early, late = ([1 / run.tokens_per_second for run in results[name]] for name in names)
    weights = weight_bytes(model)[1]
    read = [weights + cache_bytes(model, position + new_tokens / 2) for position in positions]
    read_seconds = (read[1] - read[0]) / max(results[READ])
    return {
        "positions": list(positions),
        "seconds_per_token": [summary(early), summary(late)],
        "ratio": ratio(late, early),
        "bytes": read,
        "read_seconds": read_seconds,
        "explained": read_seconds / (median(late) - median(early)),
    }


def scaling(model: MoEDecoder, repeats: int, *, seed: int, compile: bool) -> dict[str, Any]:
    """All three, by name, for a float32 model; {"skipped": reason} in place of what its shape does not allow."""
    told: dict[str, Any] = {}
    if model.config.num_experts:
        told["expert_rows"] = expert_rows(model, repeats, seed=seed)
    if model.config.num_experts and model.config.top_k <= 8:
        told["expert_count"] = expert_count(model, repeats, seed=seed, compile=compile)
    else:
        told["expert_count"] = {"skipped": f"the network chooses {model.config.top_k} of {model.config.num_experts}"}
    if model.config.max_seq_len >= 4032:
        told["late_position"] = late_position(model, repeats, seed=seed, compile=compile)
    else:
        told["late_position"] = {"skipped": f"the network ends at position {model.config.max_seq_len}"}
    return told
