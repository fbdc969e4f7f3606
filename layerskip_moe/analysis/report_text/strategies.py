"""Every way to decode side by side: which keep the whole model's text, and what the others make of it.

Next: `exits.py`, for dynamic early exit over its thresholds; `bench/decoding.py`, which measures.
"""

import math

from layerskip_moe.analysis.findings import decoding_label
from layerskip_moe.analysis.report_text.decoding import differences, how_measured
from layerskip_moe.analysis.report_text.markdown import (
    Report,
    figure,
    listed,
    number,
    percent,
    quartiles,
    speed_verdict,
    table,
)

_MEANING = (
    "Lossless: every token is the whole model's own choice, whoever drafted it, so the text is plain decoding's. "
    "Lossy: tokens may be chosen with layers left out, and the text be another. Perplexity and agreement are of "
    "the text a strategy wrote, read by the whole model: how likely it finds each token (lower is likelier), and for "
    "which share it is the first choice, at temperature 1 whatever the text was drawn at. They do not measure how "
    "good the text is: text that repeats itself is easy to predict, so read them beside the distinct 4-grams."
)


def strategy_lines(report: Report) -> list[str]:
    """`strategies`: a table for each comparison, and a sentence for each strategy that changes the text."""
    comparisons = report.get("strategies")
    if not comparisons:
        return []
    found = report["findings"]["strategies"]
    rough = (
        f"Perplexities within {100 * found['perplexity_ratio']:.0f}% of plain decoding's, agreements within "
        f"{found['agreement_points']} points and distinct 4-grams within {found['distinct_4grams_points']} are "
        "taken for no difference: rough bounds on what so few tokens tell apart."
    )
    lines = [_MEANING, "", rough, "", *figure(report, "quality", "Speed and likelihood of the text, by strategy")]
    for comparison, tokens in zip(comparisons, found["tokens"], strict=True):
        baseline, *others = comparison["strategies"]
        lines += [f"### {decoding_label(comparison).capitalize()}", "", how_measured(comparison), ""]
        lines += quality_table(comparison)
        lossless = [row for row in others if _is_lossless(row, baseline)]
        if lossless:
            outputs, same = comparison["prompts"] * len(lossless), sum(row["identical"] for row in lossless)
            lines.append(_lossless_verdict(outputs, same))
            # Where a lossy strategy parts from plain decoding is no news; where a lossless one does is a fault.
            lines += differences([baseline, *lossless])
        lines += [_lossy_verdict(row, baseline, tokens, found) for row in others if not _is_lossless(row, baseline)]
        lines.append("")
    return lines


def quality_table(comparison: Report) -> list[str]:
    """Speed beside what became of the text, a row for each strategy."""
    baseline = comparison["strategies"][0]
    header = (
        *("strategy", "kind", "layers per token", "tokens/s", "speed-up", "middle half"),
        *("perplexity of its text", "agreement", "distinct 4-grams", "identical"),
    )
    rows = [
        (
            row["name"],
            "baseline" if row is baseline else "lossless" if _is_lossless(row, baseline) else "lossy",
            number(row["mean_layers"], 2),
            number(row["tokens_per_second"], 1),
            number(row["speed_up"], 2),
            quartiles(row),
            number(row["perplexity"], 2),
            percent(row["agreement"]),
            percent(row["distinct_4grams"]),
            f"{row['identical']} of {comparison['prompts']}",
        )
        for row in comparison["strategies"]
    ]
    return table(header, rows)


def _is_lossless(row: Report, baseline: Report) -> bool:
    """Whether every token is sure to go through all layers: a threshold may be one that nothing reached."""
    return row["threshold"] is None and not _leaves_out(row, baseline)


def _leaves_out(row: Report, baseline: Report) -> bool:
    return not math.isclose(row["mean_layers"], baseline["mean_layers"])


def _lossless_verdict(outputs: int, same: int) -> str:
    if same == outputs:
        return f"- All {outputs} outputs of the lossless strategies are identical to plain decoding's, token for token."
    return (
        f"- **Not all outputs of the lossless strategies are identical** to plain decoding's: {same} of {outputs} are."
    )


def _lossy_verdict(row: Report, baseline: Report, tokens: int, margins: Report) -> str:
    speed = f"- `{row['name']}` was {speed_verdict(row)}"
    if not _leaves_out(row, baseline):
        return f"{speed}, and left out no layer here."
    told, untold = [speed], []
    perplexity, plain = row["perplexity"], baseline["perplexity"]
    if perplexity is not None and plain is not None:
        against = f"perplexity {number(perplexity, 2)} against {number(plain, 2)}"
        if abs(perplexity / plain - 1) <= margins["perplexity_ratio"]:
            untold.append(against)
        else:
            likely = "less likely than" if perplexity > plain else "likelier than"
            told.append(f"the whole model finds its text {likely} plain decoding's ({against})")
    shares = {
        "agreement": ("its tokens are the whole model's first choice", "more often", "less often"),
        "distinct_4grams": ("it repeats itself", "less", "more"),
    }
    for field, (what, where_more, where_less) in shares.items():
        share, plain = row[field], baseline[field]
        if share is None or plain is None:
            continue
        against = f"{field.replace('_4', ' 4-')} {percent(share)} against {percent(plain)}"
        if abs(share - plain) <= margins[f"{field}_points"] / 100:
            untold.append(against)
        else:
            told.append(f"{what} {where_more if share > plain else where_less} than in plain decoding ({against})")
    if untold:
        told.append(f"it cannot be told from {number(tokens)} tokens whether these differ: {listed(untold)}")
    return "; ".join(told) + "."
