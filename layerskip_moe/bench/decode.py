"""One prompt decoded greedily by everyone, token by token: tokens per second, beside what the memory allows.

Decoding reads every weight that a token uses, and the cache, once for each token: bytes over the read bandwidth is a
floor under its time. Next: `ours.py`, `peers.py` (who decodes), `tables.py` (how the result is told).
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from layerskip_moe.bench import ours, peer_llama_cpp, peer_transformers
from layerskip_moe.bench.decoding import first_difference
from layerskip_moe.bench.interleave import interleave, ratio, summary
from layerskip_moe.bench.networks import Network, Precision, at_precision, cache_bytes, random_tokens, weight_bytes
from layerskip_moe.bench.ours import Decoded
from layerskip_moe.bench.peers import Peer, check_peers, load_peer, reason_to_skip
from layerskip_moe.bench.roofline import READ, describe_roofline, roofline_runs
from layerskip_moe.generation import SelfSpeculative
from layerskip_moe.generation.generate import check_prompts
from layerskip_moe.nn import MoEDecoder

OURS = "ours"


@dataclass(frozen=True)
class DecodeSettings:
    """What is decoded, by whom, how often.

    Attributes:
        peers: hf (transformers), hf-early-exit (its speculation with the model's own first layers, at its defaults and
            with our draft length), llama-cpp
        precisions: float32, bfloat16, int8 (llama.cpp's q8_0 beside our int8)
        prompt_tokens: of the one prompt
        new_tokens: to decode
        exit_layer: of self-speculation, ours and transformers'; None: plain decoding alone
        draft_length: tokens that we draft per round
        repeats: timed runs of each
        scaling: measure too how the time grows with the rows verified, the experts there are, and the position
        first_token: measure too, in processes of their own, the time to the first token, compilation included
        compile: of `generate`
    """

    peers: tuple[Peer, ...] = ("hf", "llama-cpp")
    precisions: tuple[Precision, ...] = ("float32", "bfloat16", "int8")
    prompt_tokens: int = 32
    new_tokens: int = 128
    exit_layer: int | None = None
    draft_length: int = 4
    repeats: int = 7
    scaling: bool = True
    first_token: bool = False
    compile: bool = True


def decode_benchmark(model: MoEDecoder, network: Network, settings: DecodeSettings) -> dict[str, Any]:
    """Time plain decoding of the float32 model at each precision, and what its peers do with the same weights.

    Returns {"benchmark", "unit", "groups": {precision: see `_group`}, "skipped": [{"peer", "precision", "reason"}]}.
    Raises ValueError for peers that are not installed, hf-early-exit without an exit layer, a prompt that does not fit
    the model, fewer than two new tokens.
    """
    check_peers(settings.peers)
    if "hf-early-exit" in settings.peers and settings.exit_layer is None:
        raise ValueError("hf-early-exit leaves the model early; give --exit-layer.")
    if settings.new_tokens < 2:
        raise ValueError(f"new_tokens={settings.new_tokens} must be 2 or more: the first is not timed.")
    prompt = random_tokens(settings.prompt_tokens, model.config.vocab_size, seed=network.seed)
    check_prompts([prompt], model.config, settings.new_tokens)
    if settings.exit_layer is not None:
        _speculation(settings).check(model.config)
    groups, skipped = {}, []
    for precision in settings.precisions:
        with tempfile.TemporaryDirectory() as folder:
            ready = at_precision(model, precision)
            runs = _our_runs(ready, prompt, settings)
            told: dict[str, Any] = {name: {"compile": settings.compile} for name in runs}
            for peer in settings.peers:
                reason = reason_to_skip(peer, model.config, precision, str(model.device))
                if reason is None:
                    _add_peer(runs, told, peer, model, network, prompt, precision, settings, Path(folder))
                else:
                    skipped.append({"peer": peer, "precision": precision, "reason": reason})
            groups[precision] = _group(ready, runs, told, precision, settings)
    return {"benchmark": "decode", "unit": "tokens/s", "groups": groups, "skipped": skipped}


def _speculation(settings: DecodeSettings) -> SelfSpeculative:
    assert settings.exit_layer is not None
    return SelfSpeculative(exit_layer=settings.exit_layer, draft_length=settings.draft_length)


def _our_runs(model: MoEDecoder, prompt: list[int], settings: DecodeSettings) -> dict[str, Callable[[], Any]]:
    plain = partial(ours.decode, model, prompt, settings.new_tokens, compile=settings.compile)
    runs: dict[str, Callable[[], Any]] = {OURS: plain}
    if settings.exit_layer is not None:
        name = f"{OURS}, {settings.draft_length} drafts of layer {settings.exit_layer}"
        runs[name] = partial(plain, strategy=_speculation(settings))
    return runs


def _add_peer(
    runs: dict[str, Callable[[], Any]],
    told: dict[str, Any],
    peer: Peer,
    model: MoEDecoder,
    network: Network,
    prompt: list[int],
    precision: Precision,
    settings: DecodeSettings,
    folder: Path,
) -> None:
    """Load a peer, and add its runs and what is told of its settings."""
    theirs, chosen = load_peer(peer, model, network, precision, len(prompt) + settings.new_tokens, folder)
    if peer == "llama-cpp":
        runs[peer] = partial(peer_llama_cpp.decode, theirs, prompt, settings.new_tokens)
        told[peer] = chosen
        return
    decode = partial(peer_transformers.decode, theirs, prompt, settings.new_tokens)
    variants: dict[str, dict[str, Any]] = {peer: {}}
    if peer == "hf-early-exit":
        own = {"assistant_early_exit": settings.exit_layer}
        length = {"num_assistant_tokens": settings.draft_length, "num_assistant_tokens_schedule": "constant"}
        variants = {peer: own, f"{peer}, {settings.draft_length} drafts": own | length}
    for name, drafting in variants.items():
        runs[name] = partial(decode, **drafting)
        told[name] = chosen | drafting


def _group(
    model: MoEDecoder,
    runs: dict[str, Callable[[], Any]],
    told: dict[str, Any],
    precision: Precision,
    settings: DecodeSettings,
) -> dict[str, Any]:
    """Time all runs of one precision.

    Returns {"rows": [{"name", "value": summary of tokens/s, "ours_over_this": summary of ratios within a repeat,
    "tokens", "equal": leading tokens that are ours, "share_of_floor", "settings"}], "floor": {"weight_bytes",
    "cache_bytes": of a token on average, "tokens_per_second"}, "roofline"}.
    """
    results = interleave(runs | roofline_runs(model.device), settings.repeats, describe=f"decoding, {precision}")
    decoded: dict[str, list[Decoded]] = {name: results[name] for name in runs}
    speeds = {name: [run.tokens_per_second for run in each] for name, each in decoded.items()}
    ours_tokens = decoded[OURS][0].tokens
    cache = cache_bytes(model, settings.prompt_tokens + (settings.new_tokens + 1) / 2)
    weights = weight_bytes(model)[1]
    floor = max(results[READ]) / (weights + cache)
    rows = []
    for name, each in decoded.items():
        for run in each:  # another amount of work would be another benchmark
            assert len(run.tokens) == settings.new_tokens, f"{name} gave {len(run.tokens)} tokens"
        rows.append(
            {
                "name": name,
                "value": summary(speeds[name]),
                "ours_over_this": ratio(speeds[OURS], speeds[name]),
                "tokens": settings.new_tokens,
                "equal": min(_equal(ours_tokens, run.tokens) for run in each),
                "share_of_floor": median(speeds[name]) / floor,
                "settings": told[name],
            }
        )
    return {
        "rows": rows,
        "floor": {"weight_bytes": weights, "cache_bytes": cache, "tokens_per_second": floor},
        "roofline": describe_roofline(results),
    }


def _equal(ours_tokens: list[int], tokens: list[int]) -> int:
    """How many leading tokens are the same."""
    difference = first_difference(ours_tokens, tokens)
    return len(ours_tokens) if difference is None else difference
