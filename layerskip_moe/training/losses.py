"""What one forward pass of LayerSkip training computes: dropout drawn, layers run, losses added up.

Everything random is a pure function of (seed, step, sample), so the same step always gives the same losses.
Knows nothing of optimizers or files. Next: `exit_loss.py`, `layer_dropout.py`, `balance.py` for the
parts, `run.py` for what is done with the result.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from layerskip_moe.data import windows
from layerskip_moe.nn import MoEDecoder
from layerskip_moe.nn.modes import evaluating
from layerskip_moe.nn.router import Routing
from layerskip_moe.training.balance import counted_pairs, load_balance_loss, router_coherence_loss, router_z_loss
from layerskip_moe.training.config import TrainConfig
from layerskip_moe.training.exit_loss import IGNORED, active_exits, exit_loss, exit_weights
from layerskip_moe.training.expert_dropout import expert_mask
from layerskip_moe.training.layer_dropout import (
    BLOCK_STREAM,
    EXPERT_SUBLAYER_STREAM,
    layer_dropout_rates,
    layer_keep,
)
from layerskip_moe.training.parallel import Ranks
from layerskip_moe.training.step_timer import StepTimer


class Losses(NamedTuple):
    """The weighted total, and the raw parts to log (detached, in nats per token where they are entropies)."""

    total: Tensor  # scalar, the one to call backward on
    exits: dict[int, Tensor]  # exit layer (1..L) -> cross entropy, for this step's exits
    distillation: dict[int, Tensor]  # exit layer -> cross entropy against the last layer's distribution
    balance: Tensor  # mean over MoE layers; 1 when balanced
    router_z: Tensor  # mean over MoE layers
    load: dict[int, Tensor]  # MoE layer -> [E] choices per expert
    active_experts: Tensor | None  # [L, E] bool, on the CPU; None without expert dropout
    router_coherence: Tensor | None = None  # mean over MoE layers; None where it has no weight


def training_losses(
    model: MoEDecoder,
    inputs: Tensor,
    labels: Tensor,
    sample_ids: Tensor,
    config: TrainConfig,
    *,
    step: int,
    max_steps: int,
    timer: StepTimer | None = None,
    ranks: Ranks | None = None,
) -> Losses:
    """Losses of one batch at one step.

    inputs, labels [B, T]; sample_ids [B]: the samples' numbers across the whole run, which key layer dropout.
    step: 0 .. max_steps - 1, where the schedules and curricula stand.
    timer: is told the time of "forward" and of "exit loss": all losses, and the gradients that `exit_loss` takes
        of its logits on the way.
    ranks: the processes that the batch is split over, of which this one has equally many samples as each; the mean of
        their losses, and of the gradients, is the batch's. The load is that of the whole batch on every rank.
    """
    timer = timer or StepTimer(inputs.device)  # one that nobody reads
    n_layers = model.config.n_layers
    with timer.part("forward"):
        weights = step_exit_weights(config, n_layers, step, max_steps)
        keep, keep_experts, experts = _draw_dropout(model, sample_ids, config, step, max_steps)
        out = model.run(
            model.embed(inputs),
            range(n_layers),
            positions=torch.arange(inputs.shape[1], device=inputs.device).expand(inputs.shape),
            keep=keep,
            keep_experts=keep_experts,
            expert_mask=None if experts is None else experts.to(inputs.device),
            collect=[layer for layer in range(n_layers) if weights[layer] > 0],
        )
    with timer.part("exit loss"):
        exits = exit_loss(model, out.collected, labels, weights, distillation=config.exit_distillation)
        stayed = keep if keep is not None else keep_experts
        everyone = ranks or Ranks(0, 1, inputs.device)
        balance, router_z, coherence, load = _router_losses(model, out.routing, labels, stayed, config, everyone)
        total = exits.total + config.moe_loss_weight * balance + config.router_z_loss_weight * router_z
        if coherence is not None:
            total = total + config.router_coherence_weight * coherence
        return Losses(
            total=total,
            exits={layer + 1: loss for layer, loss in exits.cross_entropy.items()},
            distillation={layer + 1: loss for layer, loss in exits.distillation.items()},
            balance=balance.detach(),
            router_z=router_z.detach(),
            load=load,
            active_experts=experts,
            router_coherence=None if coherence is None else coherence.detach(),
        )


def step_exit_weights(config: TrainConfig, n_layers: int, step: int, max_steps: int) -> Tensor:
    """How much each layer's output weighs in the loss of a step: float64 [L], sum 1; see `exit_weights`."""
    active = active_exits(
        step,
        max_steps,
        n_layers,
        curriculum=config.exit_curriculum,
        rotation=config.exit_rotation,
        kind=config.exit_weights,
        drafting_exit=config.drafting_exit,
    )
    return exit_weights(
        active, kind=config.exit_weights, scale=config.exit_loss_scale, drafting_exit=config.drafting_exit
    )


