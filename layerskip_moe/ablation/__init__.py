"""One thing changed at a time, many trainings: what it does to quality, routing and speed. `layerskip-moe ablate`.

Start at `variants.py` (what is changed); `runs.py` trains, `measure.py` measures, `summary.py` compares and
`write.py` tells.
"""

from layerskip_moe.ablation.measure import MeasureConfig
from layerskip_moe.ablation.runs import ablate
from layerskip_moe.ablation.variants import Variant, named_variants, usual_variants

__all__ = ["MeasureConfig", "Variant", "ablate", "named_variants", "usual_variants"]
