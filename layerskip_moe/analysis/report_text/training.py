"""How training went, where a step's time went, and the LayerSkip recipe over its steps.

Next: `training/config.py`, which documents the recipe's dials.
"""

from layerskip_moe.analysis.report_text.markdown import Report, figure, number, percent, short, table
from layerskip_moe.training.exit_loss import usual_drafting_exit


def training_lines(report: Report) -> list[str]:
    """`training`, with the curves of metrics.jsonl; what there is of them where the section is partial or absent."""
    training = report.get("training")
    curves = figure(report, "loss", "Loss during training")
    if not training:
        return curves + figure(report, "step_parts", "Time per part of a training step")
    if "steps" not in training:
        return [*_skipped(training), *curves, *_step_parts(report)]
    best = training.get("best_validation")
    told = (
        f"{number(training['steps'])} steps in {number(training['seconds'], 1)} s, "
        f"{number(training['tokens_per_second'])} tokens/s, validations and checkpoints included."
    )
    if best:
        told += (
            f" Best held-out perplexity: {number(best['perplexity'], 2)}, after {number(best['step'])} steps"
            f"{_validation(report)}."
        )
    losses = training.get("final_losses") or {}
    of_one = "The losses below are of the last step's samples alone, at the exits that were supervised in it."
    return [
        told,
        "",
        *_skipped(training),
        *([of_one, ""] if losses else ()),
        *table(("exit layer", "final training loss"), [(n, number(loss, 3)) for n, loss in losses.items()]),
        *curves,
        *_step_parts(report),
    ]


def _skipped(training: Report) -> list[str]:
    """How many steps changed nothing, where there are any."""
    skipped = training.get("skipped_steps")
    if not skipped:
        return []
    was = "step was" if skipped == 1 else "steps were"
    return [f"{number(skipped)} {was} skipped, loss or gradient not being finite: the weights stayed as they were.", ""]


def _validation(report: Report) -> str:
    """On which text the best step was found, and what that means for the other perplexities."""
    config = (report.get("recipe") or {}).get("train_config") or {}
    told = ""
    if config.get("validation_windows"):
        told += f", on the first {number(config['validation_windows'])} windows of the held-out text"
        told += " or all of it, if shorter"
        if report.get("exits"):
            told += f" (under Exit layers it is over {number(report['exits']['tokens'])} tokens, hence another figure)"
    if config.get("keep_best"):
        told += (
            "; the weights after these steps are the ones kept, so they were picked on held-out text that this "
            "report measures on as well, which flatters its perplexities a little"
        )
    return told


def _step_parts(report: Report) -> list[str]:
    parts = report["training"].get("seconds_by_part")
    picture = figure(report, "step_parts", "Time per part of a training step")
    if not parts:
        return picture
    longest = max(parts, key=lambda part: parts[part])
    return [
        f"Where a step's time went, the mean over all steps; the largest part into `{longest}`. Validations, "
        "checkpoints and reports happen between steps and are not in it.",
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
    shown, highest = (report["findings"]["recipe"][name] for name in ("curriculum_steps", "highest_dropout"))
    lines = [_dropout(config, highest), "", *figure(report, "layer_dropout", "Layer dropout over depth and time")]
    lines += [_curriculum(config, recipe["n_layers"]), ""]
    if shown < recipe["steps"]:
        which = "the first" if config["exit_curriculum"] == "rotational" else "evenly spaced,"
        lines += [f"The figure shows {which} {number(shown)} of {number(recipe['steps'])} steps.", ""]
    return lines + figure(report, "exit_curriculum", "Supervised exits by step")


def _dropout(config: Report, highest: float) -> str:
    if highest == 0:
        return "No layer was dropped during training."
    dropped = {"block": "layer", "experts": "layer's MLP or experts"}[config["layer_dropout_part"]]
    depth, time = config["layer_dropout_depth"], config["layer_dropout_time"]
    over_depth = "is the same at all layers" if depth == "uniform" else f"grows with depth (`{depth}`)"
    over_time = "is the same at all steps" if time == "uniform" else f"grows over the steps (`{time}`)"
    most = f"it is {percent(highest)}"
    if time != "uniform":
        most += " at the last step"
    if depth != "uniform":
        most += f"{' and' if time != 'uniform' else ' at'} the last layer"
    return (
        f"Layer dropout: a sample skips a {dropped} with a probability that {over_depth} and {over_time}; {most}. "
        "These are the probabilities; what was drawn by them varies."
    )


def _curriculum(config: Report, n_layers: int) -> str:
    curriculum, rotation = config["exit_curriculum"], config["exit_rotation"]
    told = {
        "rotational": f"every layer whose turn it is, one in {rotation}, the turn moving up by a layer a step",
        "gradual": "from the last layer down, one more after the other, all from the middle of the run on",
        "all": "all layers at every step",
        "none": "the last layer only, so that no earlier one learns to be an exit",
    }["all" if curriculum == "rotational" and rotation == 1 else curriculum]
    always = "the exit that is to draft and " if config["exit_weights"] == "drafting" else ""
    lines = f"Supervised exits (`{curriculum}`): {told}; {always}the last of the {n_layers} layers always."
    if curriculum == "none" or n_layers == 1:
        return lines
    scale = config["exit_loss_scale"]
    if scale == 0:
        return f"{lines} But the early exits' losses are scaled by 0, so that only the last layer learns to be an exit."
    if config["exit_weights"] == "equal":
        weights = f"each early exit {short(scale)}, the last layer 2"
    elif config["exit_weights"] == "drafting":
        drafting = config["drafting_exit"] or usual_drafting_exit(n_layers)
        weights = f"exit layer {drafting}, which is to draft, {short(scale)}, the last layer 2, the others 0"
    else:
        weights = f"they grow with depth, the early exits' scaled by {short(scale)}; layer 1 has weight 0, so that it "
        weights += "is never supervised"
    return f"{lines} Weights (`{config['exit_weights']}`), before they are normalised to a sum of 1: {weights}."
