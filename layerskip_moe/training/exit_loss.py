"""The early-exit loss: which exits a step supervises, how much each weighs, and the loss itself.

LayerSkip (arXiv 2404.16710, section 4.1): one norm and head serve every layer's output,
    J = sum_l w_l CE(head(norm(h_l)), target),   w_l = C(t,l) e(l) / sum_i C(t,i) e(i),
with the curriculum C in `active_exits`, the weights in `exit_weights` and J in `exit_loss`. Curricula are
pure functions of the step, so a resumed run supervises what the uninterrupted one would have.

B batch, T positions, D width, V vocabulary, L layers, N = B T rows.
Knows nothing of optimizers, nor of how the hidden states came about. Next: `losses.py`, which adds the losses
of `balance.py`.
"""

from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from layerskip_moe.nn.decoder import MoEDecoder

IGNORED = -100  # the label of a position without a target, as in torch's cross_entropy

Curriculum = Literal["rotational", "gradual", "all", "none"]
WeightKind = Literal["paper", "equal", "drafting"]


class ExitLosses(NamedTuple):
    """What `exit_loss` returns. Everything but `total` is detached, in nats per token, for the logs."""

    total: Tensor  # scalar, weighted, the one to call backward on
    cross_entropy: dict[int, Tensor]  # layer -> CE against the labels, unweighted
    distillation: dict[int, Tensor]  # early exit -> CE against the last layer's distribution; {} without it


def active_exits(
    step: int,
    max_steps: int,
    n_layers: int,
    *,
    curriculum: Curriculum = "rotational",
    rotation: int = 1,
    kind: WeightKind = "paper",
    drafting_exit: int | None = None,
) -> Tensor:
    """Which layers' outputs are supervised at a step, C(t, l): bool [L]. The last layer always is.

    curriculum: "rotational" every `rotation`-th layer, moved up by one each step, so each layer has its turn
        exactly once in any `rotation` consecutive steps; "gradual" from the last layer down to the first, one
        more every T / (2L) steps; "all"; "none", the last layer only.
    step: 0 .. max_steps - 1. rotation: 1 or more (R in the paper); only "rotational" reads it.
    kind, drafting_exit: as in `exit_weights`; "drafting" has its exit supervised at every step of any curriculum but
        "none": to concentrate on an exit is not to wait for its turn.
    torchtune's rotation agrees where R divides L (elsewhere it wraps at L, and gaps of another size
    appear); its gradual curriculum enables each layer one T / (2L) later than the paper says.
    Raises ValueError for an unknown curriculum, a step or rotation out of range, or a drafting exit that is none.
    """
    if n_layers < 1 or not 0 <= step < max_steps:
        raise ValueError(
            f"a curriculum needs n_layers >= 1 and 0 <= step < max_steps, "
            f"got n_layers={n_layers}, step={step}, max_steps={max_steps}"
        )
    if rotation < 1:
        raise ValueError(f"rotation must be 1 (every layer at every step) or more, got {rotation}")
    layers = torch.arange(n_layers)
    if curriculum == "rotational":
        active = (layers - step) % rotation == 0
    elif curriculum == "gradual":
        active = 2 * n_layers * step >= (n_layers - 1 - layers) * max_steps  # in integers: no rounding
    elif curriculum in ("all", "none"):
        active = torch.full((n_layers,), curriculum == "all")
    else:
        raise ValueError(f"unknown exit curriculum {curriculum!r}: choose one of {', '.join(get_args(Curriculum))}")
    if kind == "drafting" and curriculum != "none":
        active[_drafting_layer(n_layers, drafting_exit)] = True
    active[-1] = True
    return active


def exit_weights(
    active: Tensor, *, kind: WeightKind = "paper", scale: float = 1.0, drafting_exit: int | None = None
) -> Tensor:
    """How much each exit's loss weighs, normalised over the active exits: float64 [L], sum 1.

    active [L], bool: from `active_exits`; its last entry must be True.
    kind: "paper"  e(l) = scale * l(l+1)/2 for l < L-1, e(L-1) = L-1 + scale * (L-2)(L-1)/2, which leaves the
                   first layer's output unsupervised: e(0) = 0;
          "equal"  scale for each early exit, 2 for the last layer;
          "drafting"  scale for the one exit that is to draft, 2 for the last layer, 0 for the others, which then
                   cost no logits: e(n-1) = scale with n = drafting_exit.
    scale: 0 or more (e_scale in the paper, which takes 0.1 to 1.0); 0 leaves only the last layer.
    drafting_exit: n, 1 to L-1, how many layers draft; None: `usual_drafting_exit`. Only "drafting" reads it.
    A network of one layer has weight 1. The ratio of two exits' weights does not depend on which others are
    active; in torchtune's `sum_l_loss_scale` it does, since that accumulates over the active layers, counts
    them from 1, and has no L-1 term. Its `uniform_loss_scale(e_scale=s)` is "equal" with scale = 2s.
    Raises ValueError for an unknown kind, a negative scale, a drafting exit that is none, or a last layer that is
    not active.
    """
    n_layers = len(active)
    if n_layers == 0 or not bool(active[-1]):
        raise ValueError("the last layer must be among the active exits, for it is the model's own output")
    if not scale >= 0:
        raise ValueError(f"the exit loss scale must be 0 or more, got {scale}")
    layers = torch.arange(n_layers, dtype=torch.float64)
    if kind == "paper":
        weights = scale * layers * (layers + 1) / 2
        # max: with one layer L-1 is 0, and any weight of its own normalises to 1.
        weights[-1] = max(n_layers - 1, 1) + scale * (n_layers - 2) * (n_layers - 1) / 2
    elif kind == "equal":
        weights = torch.full_like(layers, scale)
        weights[-1] = 2.0
    elif kind == "drafting":
        weights = torch.zeros_like(layers)
        weights[_drafting_layer(n_layers, drafting_exit)] = scale
        weights[-1] = 2.0
    else:
        raise ValueError(f"unknown exit weights {kind!r}: choose one of {', '.join(get_args(WeightKind))}")
    weights = weights * active.cpu()
    return weights / weights.sum()