def _router_losses(
    model: MoEDecoder,
    routing: Mapping[int, Routing],
    labels: Tensor,
    keep: Tensor | None,
    config: TrainConfig,
    ranks: Ranks,
) -> tuple[Tensor, Tensor, Tensor | None, dict[int, Tensor]]:
    """Balance, z and coherence loss (where it has a weight), means over the MoE layers that saw a token, and every MoE
    layer's load. keep [L, B]: the samples that each layer saw; None: all of them.

    One exchange tells the ranks what all of them saw. Each layer balances by itself: pooled, one layer's imbalance
    could cancel another's.
    """
    coheres = config.router_coherence_weight > 0
    counted = {
        layer: (labels if keep is None else labels[_places(keep[layer], labels.device)]) != IGNORED for layer in routing
    }
    layers = [layer for layer in range(model.config.n_layers) if model.config.is_moe(layer)]
    seen = torch.zeros(len(layers), model.config.num_experts + 1, dtype=torch.int64, device=labels.device)
    for counts, layer in zip(seen, layers, strict=True):
        if layer in routing:
            counts[:-1] = routing[layer].load
            counts[-1] = counted_pairs(counted[layer]).sum()
    seen = ranks.total(seen)
    n_seen = seen.any(dim=1).sum().clamp(min=1)
    balance = router_z = coherence = torch.zeros((), device=labels.device)
    for counts, layer in zip(seen / ranks.size, layers, strict=True):
        if layer in routing:
            logits, chosen, _ = routing[layer]
            balance = balance + load_balance_loss(logits, chosen, counts[:-1]) / n_seen
            router_z = router_z + router_z_loss(logits, counts[:-1].sum() / chosen.shape[1]) / n_seen
            if coheres:
                pairs = counts[-1].clamp(min=1 / ranks.size)
                coherence = coherence + router_coherence_loss(logits, counted[layer], pairs) / n_seen
    loads = {layer: counts[:-1] for counts, layer in zip(seen, layers, strict=True)}
    return balance, router_z, coherence if coheres else None, loads


def _places(mask: Tensor, device: torch.device) -> Tensor:
    """Where a mask on the CPU is True, on the device; a GPU need not tell the CPU how many there are."""
    return mask.nonzero()[:, 0].to(device)


