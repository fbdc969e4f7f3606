"""The report's pictures: small functions from plain data to a matplotlib Figure.

Figures are built without pyplot, so the user's backend and open figures are left alone, and matplotlib is
imported by the first one drawn. A notebook shows one as the last line of a cell after `%matplotlib inline`.

Knows nothing of where the data came from: a report's section, or what a notebook has at hand. Start reading at
`drawing.py`, which the others share; `report_figures.py` calls them.
"""

from layerskip_moe.analysis.figures.ablation import ablation_tradeoff, ablation_unions
from layerskip_moe.analysis.figures.decoding import (
    acceptance_by_position,
    quality,
    speed_up_contour,
)
from layerskip_moe.analysis.figures.drawing import save_figure
from layerskip_moe.analysis.figures.exits import (
    confidence_by_layer,
    early_exit_tradeoff,
    exit_histogram,
    exits_by_prompt,
    perplexity_by_exit,
)
from layerskip_moe.analysis.figures.experts import balance_over_training, expert_heat_map, expert_tokens
from layerskip_moe.analysis.figures.policies import policy_map
from layerskip_moe.analysis.figures.recipe import exit_curriculum, layer_dropout_schedule
from layerskip_moe.analysis.figures.training import loss_curves, step_parts
from layerskip_moe.analysis.figures.two_runs import comparison

__all__ = [
    "ablation_tradeoff",
    "ablation_unions",
    "acceptance_by_position",
    "balance_over_training",
    "comparison",
    "confidence_by_layer",
    "early_exit_tradeoff",
    "exit_curriculum",
    "exit_histogram",
    "exits_by_prompt",
    "expert_heat_map",
    "expert_tokens",
    "layer_dropout_schedule",
    "loss_curves",
    "perplexity_by_exit",
    "policy_map",
    "quality",
    "save_figure",
    "speed_up_contour",
    "step_parts",
]
