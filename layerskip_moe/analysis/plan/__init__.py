"""What a network takes of memory and work before any of it is built: `memory_plan`, behind `layerskip-moe plan`.

Start at `plan.py`. `counts.py` has parameters and operations; `activations.py`, `sharded.py` and `training.py` have a
training step, `decoding.py` the rest; `bench/plan.py` compares it with what PyTorch allocates.
"""

from layerskip_moe.analysis.plan.decoding import Decoding
from layerskip_moe.analysis.plan.plan import MemoryPlan, memory_plan

__all__ = ["Decoding", "MemoryPlan", "memory_plan"]
