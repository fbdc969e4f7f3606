"""A training step on one batch: tokens per second, and the share of the matrix peak that they are.

Next: `ours.py`, `peer_transformers.py` (the steps), `tables.py` (how the result is told).
"""

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch

from layerskip_moe.bench import ours, peer_transformers
from layerskip_moe.bench.decode import OURS
from layerskip_moe.bench.interleave import interleave, ratio, summary
from layerskip_moe.bench.networks import Network, random_tokens
from layerskip_moe.bench.peers import Peer, check_peers, export_for_transformers, reason_to_skip
from layerskip_moe.bench.roofline import describe_roofline, roofline_runs
from layerskip_moe.nn import MoEDecoder
from layerskip_moe.training.config import TrainConfig
from layerskip_moe.training.optimizer import autocast_dtype, make_optimizer

FLOP_FORMULA = "6 x active parameters x tokens + 6 x L x H x head width x T x tokens"
_WARM_UP = 2  # the first step allocates AdamW's moments too


@dataclass(frozen=True)
class TrainSettings:
    """The batch, and how often.

    Attributes:
        peers: hf (transformers)
        batch_size: B, samples
        seq_len: T, tokens of each
        precision: of matrix products; auto: bfloat16 where the hardware has it, float16 on an older GPU, else float32
        repeats: timed steps of each
    """

    peers: tuple[Peer, ...] = ("hf",)
    batch_size: int = 16
    seq_len: int = 128
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    repeats: int = 5


def train_benchmark(model: MoEDecoder, network: Network, settings: TrainSettings) -> dict[str, Any]:
    """Time AdamW steps of the float32 model: ours with the last layer's loss alone and no dropout, which is
    transformers' work too, ours with the LayerSkip recipe, and transformers.

    The model itself stays as it is. Returns as `decode_benchmark`; a row has "name", "value" (tokens/s),
    "ours_over_this", "share_of_peak" (by FLOP_FORMULA, which counts the experts that are chosen, the head and causal
    attention's half; the recipe's dropped layers and further exits are not counted), "losses" and "settings". Raises
    ValueError for peers that are not installed or cannot train, and a sample longer than the model takes.
    """
    check_peers(settings.peers)
    if set(settings.peers) - {"hf"}:
        raise ValueError("only hf trains; leave the other peers out.")
    if settings.seq_len > model.config.max_seq_len:
        raise ValueError(f"seq_len={settings.seq_len} is longer than max_seq_len={model.config.max_seq_len}.")
    shape = settings.batch_size, settings.seq_len + 1
    drawn = random_tokens(shape[0] * shape[1], model.config.vocab_size, seed=network.seed)
    tokens = torch.tensor(drawn, device=model.device).view(shape)
    dtype = autocast_dtype(settings.precision, model.device)

    skipped: list[dict[str, str]] = []
    told: dict[str, Any] = {}
    runs: dict[str, Callable[[], tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for peer in settings.peers:
            reason = reason_to_skip(peer, model.config, "float32", str(model.device))
            if reason is not None:
                skipped.append({"peer": peer, "precision": settings.precision, "reason": reason})
                continue
            theirs = peer_transformers.load(
                export_for_transformers(model, Path(folder)), torch.float32, str(model.device)
            )
            runs[peer] = their_step(theirs, tokens, settings)
            told[peer] = peer_transformers.settings(theirs) | {"optimizer": "AdamW, fused"}
    plain, recipe = recipes(settings)
    total = settings.repeats + _WARM_UP
    runs = {
        OURS: our_step(copy.deepcopy(model), tokens, plain, total),
        f"{OURS}, recipe": our_step(copy.deepcopy(model), tokens, recipe, total),
        **runs,
    }

    results = interleave(
        runs | roofline_runs(model.device, dtype or torch.float32),
        settings.repeats,
        warm_up=_WARM_UP,
        describe="training steps",
    )
    for name in told:  # another loss would be another benchmark
        for (_, loss), (_, other) in zip(results[OURS], results[name], strict=True):
            assert abs(loss - other) < 0.05 * abs(other), f"our loss is {loss}, that of {name} {other}"
    work = tokens[:, 1:].numel()
    speeds = {name: [work / seconds for seconds, _ in results[name]] for name in runs}
    roofline = describe_roofline(results)
    flop = training_flop(model, settings.batch_size, settings.seq_len)
    rows = [
        {
            "name": name,
            "value": summary(speeds[name]),
            "ours_over_this": ratio(speeds[OURS], speeds[name]),
            "share_of_peak": median(speeds[name]) * flop / work / roofline["matrix peak"]["peak"],
            "losses": [loss for _, loss in results[name]],
            "settings": told.get(name, {}),
        }
        for name in runs
    ]
    group = {"rows": rows, "roofline": roofline, "flop": flop, "flop_formula": FLOP_FORMULA}
    name = "float32" if dtype is None else str(dtype).removeprefix("torch.")
    return {"benchmark": "train", "unit": "tokens/s", "groups": {name: group}, "skipped": skipped}


def recipes(settings: TrainSettings) -> tuple[TrainConfig, TrainConfig]:
    """The same work as transformers', and the LayerSkip recipe at its defaults."""
    recipe = TrainConfig(seq_len=settings.seq_len, batch_size=settings.batch_size, precision=settings.precision)
    plain = replace(
        recipe, exit_curriculum="none", layer_dropout_max=0.0, moe_loss_weight=0.0, router_z_loss_weight=0.0
    )
    return plain, recipe


def our_step(
    model: MoEDecoder, tokens: torch.Tensor, config: TrainConfig, max_steps: int
) -> Callable[[], tuple[float, float]]:
    """A run of a step on tokens [B, T + 1]; max_steps: how often it will be called. From call to call the schedules go
    from beginning to end, so that the median step has the middle's dropout."""
    optimizer, numbers = make_optimizer(model, config), count()
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def run() -> tuple[float, float]:
        step = next(numbers)
        return ours.training_step(model, optimizer, inputs, labels, config, step=step, max_steps=max_steps)

    return run


def their_step(model: Any, tokens: torch.Tensor, settings: TrainSettings) -> Callable[[], tuple[float, float]]:
    """A run of transformers' step, with our optimizer's settings."""
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=TrainConfig.learning_rate,
        betas=(TrainConfig.beta1, TrainConfig.beta2),
        weight_decay=TrainConfig.weight_decay,
        fused=True,
    )
    dtype = autocast_dtype(settings.precision, model.device)
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    return partial(peer_transformers.training_step, model, optimizer, inputs, labels, dtype)


def training_flop(model: MoEDecoder, batch_size: int, seq_len: int) -> float:
    """FLOP of a step by FLOP_FORMULA: 2 for a product and its sum, once forward and twice backward."""
    config = model.config
    embedding = 0 if config.tie_embeddings else model.embedding.weight.numel()
    active = model.parameter_counts()[1] - embedding
    attention = config.n_layers * config.n_heads * config.head_width * seq_len
    return 6.0 * (active + attention) * batch_size * seq_len
