"""A run of few rows recorded once, and repeated without Python: what CUDA graphs are to a GPU.

A token passes some ten operators per layer, and calling these from Python takes as long as computing them. The first
run of some layers over N rows of a cache is made as always, its operators noting what they do to which memory; later
ones do that again, on new states at new positions, of as many rows or fewer. Nothing is compiled for it and no number
differs: the text may grow, and rows may come and go.

Weights changed in place are seen. A parameter put in another's place is not, by recordings of a cache that is used
on: then take a new cache, as `generate` does by itself (`generation/kept_caches.py`). Only this library's few-row
operators can be recorded: a run that needs another one, as a clamp or an expert mask is, is made as always every time.

Knows nothing of layers. Next: `steps.py`, which decides; `cpp/few_rows.cpp`, which notes and repeats.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from layerskip_moe.nn.ragged import MOST_PER_REPEATED, MOST_PROPOSED, MarginRule, Stage

_OURS = "layerskip_moe_few_rows"


class Recording:
    """One run, recorded while it is made for the first time. It can be repeated for other numbers of rows, up to
    `room`."""

    def __init__(self, run: Callable[[list[Tensor]], list[Tensor]], inputs: list[Tensor], *, room: int) -> None:
        """run: from inputs to outputs, whose first dimensions are rows, by few-row operators, a row's outputs from its
        own inputs and from what stands in buffers; the buffers it reads and writes besides must live on. It is made
        with `room` rows, by repeating the first of the inputs."""
        self.room, rows = room, len(inputs[0])
        own = [torch.cat([tensor, tensor[:1].expand(room - rows, *tensor.shape[1:])]) for tensor in inputs]
        self.number = torch.ops.layerskip_moe_few_rows.record(own, room)
        outputs: list[Tensor] = []
        try:
            with _OnlyOurs() as seen:
                outputs = [output.contiguous() for output in run(own)]
        finally:
            torch.ops.layerskip_moe_few_rows.recorded(outputs)
            self._forget = weakref.finalize(self, torch.ops.layerskip_moe_few_rows.forget, self.number)
        self.complete = seen.others == set()
        self._first: list[Tensor] | None = [output[:rows] for output in outputs]
        if not self.complete:
            self._forget()

    def take_first(self) -> list[Tensor]:
        """The outputs of the run that was recorded; once."""
        assert self._first is not None, "they were taken"
        outputs, self._first = [tensor.clone() for tensor in self._first], None
        return outputs

    def __call__(self, inputs: list[Tensor]) -> list[Tensor]:
        """The outputs for other inputs, of as many rows or others."""
        return torch.ops.layerskip_moe_few_rows.replay.default(self.number, inputs, len(inputs[0]))


def drafts_of(
    recordings: Sequence[Recording], newest: Tensor, rows: Tensor, positions: Tensor, noise: Tensor | None
) -> list[Tensor]:
    """Draft tokens one after another by two recordings, see `cpp/drafts.h`: drafts [A, n], and each of the states
    [A, n + 1, .]."""
    limits = torch.full((len(newest),), positions.shape[1] - 1)
    drafts, _, _, *states = torch.ops.layerskip_moe_few_rows.replay_drafts.default(
        *(recording.number for recording in recordings),
        *_dense(newest, rows, positions, noise),
        limits,
        None,
        0.0,
        None,
        True,
    )
    return [drafts, *states]


def round_of(
    recordings: Sequence[Recording],
    newest: Tensor,
    rows: Tensor,
    positions: Tensor,
    noise: Tensor | None,
    limits: Tensor,
    rule: MarginRule | None,
    looked_up: Tensor | None,
    stage: Stage | None,
    history: Tensor,
) -> list[Tensor]:
    """Draft by two recordings and verify by a third, which goes on from the draft's states or takes tokens, see
    `cpp/rounds.h`; looked_up [A, n]: drafts of rows that have some, and -1; with a fourth, of the layers that go on
    from proposals, draft in stages as `stage` says, after a text [.], see `cpp/staged.h`: the full model's tokens
    [A, n + 1], drafts [A, n], their margins [A, n], how many of each row's first limits [A] were kept and how many
    of these were right [A], what was done in stages [5], then states of drafting [A, n + 1, .] and of verification
    [N, .]."""
    halves, least = (None, 0.0) if rule is None else (torch.tensor(rule.halves, dtype=torch.float64), rule.least)
    states_of, choice_of, verify, *deepen = (recording.number for recording in recordings)
    return torch.ops.layerskip_moe_few_rows.replay_round.default(
        states_of,
        choice_of,
        verify,
        *_dense(newest, rows, positions, noise),
        limits,
        halves,
        least,
        looked_up,
        deepen[0] if deepen else 0,
        0.0 if stage is None else stage.sure,
        history,
        0 if stage is None else stage.lookup,
        0 if stage is None else stage.sure_lookup,
        MOST_PER_REPEATED,
        MOST_PROPOSED,
    )


def _dense(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


class _OnlyOurs(TorchDispatchMode):
    """Notes operators that compute something and are not this library's: a recording would leave them out."""

    def __init__(self) -> None:
        super().__init__()
        self.others: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != _OURS and not func.is_view and func is not torch.ops.aten._unsafe_view.default:
            self.others.add(str(func))
        return func(*args, **(kwargs or {}))
