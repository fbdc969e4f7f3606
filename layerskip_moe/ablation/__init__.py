"""One thing changed at a time, many trainings: what it does to quality, routing and speed. `layerskip-moe ablate`.

Start at `variants.py` (what is changed); `grid.py` makes all runs, `runs.py` one of them, which `measure.py` measures
and `timing.py` times; `summary.py` compares and `write.py` tells.
"""

from layerskip_moe.ablation.grid import ablate
from layerskip_moe.ablation.measure import MeasureConfig
from layerskip_moe.ablation.timing import DecodingConfig
from layerskip_moe.ablation.variants import Variant, named_variants, usual_variants

__all__ = ["DecodingConfig", "MeasureConfig", "Variant", "ablate", "named_variants", "usual_variants"]
