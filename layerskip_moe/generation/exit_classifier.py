"""ExitClassifier: a trained confidence, one linear probe on each layer's state (CALM's meta classifier, arXiv
2207.07061, section 3.5, which has one for all layers).

N states, D width, L layers. The probe of exit layer n tells how likely it is that layer n says what layer L will:
sigmoid(w_n x + b_n), x the state divided by its root mean square. That is CALM's softmax(linear(x))[1] of two classes.
It needs no head, so a layer that is asked and not left costs D products instead of D V.
Knows nothing of training. Next: `analysis/train_classifier.py`, which fits one; `confidence.py`.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from layerskip_moe.files import replacing
from layerskip_moe.nn import ModelConfig


@dataclass(frozen=True, eq=False)
class ExitClassifier:
    """Probes of exit layers 1..L-1; entry n - 1 belongs to layer n.

    Attributes:
        weight: [L - 1, D] float32
        bias: [L - 1] float32
    """

    weight: Tensor = field(repr=False)
    bias: Tensor = field(repr=False)

    def __post_init__(self) -> None:
        if self.weight.dim() != 2 or self.bias.shape != self.weight.shape[:1]:
            raise ValueError(
                f"the probes have weights {list(self.weight.shape)} and biases {list(self.bias.shape)}; they must be "
                "[L - 1, D] and [L - 1]."
            )

    def confidence(self, hidden: Tensor, layer: int) -> Tensor:
        """[N, D], states after the first `layer` layers -> [N], 0 to 1."""
        weight, bias = self.weight[layer - 1].to(hidden.device), self.bias[layer - 1].to(hidden.device)
        return torch.sigmoid(probe_input(hidden) @ weight + bias)

    def check(self, config: ModelConfig) -> None:
        """Raise ValueError for a model of another depth or width."""
        if self.weight.shape != (config.n_layers - 1, config.d_model):
            probes, width = self.weight.shape
            raise ValueError(
                f"the classifier was trained for {probes + 1} layers of width {width}, and the model has "
                f"{config.n_layers} of width {config.d_model}; train one on this model."
            )

    def save(self, path: str | Path) -> None:
        """Write the probes to a safetensors file, whole or not at all."""
        with replacing(Path(path)) as beside:
            save_file({"weight": self.weight.contiguous(), "bias": self.bias.contiguous()}, beside)


def probe_input(hidden: Tensor) -> Tensor:
    """[..., D] -> [..., D] float32: states grow from layer to layer, and a probe looks at their direction alone."""
    states = hidden.float()
    return states * torch.rsqrt(states.square().mean(dim=-1, keepdim=True) + 1e-6)


def load_classifier(path: str | Path) -> ExitClassifier:
    """What `ExitClassifier.save` wrote. Raises ValueError for a file that is missing or holds something else."""
    try:
        stored = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"'{path}' cannot be read as safetensors ({error}); calibrate again.") from None
    if stored.keys() != {"weight", "bias"}:
        raise ValueError(f"'{path}' holds {', '.join(sorted(stored))}, no classifier's weight and bias.")
    return ExitClassifier(stored["weight"].float(), stored["bias"].float())
