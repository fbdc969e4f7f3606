"""Layer dropout: how often each layer is skipped at a step, and which samples skip it.

LayerSkip (arXiv 2404.16710, section 4.1): x_{l+1} = x_l + M f_l(x_l), with M = 0 for a fraction p_{l,t} of
the samples and no 1/(1-p) rescaling. The rates are a pure function of the step and the draws of (seed, step,
layer, sample), so a run comes out the same after a resume, on any number of ranks and however the samples are
split into batches.

Knows nothing of the network: `MoEDecoder.run(keep=...)` is what removes the dropped samples from the batch.
Next: `expert_dropout.py` does the same to experts.
"""

import torch
from torch import Tensor

from layerskip_moe.nn.noise import hash_uniform
from layerskip_moe.training.torchtune_parts import Scale, check_scale, scale

# Streams of draws. Whole blocks and expert sublayers use different ones, so that both kinds of dropout can be
# on at once without agreeing on whom to drop. (3 is taken, by `expert_dropout.py`.)
BLOCK_STREAM = 1
EXPERT_SUBLAYER_STREAM = 2


def layer_dropout_rates(
    step: int, max_steps: int, n_layers: int, *, p_max: float, depth: Scale = "exp", time: Scale = "exp"
) -> Tensor:
    """The dropout probability of every layer at one step, p_{l,t} = S(t) D(l) p_max: float64 [L].

    step: 0 .. max_steps - 1. p_max: the last layer's rate at the last step, 0 to 1.
    depth, time: the shapes of D(l) and S(t), from `torchtune_parts.SCALES`. With "exp" they are the paper's
        D(l) = exp(l ln2 / (L-1)) - 1 and S(t) = exp(t ln2 / (T-1)) - 1. The paper trains from scratch with
        time="exp", and continues or fine-tunes a trained model with time="uniform", S = 1.
    Where the formula divides zero by zero, the first index wins: a network of one layer has D = 0 (its only
    layer is never dropped) and a run of one step has S = 0, unless that shape is "uniform".
    Raises ValueError for a step outside the run, p_max outside [0, 1], or an unknown shape.
    """
    if n_layers < 1 or not 0 <= step < max_steps:
        raise ValueError(
            f"layer dropout needs n_layers >= 1 and 0 <= step < max_steps, "
            f"got n_layers={n_layers}, step={step}, max_steps={max_steps}"
        )
    if not 0.0 <= p_max <= 1.0:
        raise ValueError(f"p_max is a probability between 0 and 1, got {p_max}")
    check_scale(depth)
    check_scale(time)
    if p_max == 0.0:
        return torch.zeros(n_layers, dtype=torch.float64)  # without waiting for torchtune to import
    height = scale(time, max(max_steps - 1, 1), step)
    depths = [scale(depth, max(n_layers - 1, 1), layer) for layer in range(n_layers)]
    return p_max * height * torch.tensor(depths, dtype=torch.float64)


def layer_keep(rates: Tensor, *, seed: int, step: int, sample_ids: Tensor, stream: int = BLOCK_STREAM) -> Tensor:
    """Which samples each layer keeps: bool [L, B] on the CPU, True = the layer runs.

    rates [L]: dropout probabilities. seed, step: any integers. sample_ids [B]: integers that name the samples
    across the whole run (their position in the data's order, for instance), not within the batch.
    stream: BLOCK_STREAM for whole blocks, EXPERT_SUBLAYER_STREAM for the expert sublayer alone.
    Sample b is dropped at layer l when hash_uniform(seed, stream, step, l, sample_ids[b]) < rates[l]; no
    other sample has a say in it.
    Raises ValueError for rates outside [0, 1] or sample ids that are not integers.
    """
    rates = rates.detach().to("cpu", torch.float64)
    if rates.ndim != 1 or not bool(((rates >= 0) & (rates <= 1)).all()):
        raise ValueError(f"rates must be one probability between 0 and 1 per layer, got {rates.tolist()}")
    if sample_ids.ndim != 1 or sample_ids.is_floating_point():
        raise ValueError(
            f"sample_ids must be one integer per sample, got {sample_ids.dtype} of shape {tuple(sample_ids.shape)}"
        )
    layers = torch.arange(len(rates))[:, None]
    draws = hash_uniform(seed, stream, step, layers, sample_ids.cpu()[None, :])
    return draws >= rates[:, None]
