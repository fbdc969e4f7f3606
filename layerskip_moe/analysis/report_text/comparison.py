"""The same network trained with and without LayerSkip: its exits, its experts' balance, its speed.

Next: `findings.py`, which computes what is claimed here; `main.py --compare`, which trains both.
"""

from collections.abc import Sequence

from layerskip_moe.analysis.findings import decoding_label
from layerskip_moe.analysis.report_text.decoding import DRAFTING_HEADER, drafting_cells
from layerskip_moe.analysis.report_text.markdown import Report, figure, number, percent, quartiles, table


def comparison_lines(report: Report) -> list[str]:
    """`comparison`: verdicts first, then the tables they are read from."""
    comparison = report.get("comparison")
    if not comparison:
        return []
    runs, found = comparison["runs"], report["findings"]["comparison"]
    return [
        f"The same network, trained on the same text for {number(comparison['steps'])} steps: `{runs[0]['name']}` "
        f"(with LayerSkip) and `{runs[1]['name']}` (without). One seed each ({comparison['seed']}): how much another "
        "seed would change is not known, so a small difference is no result. What is compared is the whole recipe, "
        "layer dropout and early-exit loss together: which of them did it cannot be told from this.",
        "",
        *_perplexity_verdict(runs),
        *_balance_verdict(runs, found),
        *_speed_verdict(runs, found),
        "",
        *_runs_table(runs, found),
        *_exits_table(runs),
        *figure(report, "comparison", "Both runs side by side"),
        *_decoding_table(runs),
    ]


def _perplexity_verdict(runs: Sequence[Report]) -> list[str]:
    lines = []
    n_layers = len(runs[0]["perplexity"])
    exits = {"The whole model": n_layers, "Exit layer 1": 1} if n_layers > 1 else {"The whole model": 1}
    for name, layer in exits.items():
        with_, without = (run["perplexity"][layer - 1] for run in runs)
        if with_ is None or without is None:
            continue
        told = "as good" if number(with_, 2) == number(without, 2) else "better" if with_ < without else "**worse**"
        lines.append(
            f"- {name} is {told} with LayerSkip: held-out perplexity {number(with_, 2)} against {number(without, 2)}."
        )
    return lines


def _balance_verdict(runs: Sequence[Report], found: Report) -> list[str]:
    """Whether experts are balanced better with LayerSkip, as far as one run each can tell."""
    measures = [run["balance"] for run in found["runs"]]
    if None in measures:
        return ["- The balance of experts cannot be compared: not every run has layers with experts that were used."]
    with_, without = (number(row["max_violation"], 3) for row in measures)
    entropy, plain_entropy = (number(row["normalized_entropy"], 3) for row in measures)
    return [
        f"- {balance_told(found)}: mean MaxVio {with_} against {without} (0 is even), lower with LayerSkip in "
        f"{found['more_even']} of {found['layers']} layers; mean normalised entropy {entropy} against {plain_entropy} "
        "(1 is even)."
    ]


def balance_told(found: Report) -> str:
    """The verdict on the balance of experts, from the findings on two runs."""
    if found["balance"]:
        return f"With LayerSkip, experts were **balanced {found['balance']}**"
    return "Whether experts are balanced better with LayerSkip **cannot be told** from this"


def _speed_verdict(runs: Sequence[Report], found: Report) -> list[str]:
    lines = []
    for with_, without in zip(*(run["decoding"] for run in found["runs"]), strict=False):
        if with_["decoding"] != without["decoding"]:
            continue
        best = " at its best" if with_["settings"] > 1 else ""
        lines.append(
            f"- {with_['decoding'].capitalize()}: drafting with its own early layers, `{runs[0]['name']}` was{best} "
            f"{_speed(with_)} as fast as itself decoded plainly {_setting(with_)}, and `{runs[1]['name']}` "
            f"{_speed(without)} {_setting(without)}."
        )
    return lines


def _speed(best: Report) -> str:
    return f"{number(best['speed_up'], 2)} times"


def _setting(best: Report) -> str:
    if best["exit_layer"] is None:
        return f"(`{best['name']}`; middle half of the prompts: {quartiles(best)})"
    drafts = f"exit layer {best['exit_layer']}, draft length {number(best['draft_length'])}"
    return f"({drafts}; middle half of the prompts: {quartiles(best)})"


def _runs_table(runs: Sequence[Report], found: Report) -> list[str]:
    header = ("run", "perplexity", "best step", "MaxVio, mean", "entropy, mean", "dead experts, mean", "seconds")
    rows = []
    for run, derived in zip(runs, found["runs"], strict=True):
        balance = derived["balance"] or {}
        rows.append(
            (
                run["name"],
                number(run["perplexity"][-1], 2),
                number(run["best_step"]),
                *(number(balance.get(name), 3) for name in ("max_violation", "normalized_entropy", "dead_experts")),
                number(run["seconds"], 1),
            )
        )
    return table(header, rows)


def _exits_table(runs: Sequence[Report]) -> list[str]:
    header = ["exit layer"]
    for run in runs:
        header += [f"perplexity, {run['name']}", f"agreement, {run['name']}"]
    rows = []
    for layer in range(len(runs[0]["perplexity"])):
        row = [str(layer + 1)]
        for run in runs:
            row += [number(run["perplexity"][layer], 2), percent(run["agreement"][layer])]
        rows.append(row)
    return table(header, rows)


def _decoding_table(runs: Sequence[Report]) -> list[str]:
    header = ("decoding", "run", *DRAFTING_HEADER, "identical")
    rows = [
        (
            decoding_label(comparison),
            run["name"],
            *drafting_cells(row),
            f"{row['identical']} of {comparison['prompts']}",
        )
        for run in runs
        for comparison in run["decoding"]
        for row in comparison["strategies"]
    ]
    if not rows:
        return []
    return ["Speed-up is over the same run's own plain decoding.", "", *table(header, rows)]
