"""Training or evaluation mode for a while, and every module's own mode back afterwards.

A module's mode is seen by all threads. Those that want the same one at the same time share it: the first sets it, and
the last to leave puts back what the first found. Of those that want different ones the latest has its way, and who
leaves before it leaves to it what is to be put back.

Knows nothing of what is done meanwhile. Used by training, generation and analysis.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import nn


@dataclass(eq=False)
class _Shared:
    """A mode that `users` are in at this moment, and what each module's own was."""

    training: bool
    own: list[tuple[nn.Module, bool]]
    users: int = 1


_changing = threading.Lock()
_shared: "WeakKeyDictionary[nn.Module, list[_Shared]]" = WeakKeyDictionary()  # by model, the innermost last


@contextmanager
def in_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """The whole model in one mode; each module gets its own back at the end, also after an error."""
    with _changing:
        within = _shared.setdefault(model, [])
        modes = [(module, module.training) for module in model.modules()]
        if within and within[-1].training == training and all(mode == training for _, mode in modes):
            shared = within[-1]
            shared.users += 1
        else:
            shared = _Shared(training, modes)
            within.append(shared)
            model.train(training)
    try:
        yield
    finally:
        with _changing:
            shared.users -= 1
            if shared.users == 0:
                place = within.index(shared)
                del within[place]
                if place < len(within):  # another mode was entered since, and not left
                    within[place].own = shared.own
                else:
                    for module, own in shared.own:
                        module.training = own


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; see `in_mode`."""
    with in_mode(model, training=False), torch.inference_mode():
        yield
