"""Training the probes by which an exit says how sure it is (CALM's meta classifier, arXiv 2207.07061, section 3.5).

L layers, D width, N positions. The network is frozen; each probe learns, on its own layer's states, whether that
layer's most likely token is the last layer's.
Next: `generation/exit_classifier.py`, what comes out.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from layerskip_moe.analysis.exit_states import exit_states
from layerskip_moe.analysis.held_out import chunks
from layerskip_moe.generation.exit_classifier import ExitClassifier, probe_input
from layerskip_moe.nn import MoEDecoder
from layerskip_moe.nn.modes import evaluating

_PENALTY = 1e-3  # of a probe's squared length: keeps it finite where a layer always agrees, or the states are few


def train_classifier(
    model: MoEDecoder, texts: Sequence[Sequence[int]], *, batch_size: int = 16, progress: bool = True
) -> ExitClassifier:
    """Fit the probes of exit layers 1..L-1 on texts, token ids, each of 2 or more; every position counts.

    Class-balanced cross entropy of 1[argmax_n = argmax_L]: positions where a layer agrees, and those where it does not,
    weigh the same in sum. The problem is convex and solved whole (L-BFGS), so there is neither a seed nor a learning
    rate. The states of all positions are held: 4 N D (L - 1) bytes. Raises ValueError for texts of fewer than 2 tokens
    and a model of one layer.
    """
    if not texts or min(map(len, texts)) < 2:
        raise ValueError("every text must have 2 tokens or more: a classifier is trained on what follows the first.")
    if model.config.n_layers < 2:
        raise ValueError("a model of one layer has no exit before its last; there is nothing to train.")
    inputs: list[list[Tensor]] = []  # by batch, by layer: [N, D]
    agrees: list[Tensor] = []  # [L - 1, N]
    firsts, rests = [text[:1] for text in texts], [text[1:] for text in texts]
    batches = exit_states(
        model, firsts, rests, batch_size=batch_size, progress=progress, description="collecting states"
    )
    for states, _ in batches:
        with evaluating(model):
            for hidden in chunks(model, *states[1:]):
                choice = torch.stack([model.unembed(state).argmax(dim=-1) for state in hidden])
                agrees.append((choice[:-1] == choice[-1]).cpu())
                inputs.append([probe_input(state).cpu() for state in hidden[:-1]])
    agree = torch.cat(agrees, dim=1)
    probes = [_fit(torch.cat([batch[n] for batch in inputs]), agree[n]) for n in range(len(agree))]
    weights, biases = zip(*probes, strict=True)
    return ExitClassifier(torch.stack(weights), torch.stack(biases))


@torch.inference_mode(False)
@torch.enable_grad()
def _fit(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Logistic regression of y [N] bool on x [N, D], both classes of equal weight: (weight [D], bias [])."""
    x, positives = x.clone(), int(y.sum())  # a clone, because inference tensors have no gradients
    weighs = torch.where(y, 0.5 / max(positives, 1), 0.5 / max(len(y) - positives, 1)).clone()
    target = y.float().clone()
    weight, bias = torch.zeros(x.shape[1], requires_grad=True), torch.zeros((), requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        losses = F.binary_cross_entropy_with_logits(x @ weight + bias, target, weight=weighs, reduction="sum")
        loss = losses + 0.5 * _PENALTY * (weight.square().sum() + bias.square())
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach(), bias.detach()
