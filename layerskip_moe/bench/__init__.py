"""The same work timed side by side. Start at `decoding.py`; `machine.py` says what it ran on."""

from layerskip_moe.bench.decoding import DecodingComparison, StrategyResult, compare_decoding
from layerskip_moe.bench.machine import describe_machine

__all__ = ["DecodingComparison", "StrategyResult", "compare_decoding", "describe_machine"]
