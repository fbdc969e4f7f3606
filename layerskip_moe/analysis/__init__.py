"""What a trained model does, and the report that tells it.

`exits.py` and `expert_use.py` measure, `figures.py` shows, `report.py` tells. Start reading at `exits.py`.
"""

from layerskip_moe.analysis.exits import ExitEvaluation, evaluate_exits
from layerskip_moe.analysis.expert_use import ExpertUse, expert_use
from layerskip_moe.analysis.metrics_file import read_metrics
from layerskip_moe.analysis.repetition import distinct_ngrams
from layerskip_moe.analysis.report import write_report

__all__ = [
    "ExitEvaluation",
    "ExpertUse",
    "distinct_ngrams",
    "evaluate_exits",
    "expert_use",
    "read_metrics",
    "write_report",
]
