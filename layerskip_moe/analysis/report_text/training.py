"""How training went, where a step's time went, and the LayerSkip recipe over its steps.

Next: `training/config.py`, which documents the recipe's dials.
"""

from layerskip_moe.analysis.report_text.markdown import Report, figure, number, percent, short, table


def training_lines(report: Report) -> list[str]:
    """`training`, with the curves of metrics.jsonl; what there is of them where the section is partial or absent."""
    training = report.get("training")
    curves = figure(report, "loss", "Loss during training")
    if not training:
        return curves + figure(report, "step_parts", "Time per part of a training step")
    if "steps" not in training:
        return curves + _step_parts(report)
    best = training.get("best_validation")
    told = (
        f"{number(training['steps'])} steps in {number(training['seconds'], 1)} s, "
        f"{number(training['tokens_per_second'])} tokens/s."
    )
    if best:
        told += f" Best held-out perplexity: {number(best['perplexity'], 2)}, at step {number(best['step'])}."
    losses = training.get("final_losses") or {}
    return [
        told,
        "",
        *table(("exit layer", "final training loss"), [(n, number(loss, 3)) for n, loss in losses.items()]),
        *curves,
        *_step_parts(report),
    ]


def _step_parts(report: Report) -> list[str]:
    parts = report["training"].get("seconds_by_part")
    picture = figure(report, "step_parts", "Time per part of a training step")
    if not parts:
        return picture
    longest = max(parts, key=lambda part: parts[part])
    return [
        f"Where a step's time went, the mean over all steps; most of it into `{longest}`. Validations, checkpoints and "
        "reports happen between steps and are not in it.",
        "",
        *table(("part of a step", "ms"), [(part, number(1000 * seconds, 1)) for part, seconds in parts.items()]),
        *picture,
    ]


def recipe_lines(report: Report) -> list[str]:
    """`recipe`: layer dropout over depth and time, and which exits were supervised when."""
    recipe = report.get("recipe")
    if not recipe:
        return []
    config = recipe["train_config"]
    shown = report["findings"]["recipe"]["curriculum_steps"]
    lines = [_dropout(config), "", *figure(report, "layer_dropout", "Layer dropout over depth and time")]
    lines += [_curriculum(config, recipe["n_layers"]), ""]
    if shown < recipe["steps"]:
        which = "the first" if config["exit_curriculum"] == "rotational" else "evenly spaced,"
        lines += [f"The figure shows {which} {number(shown)} of {number(recipe['steps'])} steps.", ""]
    return lines + figure(report, "exit_curriculum", "Supervised exits by step")


def _dropout(config: Report) -> str:
    if config["layer_dropout_max"] == 0:
        return "No layer was dropped during training."
    dropped = {"block": "layer", "experts": "layer's MLP or experts"}[config["layer_dropout_part"]]
    return (
        f"Layer dropout: a sample skips a {dropped} with a probability that grows with depth "
        f"(`{config['layer_dropout_depth']}`) and over the steps (`{config['layer_dropout_time']}`), to at most "
        f"{percent(config['layer_dropout_max'])} at the last layer. These are the probabilities; what was drawn by "
        "them varies."
    )


def _curriculum(config: Report, n_layers: int) -> str:
    told = {
        "rotational": f"every layer whose turn it is, one in {config['exit_rotation']}, the turn moving up by a "
        "layer a step",
        "gradual": "from the last layer down, one more after the other, all from the middle of the run on",
        "all": "all layers at every step",
        "none": "the last layer only, so that no earlier one learns to be an exit",
    }[config["exit_curriculum"]]
    return (
        f"Supervised exits (`{config['exit_curriculum']}`): {told}; the last of the {n_layers} layers always. Weights: "
        f"`{config['exit_weights']}`, the early exits' scaled by {short(config['exit_loss_scale'])}."
    )
