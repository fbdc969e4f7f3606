"""The LayerSkip recipe over a run's steps, as far as a picture can show it: dropout rates, supervised exits.

L layers, S steps shown. Computed by the very functions that training calls. Knows nothing of drawing.
Next: `figures/recipe.py`, which draws it; `training/layer_dropout.py` and `training/exit_loss.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from layerskip_moe.training.exit_loss import active_exits, exit_weights
from layerskip_moe.training.layer_dropout import layer_dropout_rates

_SHOWN = 200  # steps at most, where the schedule is smooth between them
_ROTATIONS = 4  # shown of a rotational curriculum


@dataclass(frozen=True)
class RecipeSchedule:
    """What the recipe does at the steps shown.

    Attributes:
        dropout_steps: [S], evenly spaced over the run
        rates: [S][L], the probability that a sample skips each layer
        curriculum_steps: [S'], see `recipe_schedule`
        active: [S'][L], whether each layer's output is supervised
        weights: [S'][L], how much its loss weighs; each row's sum is 1
    """

    dropout_steps: list[int]
    rates: list[list[float]]
    curriculum_steps: list[int]
    active: list[list[bool]]
    weights: list[list[float]]


def recipe_schedule(recipe: Mapping[str, Any]) -> RecipeSchedule:
    """The schedule of a report's `recipe`.

    Dropout rates, and curricula that change little from step to step, are shown at up to 200 evenly spaced
    steps. The rotational curriculum changes at every step and repeats itself every `exit_rotation` steps:
    evenly spaced steps could all fall on the same turn, so its first four rotations are shown, step by step.
    Raises ValueError for settings that the schedules refuse.
    """
    steps, n_layers, config = recipe["steps"], recipe["n_layers"], recipe["train_config"]
    even = sorted({round(i * (steps - 1) / (_SHOWN - 1)) for i in range(_SHOWN)})
    curriculum_steps = even
    if config["exit_curriculum"] == "rotational":
        curriculum_steps = list(range(min(steps, _ROTATIONS * config["exit_rotation"])))
    rates = [
        layer_dropout_rates(
            step,
            steps,
            n_layers,
            p_max=config["layer_dropout_max"],
            depth=config["layer_dropout_depth"],
            time=config["layer_dropout_time"],
        )
        for step in even
    ]
    kind = {
        "kind": config["exit_weights"],
        "drafting_exit": config.get("drafting_exit"),  # which runs of before there was one did not write down
    }
    curriculum = {"curriculum": config["exit_curriculum"], "rotation": config["exit_rotation"]}
    active = [active_exits(step, steps, n_layers, **curriculum, **kind) for step in curriculum_steps]
    weights = [exit_weights(row, scale=config["exit_loss_scale"], **kind) for row in active]
    return RecipeSchedule(
        dropout_steps=even,
        rates=[row.tolist() for row in rates],
        curriculum_steps=curriculum_steps,
        active=[row.tolist() for row in active],
        weights=[row.tolist() for row in weights],
    )