def usual_drafting_exit(n_layers: int) -> int:
    """The exit layer that is to draft where none is named: a quarter of the layers, rounded up."""
    return -(-n_layers // 4)


def _drafting_layer(n_layers: int, drafting_exit: int | None) -> int:
    """The layer, 0 to L-1, whose output is the drafting exit."""
    if drafting_exit is not None and not 1 <= drafting_exit < n_layers:
        raise ValueError(
            f"drafting_exit={drafting_exit} must be an early exit, 1 to {n_layers - 1} of {n_layers} layers."
        )
    return (drafting_exit or usual_drafting_exit(n_layers)) - 1


def exit_loss(
    model: MoEDecoder,
    collected: dict[int, Tensor],
    labels: Tensor,
    weights: Tensor,
    *,
    distillation: float = 0.0,
    chunk_rows: int = 1024,
) -> ExitLosses:
    """The weighted loss over the exits of one batch, J = sum_l w_l CE(unembed(h_l), target).

    collected: layer -> its output [B, T, D], as `MoEDecoder.run(collect=...)` gives it, for at least every
        layer with a non-zero weight; others are not looked at.
    labels [B, T]: the token that follows each position; -100 where there is none. Each CE is the mean over
        the positions that have one (0 for a batch without any).
    weights [L]: from `exit_weights`.
    distillation: a, 0 to 1. An early exit's loss is (1-a) CE(labels) + a CE(q), with q the last layer's own
        distribution, a constant to the gradient; the last layer always learns from the labels alone.
    chunk_rows: how many positions are unembedded at a time, one exit after the other. Memory for logits is
        chunk_rows * V numbers, a few times over, however many exits and positions there are.
    Differentiable once, through `total` only. Under autocast the matrix products run in its type, softmax and
    sums in float32.
    Raises ValueError for a missing exit, shapes that do not fit, or a parameter out of range.
    """
    last = len(weights) - 1
    exit_weight = {layer: weight for layer, weight in enumerate(weights.tolist()) if weight > 0}
    missing = sorted((exit_weight.keys() | {last}) - collected.keys())
    if missing or last not in exit_weight:
        raise ValueError(
            f"every exit with a weight must be collected, and the last layer ({last}) must have one: "
            f"weights are on {list(exit_weight)}, collected are {sorted(collected)}"
        )
    wrong = [layer for layer in exit_weight if collected[layer].shape[:2] != labels.shape]
    if wrong:
        raise ValueError(
            f"labels {tuple(labels.shape)} must be [B, T] like the hidden states [B, T, D], "
            f"but layer {wrong[0]}'s are {tuple(collected[wrong[0]].shape)}"
        )
    if not 0.0 <= distillation <= 1.0 or chunk_rows < 1:
        raise ValueError(
            "distillation is a share between 0 and 1 and chunk_rows is at least 1, "
            f"got distillation={distillation}, chunk_rows={chunk_rows}"
        )
    normed = [model.norm(collected[layer]).flatten(0, 1) for layer in exit_weight]
    total, cross_entropy, distilled = _ChunkedExitLoss.apply(
        model.head_weight,
        labels.flatten(),
        list(exit_weight.values()),
        distillation,
        chunk_rows,
        torch.is_grad_enabled(),
        *normed,
    )
    early = list(exit_weight)[:-1] if distillation > 0 else []
    return ExitLosses(
        total,
        dict(zip(exit_weight, cross_entropy, strict=True)),
        {layer: distilled[i] for i, layer in enumerate(early)},
    )


class _ChunkedExitLoss(torch.autograd.Function):
    """sum_i w_i L_i over exits whose logits are never all alive: gradients are taken while a chunk's are.

    forward gives (total, CE [exits], distillation CE [exits]); of these only total is differentiable.

    Chosen by measurement over `torch.utils.checkpoint`, which computes every logit twice. Forward and
    backward of N=2048, D=192, V=2048, 8 exits in float32 on one thread of a 2-core AMD EPYC: an earlier form of this
    0.7 s, checkpointing 1.1 s, stacked logits 1.8 s; rows per chunk from 256 to 2048 made no difference beyond the
    noise. The fused softmax and the buffers took a quarter off that at N=1024, D=128, V=2048; compiled, the same
    arithmetic was slower than PyTorch's softmax.
    """

    @staticmethod
    def forward(
        ctx: Any,
        head_weight: Tensor,  # [V, D]
        labels: Tensor,  # [N]
        weights: list[float],
        distillation: float,
        chunk_rows: int,
        needs_grad: bool,
        *hidden: Tensor,  # one [N, D] per exit, after the norm, the last layer's at the end
    ) -> tuple[Tensor, Tensor, Tensor]:
        device, dtype = hidden[0].device, hidden[0].dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        wide = torch.promote_types(dtype, torch.float32)
        head = head_weight.to(dtype)
        last = len(hidden) - 1
        mix = [distillation] * last + [0.0]
        cross_entropy = torch.zeros(len(hidden), dtype=wide, device=device)
        distilled = torch.zeros_like(cross_entropy)
        # The factor 1/tokens (and, for hidden states, the exit's weight) waits for backward, where the scale
        # of a GradScaler comes in: in float16 it would underflow before that scale could save it.
        grad_head = torch.zeros_like(head, dtype=wide) if needs_grad else None
        grad_hidden = [torch.empty_like(h, dtype=dtype) for h in hidden] if needs_grad else []

        # Everything as wide as the vocabulary is written into the same few buffers: fresh memory costs page faults.
        chunk = (min(chunk_rows, len(labels)), len(head))
        logits_buffer, grad_buffer = head.new_empty(chunk), head.new_empty(chunk, dtype=wide)
        head_buffer = torch.empty_like(head) if needs_grad else None

        for start in range(0, len(labels), chunk_rows):
            rows = slice(start, min(start + chunk_rows, len(labels)))
            n = rows.stop - start
            ignored = (labels[rows] == IGNORED)[:, None]
            target = labels[rows, None].masked_fill(ignored, 0)
            teacher = None
            for i in reversed(range(len(hidden))):  # the last layer first, for it is the teacher
                x = hidden[i][rows].to(dtype)
                logits = torch.mm(x, head.T, out=logits_buffer[:n])
                # One fused softmax has all the exponentials; its largest value is exp(max - log_sum).
                grad = torch.softmax(logits, -1, dtype=wide, out=grad_buffer[:n])
                log_sum = logits.amax(-1, keepdim=True).to(wide) - grad.amax(-1, keepdim=True).log()
                cross_entropy[i] += (log_sum - logits.gather(1, target)).masked_fill(ignored, 0).sum()
                if teacher is not None:
                    soft = log_sum - (teacher * logits).sum(
                        -1, keepdim=True
                    )  # (vecdot would be rounded under autocast)
                    distilled[i] += soft.masked_fill(ignored, 0).sum()
                if i == last and distillation > 0:
                    teacher = grad.clone()
                if grad_head is None or head_buffer is None:
                    continue
                # d CE / d logits = softmax - target distribution
                grad.scatter_add_(1, target, torch.full_like(target, mix[i] - 1.0, dtype=wide))
                if teacher is not None and mix[i] > 0:
                    grad.sub_(teacher, alpha=mix[i])
                small = grad if dtype == wide else logits.copy_(grad)
                # Positions without a target are left out of the narrow operands, not of the V wide gradient.
                torch.mm(small, head, out=grad_hidden[i][rows])
                grad_hidden[i][rows].masked_fill_(ignored, 0)
                grad_head.add_(torch.mm(small.T, x.masked_fill(ignored, 0), out=head_buffer), alpha=weights[i])

        tokens = (labels != IGNORED).sum().clamp(min=1)
        cross_entropy /= tokens
        distilled /= tokens
        weight, share = cross_entropy.new_tensor(weights), cross_entropy.new_tensor(mix)
        total = (weight * ((1 - share) * cross_entropy + share * distilled)).sum()
        if grad_head is not None:
            ctx.save_for_backward(tokens, grad_head, *grad_hidden)
        ctx.weights = weights
        ctx.dtypes = (head_weight.dtype, hidden[0].dtype)
        ctx.mark_non_differentiable(cross_entropy, distilled)
        return total, cross_entropy, distilled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        tokens, grad_head, *grad_hidden = ctx.saved_tensors
        head_dtype, hidden_dtype = ctx.dtypes
        factor = grad_total / tokens
        hidden = [(factor * w * g).to(hidden_dtype) for w, g in zip(ctx.weights, grad_hidden, strict=True)]
        return ((factor * grad_head).to(head_dtype), None, None, None, None, None, *hidden)