def _draw_dropout(
    model: MoEDecoder, sample_ids: Tensor, config: TrainConfig, step: int, max_steps: int
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Who sits this batch out: `run`'s keep and keep_experts [L, B], and the active experts [L, E], all bool;
    None for what is not dropped."""
    n_layers = model.config.n_layers
    keep = keep_experts = experts = None
    if config.layer_dropout_max > 0:
        rates = layer_dropout_rates(
            step,
            max_steps,
            n_layers,
            p_max=config.layer_dropout_max,
            depth=config.layer_dropout_depth,
            time=config.layer_dropout_time,
        )
        whole = config.layer_dropout_part == "block"
        stream = BLOCK_STREAM if whole else EXPERT_SUBLAYER_STREAM
        drawn = layer_keep(rates, seed=config.seed, step=step, sample_ids=sample_ids, stream=stream)
        keep, keep_experts = (drawn, None) if whole else (None, drawn)
    if config.expert_dropout > 0 and model.config.num_experts:
        experts = expert_mask(
            config.expert_dropout,
            model.config.num_experts,
            model.config.top_k,
            seed=config.seed,
            step=step,
            layers=range(n_layers),
        )
    return keep, keep_experts, experts


def step_losses(parts: Sequence[Losses]) -> Losses:
    """What a step's batches, all of one size, say together: means of their losses (detached), sums of their
    loads. Their exits and active experts are the same, being functions of the step."""

    def mean(values: Iterable[Tensor]) -> Tensor:
        return torch.stack([value.detach() for value in values]).mean()

    load: dict[int, Tensor] = {}
    for part in parts:  # a layer that dropped a whole batch has no load there
        for layer, counts in part.load.items():
            load[layer] = load[layer] + counts if layer in load else counts
    first = parts[0]
    return Losses(
        total=mean(part.total for part in parts),
        exits={layer: mean(part.exits[layer] for part in parts) for layer in first.exits},
        distillation={layer: mean(part.distillation[layer] for part in parts) for layer in first.distillation},
        balance=mean(part.balance for part in parts),
        router_z=mean(part.router_z for part in parts),
        load=load,
        active_experts=first.active_experts,
        router_coherence=None
        if first.router_coherence is None
        else mean(part.router_coherence for part in parts if part.router_coherence is not None),
    )


def mean_over_ranks(losses: Losses, ranks: Ranks) -> Losses:
    """A step's losses as the whole batch has them, detached; the same on every rank."""
    if ranks.size == 1:
        return losses
    coherence = [] if losses.router_coherence is None else [losses.router_coherence]
    own = [losses.total, losses.balance, losses.router_z, *coherence, *losses.exits.values()]
    own += losses.distillation.values()
    means = iter(ranks.mean(torch.stack([value.detach().float() for value in own])))
    return losses._replace(
        total=next(means),
        balance=next(means),
        router_z=next(means),
        router_coherence=next(means) if coherence else None,
        exits={layer: next(means) for layer in losses.exits},
        distillation={layer: next(means) for layer in losses.distillation},
    )


def validation_losses(
    model: MoEDecoder, tokens: Tensor, config: TrainConfig, ranks: Ranks | None = None
) -> list[float]:
    """Cross entropy at every exit layer 1..L on held-out tokens (1-D), in nats per token, dropout off.

    The first config.validation_windows windows of seq_len tokens. The model's mode is put back.
    ranks: the processes that share the windows; one left without any takes part with none.
    """
    ranks = ranks or Ranks(0, 1, model.device)
    n_layers = model.config.n_layers
    equal = torch.full((n_layers,), 1.0 / n_layers, dtype=torch.float64)
    sums, count = torch.zeros(n_layers, dtype=torch.float64), 0
    with evaluating(model):
        for inputs, labels in windows(tokens, config.seq_len, config.batch_size, limit=config.validation_windows):
            share = -(-len(inputs) // ranks.size)
            mine = slice(ranks.rank * share, (ranks.rank + 1) * share)
            inputs, labels = inputs[mine].to(model.device), labels[mine].to(model.device)
            positions = torch.arange(inputs.shape[1], device=inputs.device).expand(inputs.shape)
            layers = range(n_layers)
            out = model.run(model.embed(inputs), layers, positions=positions, collect=layers)
            losses = exit_loss(model, out.collected, labels, equal).cross_entropy
            sums += torch.stack([losses[layer] for layer in layers]).double().cpu() * labels.numel()
            count += labels.numel()
    sums = ranks.total(torch.cat([sums, sums.new_tensor([count])]))
    return (sums[:-1] / sums[-1]).tolist()
