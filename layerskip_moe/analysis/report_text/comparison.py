"""The same network trained with and without LayerSkip: its exits, its experts' balance, its speed.

Next: `findings.py`, which computes what is claimed here; `main.py --compare`, which trains both.
"""

from collections.abc import Sequence

from layerskip_moe.analysis.findings import decoding_label
from layerskip_moe.analysis.report_text.decoding import quartiles
from layerskip_moe.analysis.report_text.markdown import Report, figure, number, percent, table


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
    """Whether layer skipping balances experts better, as far as one run each can tell."""
    measures = [run["balance"] for run in found["runs"]]
    if None in measures:
        return ["- The balance of experts cannot be compared: not every run has layers with experts that were used."]
    with_, without = (row["max_violation"] for row in measures)
    if number(with_, 3) == number(without, 3):
        told = "Layer skipping **made no difference** to the balance of experts here"
    elif with_ < without:
        told = "Layer skipping **balanced experts better** here"
    else:
        told = "Layer skipping **did not balance experts better** here, but worse"
    entropy, plain_entropy = (row["normalized_entropy"] for row in measures)
    doubt = ""
    if (with_ - without) * (entropy - plain_entropy) > 0:  # MaxVio falls with evenness, entropy rises
        doubt = " Entropy, which looks at all experts and not the busiest alone, says the opposite."
    return [
        f"- {told}: mean MaxVio {number(with_, 3)} against {number(without, 3)} (0 is even); it is lower with "
        f"LayerSkip in {found['more_even']} of {found['layers']} layers. Normalised entropy: {number(entropy, 3)} "
        f"against {number(plain_entropy, 3)} (1 is even).{doubt}"
    ]


def _speed_verdict(runs: Sequence[Report], found: Report) -> list[str]:
    lines = []
    for with_, without in zip(*(run["decoding"] for run in found["runs"]), strict=False):
        if with_["decoding"] != without["decoding"]:
            continue
        lines.append(
            f"- {with_['decoding'].capitalize()}: drafting with its own early layers, `{runs[0]['name']}` was at its "
            f"best {number(with_['speed_up'], 2)} times as fast as itself decoded plainly (`{with_['name']}`), and "
            f"`{runs[1]['name']}` {number(without['speed_up'], 2)} times (`{without['name']}`)."
        )
    return lines


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
    header = ("decoding", "run", "strategy", "tokens/s", "speed-up", "middle half", "accepted", "identical")
    rows = [
        (
            decoding_label(comparison),
            run["name"],
            row["name"],
            number(row["tokens_per_second"], 1),
            number(row["speed_up"], 2),
            quartiles(row),
            percent(row["acceptance_rate"]),
            f"{row['identical']} of {comparison['prompts']}",
        )
        for run in runs
        for comparison in run["decoding"]
        for row in comparison["strategies"]
    ]
    if not rows:
        return []
    return ["Speed-up is over the same run's own plain decoding.", "", *table(header, rows)]
