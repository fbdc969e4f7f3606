"""Steps whose loss or gradient is not finite: how many were skipped, and where in the network it began.

Knows nothing of optimizers. (Gradients past float16's range are another matter, the loss scaler's.) Next: `run.py`.
"""

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from layerskip_moe.nn import MoEDecoder
from layerskip_moe.nn.router import Router
from layerskip_moe.training.parallel import Ranks
from layerskip_moe.training.sharding import local_part


@dataclass
class Skips:
    """Steps that were skipped because their loss or gradient was not finite.

    Attributes:
        count: in the whole run
        in_a_row: the last so many steps
        first: what was not finite at the first of those, in words
    """

    count: int = 0
    in_a_row: int = 0
    first: str = ""

    def skip(self, what: str) -> None:
        """Count one more, in which `what` was not finite."""
        self.first = self.first if self.in_a_row else what
        self.count, self.in_a_row = self.count + 1, self.in_a_row + 1

    def told(self, step: int, where: str) -> str:
        """Why the run stops at `step`, the last of those in a row."""
        began, more = step + 1 - self.in_a_row, self.in_a_row - 1
        others = f", and {more} more in a row" if more else ""
        return (
            f"{self.first} at step {began}{others}; it began in {where}. The weights are as they were before; begin "
            "anew in another out_dir, with a lower learning_rate or more warmup_steps."
        )


def where_it_began(model: MoEDecoder, losses: Iterator[Tensor], ranks: Ranks) -> str:
    """In which layer a step's numbers stop being finite: in the first part of the network whose output is not, or, if
    all outputs are, in the last whose gradient is not; on any of the ranks.

    losses: of the step's batches, each computed when it is asked for. Gradients are cleared.
    """
    broken: list[tuple[int, str]] = []  # the how manieth call it was, which is the same on every rank, and of what
    calls = itertools.count()

    def look(name: str, module: nn.Module, arguments: Any, output: Any) -> None:
        call, first = next(calls), output[0] if isinstance(output, tuple) else output
        if isinstance(first, Tensor) and not first.isfinite().all():
            broken.append((call, name))

    # A router's output has -inf for experts that sit the step out.
    watched = {name: module for name, module in model.named_modules() if name and not isinstance(module, Router)}
    hooks = [module.register_forward_hook(partial(look, name)) for name, module in watched.items()]
    try:
        for loss in losses:
            finite = all(ranks.everyones(bool(loss.isfinite())))
            if finite:
                loss.backward()
            gradients = enumerate(local_part(p.grad) for p in model.parameters() if p.grad is not None)
            bad = [index for index, gradient in gradients if not gradient.isfinite().all()]
            outputs = [of for rank in ranks.everyones(broken[:1]) for of in rank]
            last_bad = max(index for rank in ranks.everyones(bad[-1:]) for index in (-1, *rank))
            if outputs and (last_bad >= 0 or not finite):
                return f"the output of {_told(min(outputs)[1])}"
            if not finite:
                return "the loss, after outputs that are all finite"
            if last_bad >= 0:
                names = [name for name, p in model.named_parameters() if p.grad is not None]
                return f"the gradient of {_told(names[last_bad])}"
            broken.clear()
        return "a place unknown, for the same step computed again is finite"
    finally:
        for hook in hooks:
            hook.remove()
        model.zero_grad(set_to_none=True)


def _told(name: str) -> str:
    layer = re.match(r"blocks\.(\d+)\b", name)
    return f"layer {layer[1]} ({name})" if layer else name
