"""The same work timed side by side. Start at `decoding.py`; `sweep.py` tries many settings; `machine.py` says what it
ran on."""

from layerskip_moe.bench.decoding import DecodingComparison, StrategyResult, compare_decoding
from layerskip_moe.bench.machine import describe_machine
from layerskip_moe.bench.sweep import DraftingSweep, sweep_drafting

__all__ = [
    "DecodingComparison",
    "DraftingSweep",
    "StrategyResult",
    "compare_decoding",
    "describe_machine",
    "sweep_drafting",
]
