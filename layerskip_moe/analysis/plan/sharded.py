"""Bytes of what is whole on a processor while several train together: gathered blocks, gradients to be scattered.

As FSDP2 does it (`training/sharding.py`): a block's matrices come in one flat tensor, are laid out anew, and let go of
after use; before a layer's backward pass the block under it is sent for; a layer's gradients are laid out in one flat
tensor, in float32, which is kept until the next layer's are. Embedding, head, norms and routers are whole from the
beginning of a pass to its end, and so are their gradients. Gloo, the CPUs' library, copies what it gathers and reduces.

Knows nothing of activations. Next: `training.py`, which adds it up over a step.
"""

from layerskip_moe.analysis.plan.activations import WIDE, Numbers
from layerskip_moe.analysis.plan.counts import Parameters
from layerskip_moe.nn import ModelConfig
from layerskip_moe.training import TrainConfig

# Bytes that torchao's 8-bit AdamW takes, where it is not compiled, for each number of the parameter that it is at:
# means and weight in float32, and places in its table, of 8 bytes, several times over. (Measured.)
_EIGHT_BIT_STEP = 53


class Sharded:
    """Of one of `gpus` processors; all 0 where there is one.

    in_exit_loss, at_the_end (of the backward pass), in_optimizer (its step): at that moment
    """

    def __init__(self, config: ModelConfig, train: TrainConfig, how: Numbers, counted: Parameters, gpus: int) -> None:
        several, layers = gpus > 1, range(config.n_layers)
        self._copied = 1 if how.gpu else 2  # what the library copies, and the copy
        numbers = [(counted.products[layer] - _elsewhere(config, layer, train)) * several for layer in layers]
        self._blocks = [count * how.narrow for count in numbers]  # gathered, and so their gradients at first
        self._scattered = [count * WIDE for count in numbers]
        rest = (counted.total - sum(counted.products)) * WIDE * several
        self._always = rest + (counted.head or counted.embedding) * WIDE * several  # and the head's gradient
        self.in_exit_loss = rest + self._blocks[-1]
        self.at_the_end = rest + max(self._scattered[0] + rest, self._copied * rest)
        largest = max(config.vocab_size, 2 * config.expert_d_ff * max(config.num_experts, 1)) * config.d_model
        eager = several and train.optimizer == "adamw8bit"
        self.in_optimizer = _EIGHT_BIT_STEP * largest // gpus if eager else 0

    def in_layer(self, layer: int) -> int:
        """In the layer's backward pass, when half of its gradients are made."""
        return self._always + self._blocks[layer] * 3 // 2 + self._next(layer) + self._last_scattered(layer)

    def between_layers(self, layer: int) -> int:
        """When the block under it is sent for, or the layer's gradients are scattered."""
        sending = self._blocks[layer] + self._copied * self._next(layer) + self._last_scattered(layer)
        scattering = self._blocks[layer] + self._next(layer) + self._copied * self._scattered[layer]
        return self._always + max(sending, scattering)

    def _next(self, layer: int) -> int:
        return self._blocks[layer - 1] if layer > 0 else 0

    def _last_scattered(self, layer: int) -> int:
        return self._scattered[layer + 1] if layer + 1 < len(self._scattered) else 0


def _elsewhere(config: ModelConfig, layer: int, train: TrainConfig) -> int:
    """Of a layer's parameters, those of experts that other processors hold, with expert parallelism."""
    experts = 3 * config.num_experts * config.d_model * config.expert_d_ff if config.is_moe(layer) else 0
    return experts - experts // train.expert_parallel
