"""Which exit layer to draft from, and how many tokens a round: every setting tried, and the one picked.

Next: `decoding.py`, which tells how the setting did on other prompts.
"""

from layerskip_moe.analysis.findings import decoding_label
from layerskip_moe.analysis.report_text.markdown import Report, counted, figure, number, percent, table


def sweep_lines(report: Report) -> list[str]:
    """`sweep`: speed-up and acceptance of every setting, and which one was picked."""
    sweep = report.get("sweep")
    if not sweep:
        return []
    chosen = sweep["chosen"]
    setting = (chosen["exit_layer"], chosen["draft_length"])
    cells = {
        (layer, length): (sweep["speed_up"][i][j], sweep["acceptance_rate"][i][j])
        for i, layer in enumerate(sweep["exit_layers"])
        for j, length in enumerate(sweep["draft_lengths"])
    }
    rows = []
    for layer in sweep["exit_layers"]:
        row = [str(layer)]
        for length in sweep["draft_lengths"]:
            speed_up, acceptance = cells[layer, length]
            told = f"{number(speed_up, 2)} ({percent(acceptance)})"
            row.append(f"**{told}**" if (layer, length) == setting else told)
        rows.append(row)
    return [
        f"Speed-up over plain decoding, {decoding_label(sweep)}, median over "
        f"{counted(sweep['prompts'], 'prompt')} x {counted(sweep['max_new_tokens'], 'token')}, and in brackets the "
        f"share of drafts accepted. {_sweep_verdict(cells, setting)}{_lead(report)}{_exactness(sweep)}",
        "",
        "These are other prompts than those under Decoding, so that the setting picked here is not judged by the text "
        "that picked it. The best of many settings looks better on the prompts it was picked on than it is: the "
        "figures to quote are those under Decoding.",
        "",
        *table(("exit layer", *(f"{length} drafts" for length in sweep["draft_lengths"])), rows),
        *figure(report, "speed_up_contour", "Speed-up by exit layer and draft length"),
    ]


def _sweep_verdict(cells: dict[tuple[int, int], tuple[float | None, float | None]], setting: tuple[int, int]) -> str:
    measured = {place: speed_up for place, (speed_up, _) in cells.items() if speed_up is not None}
    faster = sum(speed_up > 1 for speed_up in measured.values())
    picked = f"Exit layer {setting[0]} with {setting[1]} drafts was picked (in bold)"
    best = max(measured.values(), default=None)
    if best is not None and measured.get(setting) == best:
        picked += ", the fastest of them"
    if not faster:
        return f"**None of the settings is faster** than plain decoding. {picked}."
    every = "All of the settings are" if faster == len(measured) else "Not all of the settings are"
    return f"{every} faster than plain decoding. {picked}."


def _lead(report: Report) -> str:
    found = report["findings"].get("sweep")
    if not found or not found["small"]:
        return ""
    return (
        f" Exit layer {found['exit_layer']} with {found['draft_length']} drafts comes close "
        f"({number(found['speed_up'], 2)}): so few prompts do not tell the two apart, and **another run may pick "
        "another** setting."
    )


def _exactness(sweep: Report) -> str:
    same, outputs = sweep.get("identical"), sweep.get("outputs")
    if same is None or outputs is None:
        return ""
    if same == outputs:
        return f" All {number(outputs)} outputs of these settings are identical to plain decoding's, token for token."
    return (
        f" **Not all outputs of these settings are identical** to plain decoding's: {number(same)} of "
        f"{number(outputs)} are."
    )
