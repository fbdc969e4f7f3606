"""What a trained model does, and the report that tells it.

`exits.py`, `early_exit.py`, `expert_use.py`, `expert_choice.py`, `expert_union.py` and `continuations.py` measure,
`figures/` shows, `report.py` tells; `calibrate.py` bounds what early exit may lose; `record_trace.py` keeps
what every exit says. Start reading at `exits.py`.
"""

from layerskip_moe.analysis.calibrate import Calibration, calibrate_early_exit
from layerskip_moe.analysis.continuations import ContinuationScore, score_continuations
from layerskip_moe.analysis.early_exit import EarlyExitEvaluation, evaluate_early_exit
from layerskip_moe.analysis.exits import ExitEvaluation, evaluate_exits
from layerskip_moe.analysis.expert_choice import ExpertChoice, expert_choice
from layerskip_moe.analysis.expert_union import ExpertUnion, expert_union
from layerskip_moe.analysis.expert_use import ExpertUse, expert_use
from layerskip_moe.analysis.metrics_file import read_metrics
from layerskip_moe.analysis.repetition import distinct_ngrams
from layerskip_moe.analysis.report import write_report

__all__ = [
    "Calibration",
    "ContinuationScore",
    "EarlyExitEvaluation",
    "ExitEvaluation",
    "ExpertChoice",
    "ExpertUnion",
    "ExpertUse",
    "calibrate_early_exit",
    "distinct_ngrams",
    "evaluate_early_exit",
    "evaluate_exits",
    "expert_choice",
    "expert_union",
    "expert_use",
    "read_metrics",
    "score_continuations",
    "write_report",
]
