"""Which experts are used, how evenly, and what each is chosen for.

Next: `training/balance.py`, which defines the measures of balance; `analysis/expert_choice.py`.
"""

from layerskip_moe.analysis.report_text.markdown import (
    Report,
    balance_name,
    figure,
    literal,
    number,
    percent,
    table,
)

_MANY_EXPERTS = 16  # beyond which a table by expert says less than the figure


def expert_lines(report: Report) -> list[str]:
    """`experts`, balance over training, and `expert_choice`."""
    return [*_load(report), *_over_training(report), *_choice(report)]


def _load(report: Report) -> list[str]:
    experts = report.get("experts")
    if not experts:
        return []
    if not experts["load"]:
        return ["No layer of this model holds experts."]
    counts = [(layer, *(number(count) for count in load)) for layer, load in experts["load"].items()]
    n_experts = len(counts[0]) - 1
    names = list(next(iter(experts["metrics"].values())))
    metrics = [(layer, *(number(row[name], 3) for name in names)) for layer, row in experts["metrics"].items()]
    header = ("layer", *(f"expert {e}" for e in range(n_experts)))
    return [
        f"Choices that each expert got for {number(experts['tokens'])} held-out tokens, and how even they are; "
        f"layers count from 0. {load_told(experts['metrics'])}",
        "",
        *(table(header, counts) if n_experts <= _MANY_EXPERTS else ()),
        *table(("layer", *map(balance_name, names)), metrics),
        *figure(report, "expert_load", "Load per expert"),
    ]


def load_told(metrics: Report) -> str:
    """Which layer is least even, and where no token chose an expert."""
    measured = {layer: row for layer, row in metrics.items() if row["max_violation"] is not None}
    if not measured:
        return "No layer was given a choice to make."
    worst = max(measured, key=lambda layer: measured[layer]["max_violation"])
    over = measured[worst]["max_violation"]
    if over == 0:
        told = "Every layer is perfectly even."
    else:
        told = (
            f"Least even is layer {worst}, whose busiest expert got {percent(over)} more than an even share "
            f"(MaxVio {number(over, 3)})."
        )
    dead = [layer for layer, row in measured.items() if row.get("dead_experts")]
    if dead:
        return f"{told} Experts that no token chose (dead) are in layer {', '.join(dead)}."
    return f"{told} No expert is without a choice."


def _over_training(report: Report) -> list[str]:
    found = report["findings"].get("balance_over_training")
    if not found:
        return []
    rows = [
        (balance_name(name), *(number(value, 3) for value in found[name]))
        for name in ("max_violation", "normalized_entropy", "dead_experts")
    ]
    header = ("mean over layers", *(f"after {number(step)} steps" for step in found["steps"]))
    first, last = found["max_violation"]
    if number(first, 3) == number(last, 3):
        told = "By MaxVio, the load was as even at the end of training as at its start"
    else:
        told = f"By MaxVio, the load became {'more' if last < first else '**less**'} even during training"
    entropies = found["normalized_entropy"]
    if (last - first) * (entropies[1] - entropies[0]) > 0:  # one falls with evenness, the other rises
        told += " (by entropy, which looks at all experts and not the busiest alone, it is the opposite)"
    return [
        "### Over training",
        "",
        f"{told}. These are loads of single training batches, each noisier than the load of a held-out text.",
        "",
        *table(header, rows),
        *figure(report, "balance_over_training", "Balance of the experts over training"),
    ]


def _choice(report: Report) -> list[str]:
    choice = report.get("expert_choice")
    if not choice or not choice["layers"]:
        return []
    layers = choice["layers"]
    depends = [(layer, percent(found["token_dependence"]), percent(found["chance"])) for layer, found in layers.items()]
    lines = [
        "### What experts are chosen for",
        "",
        f"Token dependence: on {number(choice['tokens'])} held-out tokens, the share of choices foretold by the token "
        "alone, as the experts that this token went to most in another part of the text; beside it the share that the "
        f"layer's busiest experts foretell, whatever the token. {_dependence_verdict(layers)} It says nothing of what "
        "an expert computes, nor whether the rest follows from context or from noise.",
        "",
        *table(("layer", "token dependence", "busiest experts"), depends),
        *figure(report, "expert_tokens", "How much the choice of experts depends on the token alone"),
    ]
    n_experts = max(len(found["experts"]) for found in layers.values())
    if n_experts > _MANY_EXPERTS:
        return [*lines, "The typical tokens of each expert are in `report.json`, for there are many experts.", ""]
    lines += [
        "Typical tokens of each expert, best first, and how often the expert was among those chosen for the token. The "
        "pick is of what stands out, not of all that an expert sees.",
        "",
    ]
    for layer, found in layers.items():
        rows = [
            (str(expert), ", ".join(f"{literal(token['text'])} {percent(token['share'])}" for token in tokens) or "-")
            for expert, tokens in enumerate(found["experts"])
        ]
        lines += [f"Layer {layer}:", "", *table(("expert", "typical tokens"), rows)]
    return lines


def _dependence_verdict(layers: Report) -> str:
    known = {n: row for n, row in layers.items() if None not in (row["token_dependence"], row["chance"])}
    if not known:
        return "There was too little text to tell."
    gain = {layer: row["token_dependence"] - row["chance"] for layer, row in known.items()}
    most = max(gain, key=lambda layer: gain[layer])
    share, chance = percent(known[most]["token_dependence"]), percent(known[most]["chance"])
    if gain[most] <= 0:
        return (
            f"**In no layer does the token foretell more than the busiest experts do** (at most {share} against "
            f"{chance})."
        )
    told = f"The token foretells most in layer {most}: {share} against {chance}."
    below = [layer for layer, more in gain.items() if more <= 0]
    return told + (f" It foretells no more than the busiest experts in layer {', '.join(below)}." if below else "")
