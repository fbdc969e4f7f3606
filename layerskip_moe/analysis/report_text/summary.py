"""What a reader in a hurry takes away: how fast and how exact self-speculative decoding was, and a line on the rest.

Next: `decoding.py`, which tells all that was measured.
"""

from layerskip_moe.analysis.findings import decoding_label
from layerskip_moe.analysis.report_text.comparison import balance_told
from layerskip_moe.analysis.report_text.decoding import repeats_itself
from layerskip_moe.analysis.report_text.exits import best_threshold_told
from layerskip_moe.analysis.report_text.experts import load_told
from layerskip_moe.analysis.report_text.markdown import Report, counted, listed, number, percent, speed_verdict


def summary_lines(report: Report) -> list[str]:
    """A headline for each comparison and for each of the other findings, and what they must not be taken for."""
    lines = [_headline(best) for best in report["summary"]]
    if not lines:
        lines = ["No self-speculative decoding was measured in this run.", ""]
    others = [*_early_exit(report), *_experts(report), *_comparison(report)]
    if not report["summary"]:
        return lines + others
    return [
        *lines,
        *others,
        "",
        "The baseline is the same model decoded plainly, not a model trained without LayerSkip. " + _how_picked(report),
    ]


def _headline(best: Report) -> str:
    setting = f"`{best['name']}`"
    if best["exit_layer"] is not None:
        setting = f"exit layer {best['exit_layer']} and draft length {best['draft_length']}"
    at_best = "at its best, " if best["settings"] > 1 else ""
    speed, plain = (number(best[name], 1) for name in ("tokens_per_second", "baseline_tokens_per_second"))
    looping = ""
    if repeats_itself(best):
        looping = (
            f" The text repeats itself (distinct 4-grams: {percent(best['distinct_4grams'])}), and loops are easy to "
            "draft."
        )
    return (
        f"- {best['decoding'].capitalize()}: {at_best}self-speculative decoding was {speed_verdict(best)}, with "
        f"{setting}. This is the median of each prompt's own ratio, over {counted(best['prompts'], 'prompt')}; the "
        f"medians of tokens/s, taken apart, are {speed} and {plain}. {_exactness(best)}{looping}"
    )


def _exactness(best: Report) -> str:
    same, outputs = best["identical"], best["outputs"]
    tried = ", over all settings tried," if best["settings"] > 1 else ""
    if same == outputs:
        return f"All {outputs} outputs{tried} are identical to plain decoding's, token for token."
    return (
        f"**Not all outputs are identical** to plain decoding's: {same} of {outputs}{tried} are; the table below says "
        "where the others part."
    )


def _early_exit(report: Report) -> list[str]:
    found = report["findings"].get("early_exit")
    if not found:
        return []
    told = f"- Leaving early (lossy). {best_threshold_told(found)}"
    baseline, *rows = report["early_exit"]["decoding"]["strategies"]
    at_best = [row for row in rows if found["threshold"] is not None and row["threshold"] == found["threshold"]]
    if at_best:
        label = decoding_label(report["early_exit"]["decoding"])
        told += f" Decoding with it, {label}, was {speed_verdict(at_best[0])}."
        if repeats_itself(at_best[0]) or repeats_itself(baseline):
            told += " That text repeats itself, and loops are easy to leave early."
    return [told]


def _experts(report: Report) -> list[str]:
    metrics = (report.get("experts") or {}).get("metrics")
    return [f"- Experts: {load_told(metrics)}"] if metrics else []


def _comparison(report: Report) -> list[str]:
    found = report["findings"].get("comparison")
    if not found:
        return []
    with_, without = (number(run["perplexity"][-1], 2) for run in report["comparison"]["runs"])
    balance = f" {balance_told(found)}." if None not in [run["balance"] for run in found["runs"]] else ""
    return [
        f"- The same network with LayerSkip and without, one seed each: held-out perplexity {with_} against "
        f"{without}.{balance}"
    ]


def _how_picked(report: Report) -> str:
    """Whether the headlines' settings were chosen by the prompts that they are stated for."""
    headlines = report["summary"]
    if not report.get("sweep"):
        if all(best["settings"] == 1 for best in headlines):
            return "It was the only setting tried, so it was not picked by its speed."
        return "The best setting was picked on the prompts it is stated for."
    chosen = report["sweep"]["chosen"]
    setting = (chosen["exit_layer"], chosen["draft_length"])
    if all(_setting(best) == setting for best in headlines):
        return "The setting was picked on other prompts than these."
    told = (
        f"The setting picked on other prompts than these is exit layer {setting[0]} and draft length {setting[1]}; "
        "where another one is named above, it was picked on the prompts it is stated for."
    )
    speeds = [
        f"{row['speed_up']:.2f} ({decoding_label(comparison)})"
        for comparison in report["decoding"]
        for row in comparison["strategies"]
        if _setting(row) == setting
    ]
    return told + (f" Its speed-up here: {listed(speeds)}." if speeds else "")


def _setting(row: Report) -> tuple[int | None, int | None]:
    return row["exit_layer"], row["draft_length"]
