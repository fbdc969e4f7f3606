"""Which pictures a report has the data for, and the drawing of them into its folder.

Knows nothing of what the pictures look like. Next: `figures/`, whose functions are called here.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerskip_moe.analysis import figures
from layerskip_moe.analysis.recipe_schedule import RecipeSchedule

if TYPE_CHECKING:
    from matplotlib.figure import Figure


FIGURES = (
    "loss",
    "step_parts",
    "layer_dropout",
    "exit_curriculum",
    "perplexity_by_exit",
    "early_exit",
    "confidence_by_layer",
    "exit_histogram",
    "exits_by_prompt",
    "acceptance_by_position",
    "speed_up_contour",
    "quality",
    "expert_load",
    "balance_over_training",
    "expert_tokens",
    "comparison",
)


def draw_figures(
    out_dir: Path,
    report: Mapping[str, Any],
    records: Sequence[Mapping[str, Any]],
    schedule: RecipeSchedule | None,
) -> dict[str, str]:
    """Draw a report's pictures: figure's name -> path within out_dir.

    records: of metrics.jsonl, none if there is no such file. schedule: of the report's `recipe`. Pictures of
    `FIGURES` that an earlier report left there, and that this one has no data for, are removed.
    """
    paths = {}

    def save(name: str, figure: "Figure") -> None:
        assert name in FIGURES
        paths[name] = f"figures/{name}.png"
        figures.save_figure(figure, out_dir / paths[name])

    train = [record for record in records if record["split"] == "train"]
    if train:
        validation = [record for record in records if record["split"] == "validation"]
        save("loss", figures.loss_curves(train, validation))
    if any(record.get("seconds") for record in train):
        save("step_parts", figures.step_parts(train))
    if schedule:
        if any(map(any, schedule.rates)):
            save("layer_dropout", figures.layer_dropout_schedule(schedule.rates, schedule.dropout_steps))
        curriculum = (schedule.active, schedule.weights, schedule.curriculum_steps)
        save("exit_curriculum", figures.exit_curriculum(*curriculum))

    exits = report.get("exits")
    if exits:
        save("perplexity_by_exit", figures.perplexity_by_exit(exits["perplexity"], exits["agreement"]))
    early_exit = report.get("early_exit")
    if early_exit:
        full = exits["perplexity"][-1] if exits else None
        save("early_exit", figures.early_exit_tradeoff(early_exit, full))
        held_out = early_exit["held_out"]
        if any(value is not None for value in held_out["confidence_mean"]):
            save("confidence_by_layer", figures.confidence_by_layer(held_out))
        save("exit_histogram", figures.exit_histogram(held_out))
        if early_exit.get("by_prompt"):
            save("exits_by_prompt", figures.exits_by_prompt(early_exit["by_prompt"]))

    sweep = report.get("sweep") or {}
    drafting = report.get("decoding") or []
    if sweep.get("by_position"):  # more exit layers and longer drafts than the setting that was chosen
        drafting = [{**sweep, "strategies": sweep["by_position"]}]
    if any(any(row.get("drafted_by_position") or []) for row in _rows(drafting)):
        save("acceptance_by_position", figures.acceptance_by_position(drafting))
    if sweep:
        save("speed_up_contour", figures.speed_up_contour(sweep))
    strategies = report.get("strategies") or []
    if any(row["perplexity"] is not None for row in _rows(strategies)):
        save("quality", figures.quality(strategies))

    load = (report.get("experts") or {}).get("load")
    if load:
        save("expert_load", figures.expert_heat_map(load))
    if any(record.get("load") for record in train):
        save("balance_over_training", figures.balance_over_training(train))
    if (report.get("expert_choice") or {}).get("layers"):
        save("expert_tokens", figures.expert_tokens(report["expert_choice"]))
    if report.get("comparison"):
        save("comparison", figures.comparison(report["comparison"]))
    for name in set(FIGURES) - set(paths):
        (out_dir / "figures" / f"{name}.png").unlink(missing_ok=True)
    return paths


def _rows(comparisons: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [row for comparison in comparisons for row in comparison["strategies"]]
