"""Stopping early: every exit layer on held-out text, and leaving as soon as a layer is confident enough.

Next: `strategies.py`, whose table and words are used for decoding.
"""

from collections.abc import Sequence

from layerskip_moe.analysis.findings import decoding_label
from layerskip_moe.analysis.report_text.decoding import how_measured, repeats_itself
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
        f"is under Decoding. {best_threshold_told(report['findings']['early_exit'])}",
        "",
        *table(("threshold", "layers per token", "perplexity", "agreement"), rows),
        *figure(report, "early_exit", "Speed and quality by threshold"),
        *_confidence(held_out),
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


def best_threshold_told(found: Report) -> str:
    """The threshold to recommend by held-out text, from the findings on early exit."""
    least = percent(found["least_agreement"])
    if found["threshold"] is None:
        return (
            f"**No threshold that saves layers** agrees with the last layer at {least} of the held-out positions or "
            "more."
        )
    return (
        f"Of the thresholds that agree with the last layer at {least} of the held-out positions or more, "
        f"{short(found['threshold'])} saves most: {number(found['mean_layers'], 2)} of {found['n_layers']} layers per "
        "token."
    )


def _decoding_verdict(decoding: Report) -> list[str]:
    baseline, *rows = decoding["strategies"]
    if not rows:
        return []
    best = max(rows, key=lambda row: row["speed_up"])
    fastest = f", the fastest of {len(rows)} on these prompts" if len(rows) > 1 else ""
    told = (
        f"With threshold {short(best['threshold'])}{fastest}, early exit was {speed_verdict(best)}, at "
        f"{number(best['mean_layers'], 2)} layers per token; {best['identical']} of {decoding['prompts']} outputs are "
        "plain decoding's."
    )
    if fastest:
        told += " The best of several looks better on the prompts it was picked on than it is."
    if repeats_itself(best) or repeats_itself(baseline):
        told += (
            f" The text repeats itself (distinct 4-grams: {percent(best['distinct_4grams'])}, plain decoding's "
            f"{percent(baseline['distinct_4grams'])}), and text that loops is easy to leave early."
        )
    return [told + _in_vain(baseline, rows), ""]


def _in_vain(baseline: Report, rows: Sequence[Report]) -> str:
    """The thresholds that made decoding slower, with layers left out or (to two decimals) none."""
    slower = [row for row in rows if row["speed_up"] < 1]
    every = number(baseline["mean_layers"], 2)
    fewer = [row for row in slower if number(row["mean_layers"], 2) != every]
    told = ""
    if fewer:
        thresholds = listed(short(row["threshold"]) for row in fewer)
        told += (
            f" With threshold {thresholds} it left out layers and was slower all the same: deciding where to leave "
            "costs time too."
        )
    for row in slower:
        if row not in fewer:
            told += (
                f" With threshold {short(row['threshold'])} it ran all layers, at {number(row['speed_up'], 2)} times "
                "plain decoding's speed: that is what deciding where to leave costs."
            )
    return told


def _confidence(held_out: Report) -> list[str]:
    columns = (held_out["confidence_mean"], held_out["confidence_low"], held_out["confidence_high"])
    rows = [
        (str(layer), *(number(value, 3) for value in values))
        for layer, values in enumerate(zip(*columns, strict=True), start=1)
        if values[0] is not None
    ]
    return table(("layer", "confidence, mean", "first quartile", "third quartile"), rows)


def _by_prompt(report: Report) -> list[str]:
    lines = figure(report, "exits_by_prompt", "Where tokens leave, by prompt")
    if not lines:
        return []
    threshold = short(report["early_exit"]["by_prompt"]["threshold"])
    return [f"Where the new tokens of each prompt left, at threshold {threshold}:", "", *lines]
