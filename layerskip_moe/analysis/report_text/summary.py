"""What a reader in a hurry takes away: how fast self-speculative decoding was at its best, and how exact.

Next: `decoding.py`, which tells all that was measured.
"""

from layerskip_moe.analysis.findings import decoding_label
from layerskip_moe.analysis.report_text.markdown import Report, counted, listed, number, speed_verdict


def summary_lines(report: Report) -> list[str]:
    """A headline for each comparison, and what it must not be taken for."""
    if not report["summary"]:
        return ["No self-speculative decoding was measured in this run."]
    lines = []
    for best in report["summary"]:
        setting = f"`{best['name']}`"
        if best["exit_layer"] is not None:
            setting = f"exit layer {best['exit_layer']} and draft length {best['draft_length']}"
        low, high = best["speed_up_quartiles"]
        speed = number(best["tokens_per_second"], 1)
        plain = number(best["baseline_tokens_per_second"], 1)
        lines.append(
            f"- {best['decoding'].capitalize()}: at its best, self-speculative decoding was "
            f"{speed_verdict(best['speed_up'])}, with {setting} (medians over {counted(best['prompts'], 'prompt')}: "
            f"{speed} against {plain} tokens/s; the middle half of the prompts: {low:.2f} to {high:.2f} times). "
            f"{_exactness(best)}"
        )
    return [
        *lines,
        "",
        "The baseline is the same model decoded plainly, not a model trained without LayerSkip. " + _how_picked(report),
    ]


def _exactness(best: Report) -> str:
    same, outputs = best["identical"], best["outputs"]
    if same == outputs:
        return f"All {outputs} outputs, over all settings tried, are identical to plain decoding's, token for token."
    return (
        f"**Not all outputs are identical** to plain decoding's: {same} of {outputs} are, over all settings tried; "
        "the table below says where the others part."
    )


def _how_picked(report: Report) -> str:
    """Whether the headlines' settings were chosen by the prompts that they are stated for."""
    headlines = report["summary"]
    if not report.get("sweep"):
        if all(best["outputs"] == best["prompts"] for best in headlines):
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
