"""Drafting policies beside each other on one trace: the best fixed pair and the oracle, and who is where between them.

Every number is a replay's, so that it is the same each time, and differences between policies are theirs alone. Prompts
are a sample, which the intervals are about: percentiles of the figures of prompts drawn anew, with replacement, the
same draws for all policies. What is chosen on these prompts (the fixed pair, a published policy's exit layer) is not
chosen anew.

Knows nothing of files or models. Next: `replay.py`, `oracle.py`; `policy_tables.py`, which tells the result.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from layerskip_moe.analysis.margins import told_by_margin
from layerskip_moe.analysis.trace import Array, TracedText
from layerskip_moe.bench.oracle import fixed_seconds, oracle
from layerskip_moe.bench.replay import ReplayedRound, replay
from layerskip_moe.bench.rounds import RoundCost, TextRounds
from layerskip_moe.bench.trees import best_tree
from layerskip_moe.generation.cost_model import CostModel
from layerskip_moe.generation.policies import DEL, Adaptive, Cascade, DraftVerify, Fixed, Heuristic
from layerskip_moe.generation.policies.policy import Policy
from layerskip_moe.nn import ModelConfig

# Makes a policy that has learnt nothing yet.
MakePolicy = Callable[[], Policy]

PUBLISHED = ("Heuristic", "DraftVerify", "DEL", "Cascade")


def contenders(n_layers: int, cost: RoundCost) -> dict[str, list[MakePolicy]]:
    """The policies that are compared, by name; of several settings of one, the fastest is shown. `Adaptive` is among
    them where it can reckon with the cost model itself."""
    exits = range(1, n_layers)
    ours: dict[str, list[MakePolicy]] = {}
    if isinstance(cost, CostModel):
        ours["Adaptive"] = [partial(Adaptive, cost_model=cost)]
    return ours | {
        "Heuristic": [partial(Heuristic, n) for n in exits],
        "DraftVerify": [partial(DraftVerify, n) for n in exits],
        "DEL": [DEL],
        "Cascade": [partial(Cascade, n) for n in exits],
    }


@dataclass(frozen=True)
class PolicyRun:
    """What one policy made of all prompts.

    Attributes:
        name: what the caller calls it
        make: a new such policy; None for one that there is none of: a tree, and what knows the future
        setting: what is the fastest of several, in words; None where there was nothing to choose
        rounds: of each prompt
    """

    name: str
    make: MakePolicy | None
    setting: str | None
    rounds: list[list[ReplayedRound]]

    @property
    def seconds(self) -> list[float]:
        """Of each prompt, by the cost model."""
        return [sum(round.seconds for round in rounds) for rounds in self.rounds]


@dataclass(frozen=True)
class PolicyComparison:
    """Policies on the continuations of one temperature.

    Attributes:
        temperature: 0 is greedy
        tokens: new ones of each prompt
        exit_layers: of the fixed pairs
        draft_lengths: likewise, from 0
        fixed_seconds: [exit layers, draft lengths] of all prompts together
        runs: plain, best fixed, then the policies, the best tree, then the oracles of one exit layer and of all
        told: how well exits tell where they are right, as `told_by_margin` has it
        resamples: of the prompts, for the intervals
        seed: of these
    """

    temperature: float
    tokens: list[int]
    exit_layers: list[int]
    draft_lengths: list[int]
    fixed_seconds: Array
    runs: list[PolicyRun]
    told: list[dict[str, Any]]
    resamples: int
    seed: int

    def as_report(self) -> dict[str, Any]:
        """Plain values, all but the single rounds; see `policy_tables.py` for what they mean."""
        seconds = np.array([run.seconds for run in self.runs])  # [runs, prompts]
        drawn = np.random.default_rng(self.seed).integers(seconds.shape[1], size=(self.resamples, seconds.shape[1]))
        totals = seconds.sum(axis=1)
        resampled = seconds[:, drawn].sum(axis=2)  # [runs, resamples]
        names = [run.name for run in self.runs]
        plain, fixed, best = (names.index(name) for name in ("plain", "best fixed", "oracle"))
        rows = []
        for index, run in enumerate(self.runs):
            rows.append(
                {
                    "name": run.name,
                    "setting": run.setting,
                    "draftable": run.make is not None,
                    "tokens_per_second": sum(self.tokens) / float(totals[index]),
                    "speed_up": _interval(totals[plain] / totals[index], resampled[plain] / resampled[index]),
                    "share_of_way": _interval(*(_share(part, index, fixed, best) for part in (totals, resampled))),
                    "faster_than": {
                        other: _interval(
                            totals[names.index(other)] / totals[index] - 1,
                            resampled[names.index(other)] / resampled[index] - 1,
                        )
                        for other in PUBLISHED
                        if other in names and other != run.name
                    },
                    **_counts(run.rounds, sum(self.tokens)),
                }
            )
        return {
            "temperature": self.temperature,
            "prompts": len(self.tokens),
            "tokens": sum(self.tokens),
            "exit_layers": self.exit_layers,
            "draft_lengths": self.draft_lengths,
            "speed_up": (totals[plain] / self.fixed_seconds).tolist(),
            "rows": rows,
            "told": self.told,
            "resamples": self.resamples,
            "seed": self.seed,
        }


def compare_policies(
    texts: Sequence[TracedText],
    config: ModelConfig,
    cost: RoundCost,
    policies: Mapping[str, Sequence[MakePolicy]] | None = None,
    *,
    max_draft_length: int = 10,
    resamples: int = 10_000,
    seed: int = 0,
    progress: bool = True,
) -> PolicyComparison:
    """Replay every policy on continuations of one temperature, in their order; each is new at the first.

    policies: by name, as `contenders`, which None takes; max_draft_length: of the fixed pairs that are tried, at every
    exit layer below the last; resamples, seed: of the intervals.

    Raises ValueError without texts, for texts that are no continuations or of several temperatures, and for a model
    of one layer.
    """
    temperatures = {text.temperature for text in texts}
    if len(temperatures) != 1 or not all(text.is_own for text in texts):
        raise ValueError(
            f"policies are compared on continuations of one temperature; these are {len(texts)} texts of temperatures "
            f"{sorted(temperatures)}, {sum(text.is_own for text in texts)} of them continued."
        )
    for name, value in (("max_draft_length", max_draft_length), ("resamples", resamples)):
        if value < 1:
            raise ValueError(f"{name}={value} must be 1 or more.")
    exits, lengths = list(range(1, config.n_layers)), list(range(max_draft_length + 1))
    if not exits:
        raise ValueError("a model of one layer has none that could draft for the others.")
    rounds = [TextRounds(text, config, cost) for text in texts]
    tried = contenders(config.n_layers, cost) if policies is None else policies
    total = 2 + 2 * len(exits) + sum(map(len, tried.values()))
    with tqdm(total=total, desc="replaying policies", disable=not progress, leave=False) as bar:
        grid = []
        for exit_layer in exits:
            grid.append([sum(fixed_seconds(text, exit_layer, length) for text in rounds) for length in lengths])
            bar.update()
        seconds = np.array(grid)
        place, best_length = divmod(int(seconds.argmin()), len(lengths))

        def run_of(name: str, make: MakePolicy, setting: str | None = None) -> PolicyRun:
            policy = make()
            exit_layer = getattr(policy, "exit_layer", None)
            if setting is None and exit_layer is not None:
                setting = f"exit layer {exit_layer}"
            bar.update()
            return PolicyRun(name, make, setting, replay(rounds, policy, config))

        def oracle_of(name: str, layers: Sequence[int], setting: str | None = None) -> PolicyRun:
            bar.update()
            return PolicyRun(name, None, setting, [_as_rounds(text, oracle(text, layers)) for text in rounds])

        best = f"exit layer {exits[place]}, {best_length} drafts"
        runs = [
            PolicyRun("plain", partial(Fixed, 1, 0), None, replay(rounds, Fixed(1, 0), config)),
            run_of("best fixed", partial(Fixed, exits[place], best_length), best),
        ]
        for name, settings in tried.items():
            runs.append(_fastest([run_of(name, make) for make in settings]))
        if isinstance(cost, CostModel):
            setting, tree = best_tree(rounds, cost, exits, lengths)
            runs.append(PolicyRun("best tree", None, setting, tree))
        runs.append(_fastest([oracle_of("oracle of one", [layer], f"exit layer {layer}") for layer in exits]))
        runs.append(oracle_of("oracle", exits))
    return PolicyComparison(
        temperature=texts[0].temperature,
        tokens=[text.length for text in rounds],
        exit_layers=exits,
        draft_lengths=lengths,
        fixed_seconds=seconds,
        runs=runs,
        told=told_by_margin(texts),
        resamples=resamples,
        seed=seed,
    )


def _fastest(runs: Sequence[PolicyRun]) -> PolicyRun:
    return min(runs, key=lambda run: sum(run.seconds))


def _as_rounds(text: TextRounds, pairs: Sequence[tuple[int, int]]) -> list[ReplayedRound]:
    """Rounds whose drafts are all accepted, from the first place on."""
    rounds: list[ReplayedRound] = []
    place = 0
    for exit_layer, drafted in pairs:
        experts, seconds = text.experts(place, exit_layer, drafted), text.seconds(place, exit_layer, drafted)
        rounds.append(ReplayedRound(exit_layer, drafted, drafted, experts, seconds))
        place += drafted + 1
    return rounds


def _counts(rounds_by_prompt: Sequence[Sequence[ReplayedRound]], tokens: int) -> dict[str, Any]:
    """What a run's rounds come to."""
    rounds = [round for rounds in rounds_by_prompt for round in rounds]
    drafting = [round for round in rounds if round.drafted]
    drafted = sum(round.drafted for round in rounds)
    experts = [fmean(round.experts) for round in rounds if round.experts]
    return {
        "rounds": len(rounds),
        "drafted": drafted,
        "accepted": sum(round.accepted for round in rounds),
        "acceptance_rate": sum(round.accepted for round in rounds) / drafted if drafted else None,
        "tokens_per_round": tokens / len(rounds),
        "experts_per_token": sum(experts) / tokens if experts else None,
        "mean_exit_layer": fmean(round.exit_layer for round in drafting) if drafting else None,
        "mean_draft_length": drafted / len(rounds),
    }


def _share(seconds: Array, index: int, fixed: int, best: int) -> Any:
    """How far a run is on the way in tokens per second from one to another, of seconds [runs, ...]; nan where there is
    no way to go."""
    speeds = 1 / seconds
    with np.errstate(divide="ignore", invalid="ignore"):
        share = (speeds[index] - speeds[fixed]) / (speeds[best] - speeds[fixed])
    return np.where(speeds[best] > speeds[fixed], share, np.nan)


def _interval(value: Any, resampled: Array) -> dict[str, float]:
    """A figure and the middle 95% of its resamples."""
    low, high = np.quantile(resampled, [0.025, 0.975]).tolist()
    return {"value": float(value), "low": low, "high": high}
