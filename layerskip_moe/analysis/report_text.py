"""The wording of a report: from the dict that report.json holds to Markdown, and no figure from elsewhere.

Knows nothing of files. Next: `report.py`, which documents the dict and writes both.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from layerskip_moe.analysis.figures import decoding_label

Report = Mapping[str, Any]


def render(report: Report) -> str:
    """The Markdown of a report as `report.write_report` completes it. Absent sections are left out."""
    sections = (
        ("In short", _summary(report)),
        ("Decoding", _decoding(report)),
        ("Exit layers", _exits(report)),
        ("Training", _training(report)),
        ("Experts", _experts(report)),
        ("Continuations", _continuations(report)),
        ("Model and text", _model(report)),
        ("How to repeat it", _setting(report)),
    )
    lines = ["# What this run found"]
    for title, body in sections:
        if body:
            lines += ["", f"## {title}", "", "\n".join(body).rstrip()]
    return "\n".join(lines) + "\n"


def _summary(report: Report) -> list[str]:
    if not report["summary"]:
        return ["No self-speculative decoding was measured in this run."]
    lines = []
    for best in report["summary"]:
        setting = f"`{best['name']}`"
        if best["exit_layer"] is not None:
            setting = f"exit layer {best['exit_layer']} and draft length {best['draft_length']}"
        low, high = best["speed_up_quartiles"]
        speed = _number(best["tokens_per_second"], 1)
        plain = _number(best["baseline_tokens_per_second"], 1)
        lines.append(
            f"- {best['decoding'].capitalize()}: at its best, self-speculative decoding was "
            f"{_verdict(best['speed_up'])}, with {setting} (medians over {best['prompts']} prompts: {speed} against "
            f"{plain} tokens/s; the middle half of the prompts: {low:.2f} to {high:.2f} times). {_exactness(best)}"
        )
    return [
        *lines,
        "",
        "The baseline is the same model decoded plainly, not a model trained without LayerSkip. "
        "The best setting was picked on the prompts it is stated for.",
    ]


def _verdict(speed_up: float) -> str:
    times = f"{speed_up:.2f}"
    if times == "1.00":
        return "**neither faster nor slower** than plain decoding (1.00 times its speed)"
    if speed_up < 1:
        return f"**slower** than plain decoding: {times} times its speed"
    return f"**{times} times as fast** as plain decoding"


def _exactness(best: Report) -> str:
    same, outputs = best["identical"], best["outputs"]
    if same == outputs:
        return f"All {outputs} outputs, over all settings tried, are identical to plain decoding's, token for token."
    return (
        f"**Not all outputs are identical** to plain decoding's: {same} of {outputs} are, over all settings tried; "
        "the table below says where the others part."
    )


def _decoding(report: Report) -> list[str]:
    header = (
        *("strategy", "exit layer", "draft length", "tokens/s", "speed-up", "middle half", "accepted"),
        *("tokens per verification", "distinct 4-grams", "identical", "prefill, ms"),
    )
    lines = _figure(report, "speed_up_by_exit", "Speed-up and acceptance by exit layer")
    for comparison in report.get("decoding") or []:
        rows = comparison["strategies"]
        lines += [
            f"### {decoding_label(comparison).capitalize()}",
            "",
            f"{comparison['prompts']} held-out prompts x {comparison['max_new_tokens']} tokens, one at a time "
            f"(batch 1), prompt i with seed {comparison['seed']} + i; warmed up, interleaved, medians over prompts. "
            f"Speed-up is the ratio to `{rows[0]['name']}` on the same prompt. Tokens/s leaves out the prefill.",
            "",
            *_table(header, [_decoding_row(row, comparison["prompts"]) for row in rows]),
            *_differences(rows),
        ]
    return lines


def _decoding_row(row: Report, prompts: int) -> tuple[str, ...]:
    return (
        row["name"],
        _number(row["exit_layer"]),
        _number(row["draft_length"]),
        _number(row["tokens_per_second"], 1),
        _number(row["speed_up"], 2),
        " to ".join(_number(quartile, 2) for quartile in row["speed_up_quartiles"]),
        _percent(row["acceptance_rate"]),
        _number(row["tokens_per_verification"], 2),
        _percent(row["distinct_4grams"]),
        f"{row['identical']} of {prompts}",
        _number(None if row["prefill_seconds"] is None else 1000 * row["prefill_seconds"], 1),
    )


def _differences(rows: Sequence[Report]) -> list[str]:
    lines = []
    for row in rows:
        places = [f"{prompt} (token {place})" for prompt, place in row["first_differences"].items()]
        if places:
            lines.append(
                f"- `{row['name']}` parts from `{rows[0]['name']}` on prompts {', '.join(places)}; counted from 0."
            )
    return [*lines, ""] if lines else []


def _exits(report: Report) -> list[str]:
    exits = report.get("exits")
    if not exits:
        return []
    pairs = zip(exits["perplexity"], exits["agreement"], strict=True)
    rows = [(str(layer), _number(ppl, 2), _percent(same)) for layer, (ppl, same) in enumerate(pairs, start=1)]
    return [
        f"On {_number(exits['tokens'])} held-out tokens. Agreement: the share of positions, given the true text so "
        "far, where the exit's most likely token is the last layer's.",
        "",
        *_table(("exit layer", "perplexity", "agreement"), rows),
        *_figure(report, "perplexity_by_exit", "Perplexity and agreement by exit layer"),
    ]


def _training(report: Report) -> list[str]:
    training = report.get("training")
    if not training:
        return _figure(report, "loss", "Loss during training")
    best = training.get("best_validation")
    told = (
        f"{_number(training['steps'])} steps in {_number(training['seconds'], 1)} s, "
        f"{_number(training['tokens_per_second'])} tokens/s."
    )
    if best:
        told += f" Best held-out perplexity: {_number(best['perplexity'], 2)}, at step {_number(best['step'])}."
    losses = training.get("final_losses") or {}
    return [
        told,
        "",
        *_table(("exit layer", "final training loss"), [(n, _number(loss, 3)) for n, loss in losses.items()]),
        *_figure(report, "loss", "Loss during training"),
    ]


def _experts(report: Report) -> list[str]:
    experts = report.get("experts")
    if not experts:
        return []
    if not experts["load"]:
        return ["No layer of this model holds experts."]
    counts = [(layer, *(_number(count) for count in load)) for layer, load in experts["load"].items()]
    n_experts = len(counts[0]) - 1
    names = list(next(iter(experts["metrics"].values())))
    metrics = [(layer, *(_number(row[name], 3) for name in names)) for layer, row in experts["metrics"].items()]
    return [
        f"Choices that each expert got for {_number(experts['tokens'])} held-out tokens, and how even they are.",
        "",
        *(_table(("layer", *(f"expert {e}" for e in range(n_experts))), counts) if n_experts <= 16 else ()),
        *_table(("layer", *(name.replace("_", " ") for name in names)), metrics),
        *_figure(report, "expert_load", "Load per expert"),
    ]


def _continuations(report: Report) -> list[str]:
    lines = []
    for number, sample in enumerate(report.get("continuations") or [], start=1):
        lines += [f"### Prompt {number}", "", *_fenced(sample["prompt"]), "Plain decoding:", ""]
        lines += _fenced(sample["plain"])
        if sample["self_speculative"] == sample["plain"]:
            lines += ["Self-speculative decoding: the same text.", ""]
        else:
            lines += ["Self-speculative decoding:", "", *_fenced(sample["self_speculative"])]
    return lines


def _model(report: Report) -> list[str]:
    lines = []
    corpus, model = report.get("corpus"), report.get("model")
    if corpus:
        lines += [
            f"Text: {corpus['name']}, {_number(corpus['train_tokens'])} tokens for training and "
            f"{_number(corpus['validation_tokens'])} held out, a vocabulary of {_number(corpus['vocab_size'])}.",
            "",
        ]
    if model:
        lines += [
            f"Model: {_number(model['parameters'])} parameters, of which one token uses "
            f"{_number(model['active_parameters'])}.",
            "",
            *_settings("field", model["config"]),
        ]
    return lines


def _setting(report: Report) -> list[str]:
    lines = []
    if report.get("command"):
        lines += _fenced(report["command"])
    if report.get("constants"):
        lines += _settings("constant", report["constants"])
    if report.get("machine"):
        machine = dict(report["machine"])
        versions = machine.pop("versions", {})
        lines += _settings("machine", machine) + (_settings("package", versions) if versions else [])
    if report.get("seconds"):
        spent = [(stage, _number(seconds, 1)) for stage, seconds in report["seconds"].items()]
        lines += _table(("stage", "seconds"), spent)
    return lines


def _settings(title: str, settings: Report) -> list[str]:
    rows = [(f"`{name}`", "-" if value is None else str(value)) for name, value in settings.items()]
    return _table((title, "value"), rows)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table and an empty line after it; without rows, nothing."""
    lines = ["| " + " | ".join(map(_cell, row)) + " |" for row in rows]
    return [f"| {' | '.join(header)} |", "|" + " --- |" * len(header), *lines, ""] if lines else []


def _cell(text: str) -> str:
    return re.sub(r"\s*\n\s*", " ", text).replace("|", "\\|")


def _fenced(text: str) -> list[str]:
    """A code block whose fence is longer than any run of back-ticks within it, and an empty line after it."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return [fence, text, fence, ""]


def _figure(report: Report, name: str, title: str) -> list[str]:
    path = report["figures"].get(name)
    return [f"![{title}]({path})", ""] if path else []


def _number(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}%"
