"""Training or evaluation mode for a while, and every module's own mode back afterwards.

Knows nothing of what is done meanwhile. Used by training, generation and analysis.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def in_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """The whole model in one mode; each module gets its own back at the end, also after an error."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.train(training)
        yield
    finally:
        for module, own in modes:
            module.training = own


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; see `in_mode`."""
    with in_mode(model, training=False), torch.inference_mode():
        yield
