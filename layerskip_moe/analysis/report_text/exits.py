"""Stopping early: every exit layer on held-out text, and leaving as soon as a layer is confident enough.

Next: `strategies.py`, whose table and words are used for decoding.
"""

from layerskip_moe.analysis.findings import decoding_label
from layerskip_moe.analysis.report_text.decoding import how_measured
from layerskip_moe.analysis.report_text.markdown import (
    Report,
    figure,
    listed,
    number,
    percent,
    short,
    speed_verdict,
    table,
)
from layerskip_moe.analysis.report_text.strategies import quality_table


def exit_lines(report: Report) -> list[str]:
    """`exits`."""
    exits = report.get("exits")
    if not exits:
        return []
    pairs = zip(exits["perplexity"], exits["agreement"], strict=True)
    rows = [(str(layer), number(ppl, 2), percent(same)) for layer, (ppl, same) in enumerate(pairs, start=1)]
    return [
        f"On {number(exits['tokens'])} held-out tokens. Agreement: the share of positions, given the true text so "
        "far, where the exit's most likely token is the last layer's.",
        "",
        *table(("exit layer", "perplexity", "agreement"), rows),
        *figure(report, "perplexity_by_exit", "Perplexity and agreement by exit layer"),
    ]


def early_exit_lines(report: Report) -> list[str]:
    """`early_exit`: thresholds on held-out text and while decoding, and where tokens leave."""
    early_exit = report.get("early_exit")
    if not early_exit:
        return []
    held_out, decoding = early_exit["held_out"], early_exit["decoding"]
    cache = {
        "propagate": "get their keys and values from the state the token left with, an approximation",
        "exact": "are run for it later, so that their keys and values are exact",
    }[early_exit["cache"]]
    columns = (held_out["mean_layers"], held_out["perplexity"], held_out["agreement"])
    rows = [
        (short(threshold), number(mean, 2), number(perplexity, 2), percent(agreement))
        for threshold, mean, perplexity, agreement in zip(held_out["thresholds"], *columns, strict=True)
    ]
    return [
        f"A token leaves at the first layer, from layer {early_exit['min_layer']} on, whose confidence "
        f"(`{early_exit['confidence']}`) reaches the threshold; the layers it skips {cache}. This changes the text: "
        "a confident layer is not always right.",
        "",
        "### On held-out text",
        "",
        f"{number(held_out['tokens'])} tokens, each given the true text so far, and with every layer's keys and values "
        "exact. So these figures say how good the exits are, not how far a text drifts that is built on them: that "
        f"is under Decoding. {_held_out_verdict(report)}",
        "",
        *table(("threshold", "layers per token", "perplexity", "agreement"), rows),
        *figure(report, "early_exit", "Speed and quality by threshold"),
        *figure(report, "confidence_by_layer", "Confidence by layer"),
        *figure(report, "exit_histogram", "Where tokens leave, by threshold"),
        f"### Decoding, {decoding_label(decoding)}",
        "",
        how_measured(decoding),
        "",
        *quality_table(decoding),
        *_decoding_verdict(decoding),
        *_by_prompt(report),
    ]


def _held_out_verdict(report: Report) -> str:
    found = report["findings"]["early_exit"]
    least = percent(found["least_agreement"])
    if found["threshold"] is None:
        return f"**No threshold that saves layers** agrees with the last layer at {least} of the positions or more."
    return (
        f"Of the thresholds that agree with the last layer at {least} of the positions or more, "
        f"{short(found['threshold'])} saves most: {number(found['mean_layers'], 2)} of {found['n_layers']} layers per "
        "token."
    )


def _decoding_verdict(decoding: Report) -> list[str]:
    baseline, *rows = decoding["strategies"]
    if not rows:
        return []
    best = max(rows, key=lambda row: row["speed_up"])
    told = (
        f"At its fastest, with threshold {short(best['threshold'])}, early exit was {speed_verdict(best['speed_up'])}, "
        f"at {number(best['mean_layers'], 2)} layers per token; {best['identical']} of {decoding['prompts']} outputs "
        "are plain decoding's."
    )
    in_vain = [row for row in rows if row["mean_layers"] < baseline["mean_layers"] and row["speed_up"] < 1]
    if in_vain:
        thresholds = listed(short(row["threshold"]) for row in in_vain)
        told += (
            f" With threshold {thresholds} it left out layers and was slower all the same: asking a layer for its "
            "confidence takes time too."
        )
    return [told, ""]


def _by_prompt(report: Report) -> list[str]:
    lines = figure(report, "exits_by_prompt", "Where tokens leave, by prompt")
    if not lines:
        return []
    threshold = short(report["early_exit"]["by_prompt"]["threshold"])
    return [f"Where the new tokens of each prompt left, at threshold {threshold}:", "", *lines]
