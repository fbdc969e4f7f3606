"""Which exit layer, and how many tokens to draft: every pair timed beside plain decoding.

The setting that is fastest here should be stated on other prompts than these: among many settings the best owes
some of its lead to luck. Knows nothing of figures. Next: `decoding.py`, which times.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from layerskip_moe.bench.decoding import compare_decoding
from layerskip_moe.generation import Autoregressive, SelfSpeculative, Strategy
from layerskip_moe.nn import MoEDecoder


@dataclass(frozen=True)
class DraftingSweep:
    """Medians over prompts; rows are exit layers, columns draft lengths.

    Attributes:
        temperature: as in `generate`
        top_p: likewise
        prompts: how many
        max_new_tokens: of each
        exit_layers: the rows
        draft_lengths: the columns
        speed_up: over plain decoding of the same prompt
        acceptance_rate: accepted / drafted; nan where nothing was drafted
        identical: outputs that equal plain decoding's, of all settings together
        outputs: how many there are
        chosen: {exit_layer, draft_length} of the largest speed-up; of equal ones the first
        by_position: for each exit layer at the longest draft length {exit_layer, draft_length, drafted_by_position,
            accepted_by_position}, as in `StrategyResult`
    """

    temperature: float
    top_p: float | None
    prompts: int
    max_new_tokens: int
    exit_layers: list[int]
    draft_lengths: list[int]
    speed_up: list[list[float]]
    acceptance_rate: list[list[float]]
    identical: int
    outputs: int
    chosen: dict[str, int]
    by_position: list[dict[str, Any]]

    def as_report(self) -> dict[str, Any]:
        """The `sweep` of a report."""
        return asdict(self)


def sweep_drafting(
    model: MoEDecoder,
    prompts: Sequence[Sequence[int]],
    *,
    exit_layers: Sequence[int],
    draft_lengths: Sequence[int],
    max_new_tokens: int = 48,
    temperature: float = 0.0,
    top_p: float | None = None,
    seed: int = 0,
    progress: bool = True,
) -> DraftingSweep:
    """Time self-speculative decoding at every pair of exit layer and draft length, as `compare_decoding` does and
    with its errors. Raises ValueError without exit layers or draft lengths."""
    exit_layers, draft_lengths = sorted(set(exit_layers)), sorted(set(draft_lengths))
    if not exit_layers or not draft_lengths:
        raise ValueError("A sweep needs at least one exit layer and one draft length.")
    pairs = [(n, length) for n in exit_layers for length in draft_lengths]
    strategies: dict[str, Strategy] = {f"{n}, {length}": SelfSpeculative(n, length) for n, length in pairs}
    compared = compare_decoding(
        model,
        prompts,
        {"plain": Autoregressive()} | strategies,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        progress=progress,
    )
    rows = dict(zip(pairs, compared.strategies[1:], strict=True))
    best = max(pairs, key=lambda pair: rows[pair].speed_up)
    return DraftingSweep(
        temperature=temperature,
        top_p=top_p,
        prompts=len(prompts),
        max_new_tokens=max_new_tokens,
        exit_layers=exit_layers,
        draft_lengths=draft_lengths,
        speed_up=[[rows[n, length].speed_up for length in draft_lengths] for n in exit_layers],
        acceptance_rate=[[_or_nan(rows[n, length].acceptance_rate) for length in draft_lengths] for n in exit_layers],
        identical=sum(row.identical for row in rows.values()),
        outputs=len(pairs) * len(prompts),
        chosen={"exit_layer": best[0], "draft_length": best[1]},
        by_position=[
            {
                "exit_layer": n,
                "draft_length": draft_lengths[-1],
                "drafted_by_position": rows[n, draft_lengths[-1]].drafted_by_position,
                "accepted_by_position": rows[n, draft_lengths[-1]].accepted_by_position,
            }
            for n in exit_layers
        ],
    )


def _or_nan(share: float | None) -> float:
    return math.nan if share is None else share
