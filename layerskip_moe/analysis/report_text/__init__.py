"""The wording of a report: from the dict that report.json holds to Markdown, and no figure from elsewhere.

A sentence that judges chooses its words by the numbers it states; what it needs beyond the measurements is
in the report's `findings`. Knows nothing of files.
Here is the order of the sections; the files beside this one word them, with the forms in `markdown.py`.
Next: `report.py`, which documents the dict and writes both.
"""

from layerskip_moe.analysis.report_text.comparison import comparison_lines
from layerskip_moe.analysis.report_text.decoding import continuation_lines, decoding_lines
from layerskip_moe.analysis.report_text.exits import early_exit_lines, exit_lines
from layerskip_moe.analysis.report_text.experts import expert_lines
from layerskip_moe.analysis.report_text.markdown import Report
from layerskip_moe.analysis.report_text.setting import model_lines, setting_lines
from layerskip_moe.analysis.report_text.strategies import strategy_lines
from layerskip_moe.analysis.report_text.summary import summary_lines
from layerskip_moe.analysis.report_text.sweep import sweep_lines
from layerskip_moe.analysis.report_text.training import recipe_lines, training_lines

_SECTIONS = (
    ("In short", summary_lines),
    ("Decoding", decoding_lines),
    ("Which exit layer, how many drafts", sweep_lines),
    ("Every way to decode", strategy_lines),
    ("Exit layers", exit_lines),
    ("Leaving early", early_exit_lines),
    ("With and without LayerSkip", comparison_lines),
    ("Training", training_lines),
    ("The recipe", recipe_lines),
    ("Experts", expert_lines),
    ("Continuations", continuation_lines),
    ("Model and text", model_lines),
    ("How to repeat it", setting_lines),
)


def render(report: Report) -> str:
    """The Markdown of a report as `report.write_report` completes it. Absent sections are left out."""
    lines = ["# What this run found"]
    for title, section_lines in _SECTIONS:
        body = section_lines(report)
        if body:
            lines += ["", f"## {title}", "", "\n".join(body).rstrip()]
    return "\n".join(lines) + "\n"
