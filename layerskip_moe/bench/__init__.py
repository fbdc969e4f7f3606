"""The same work timed side by side. Strategies on one model: start at `decoding.py`; `sweep.py` tries many settings.
This library beside transformers and llama.cpp (`layerskip-moe bench`): start at `decode.py`. Drafting policies on a
trace: start at `policies.py`. `machine.py` says what it all ran on."""

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
