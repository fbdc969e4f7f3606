"""Drafting policies beside each other on one trace: the best fixed pair and the oracle, and who is where between them.

Every number is a replay's, so that it is the same each time, and differences between policies are theirs alone. Prompts
are a sample, which the intervals are about: percentiles of the figures of prompts drawn anew, with replacement, the
same draws for all policies. What is chosen on these prompts (the fixed pair, a published policy's exit layer) is not
chosen anew.

Knows nothing of files or models. Next: `contenders.py`, `replay.py`, `oracle.py`; `policy_tables.py`, which tells the
result.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from layerskip_moe.analysis.margins import told_by_margin
from layerskip_moe.analysis.trace import Array, TracedText
from layerskip_moe.bench.contenders import PUBLISHED, MakePolicy, contenders
from layerskip_moe.bench.oracle import ForeseenRound, fixed_seconds, oracle
from layerskip_moe.bench.replay import ReplayedRound, replay
from layerskip_moe.bench.rounds import RoundCost, TextRounds
from layerskip_moe.bench.trees import best_tree
from layerskip_moe.generation.cost_model import CostModel
from layerskip_moe.generation.policies import Fixed
from layerskip_moe.generation.policies.exits import proposing_layers
from layerskip_moe.nn import ModelConfig

# What `share_of_way` leads to, from the best fixed pair: the best choice of pairs, and the best of every way to draft.
ORACLES = "oracle of pairs", "oracle"


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
        int8_exit_layers, int8_draft_lengths, int8_fixed_seconds: likewise, of int8 drafts; none where these were not
            recorded
        runs: plain, best fixed, then the policies, the best tree, then the oracles: of pairs of exit layer and draft
            length, as plans are; and of every way to draft, by one exit layer and by all
        told: how well exits tell where they are right, as `told_by_margin` has it
        resamples: of the prompts, for the intervals
        seed: of these
    """

    temperature: float
    tokens: list[int]
    exit_layers: list[int]
    draft_lengths: list[int]
    fixed_seconds: Array
    int8_exit_layers: list[int]
    int8_draft_lengths: list[int]
    int8_fixed_seconds: Array
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
        plain, fixed = names.index("plain"), names.index("best fixed")
        rows = []
        for index, run in enumerate(self.runs):
            rows.append(
                {
                    "name": run.name,
                    "setting": run.setting,
                    "draftable": run.make is not None,
                    "tokens_per_second": sum(self.tokens) / float(totals[index]),
                    "speed_up": _interval(totals[plain] / totals[index], resampled[plain] / resampled[index]),
                    "share_of_way": {
                        best: _interval(
                            *(_share(part, index, fixed, names.index(best)) for part in (totals, resampled))
                        )
                        for best in ORACLES
                    },
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
            "int8_exit_layers": self.int8_exit_layers,
            "int8_draft_lengths": self.int8_draft_lengths,
            "int8_speed_up": (totals[plain] / self.int8_fixed_seconds).tolist(),
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
    int8_cost: RoundCost | None = None,
    max_draft_length: int = 10,
    resamples: int = 10_000,
    seed: int = 0,
    progress: bool = True,
) -> PolicyComparison:
    """Replay every policy on continuations of one temperature, in their order; each is new at the first.

    policies: by name, as `contenders`, which None takes; int8_cost: of rounds of int8 drafts, for texts that have some;
    max_draft_length: of the fixed pairs that are tried, at every exit layer below the last; of int8 ones all lengths
    are that are recorded, at every exit layer; resamples, seed: of the intervals.

    Raises ValueError without texts, for texts that are no continuations or of several temperatures, for a model of one
    layer, and where a policy plans what `replay` refuses.
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
    exits, lengths = list(range(1, config.n_layers)), range(max_draft_length + 1)
    if not exits:
        raise ValueError("a model of one layer has none that could draft for the others.")
    rounds = [TextRounds(text, config, cost, int8_cost) for text in texts]
    most_int8 = min(text.most_int8 for text in rounds)
    int8_exits, int8_lengths = ([*exits, config.n_layers], range(most_int8 + 1)) if most_int8 else ([], range(0))
    proposing = proposing_layers(config.n_layers) if most_int8 else 0
    if policies is None:
        policies = contenders(config.n_layers, cost, int8_cost if most_int8 else None, most_int8)
    total = 2 + 2 * (len(exits) + len(int8_exits)) + 1 + sum(map(len, policies.values()))
    with tqdm(total=total, desc="replaying policies", disable=not progress, leave=False) as bar:

        def grid(layers: Sequence[int], lengths: Sequence[int], *, int8: bool) -> Array:
            """Seconds of every pair."""
            found = np.zeros((len(layers), len(lengths)))
            for at, exit_layer in enumerate(layers):
                found[at] = [sum(fixed_seconds(text, exit_layer, n, int8=int8) for text in rounds) for n in lengths]
                bar.update()
            return found

        def run_of(name: str, make: MakePolicy, setting: str | None = None) -> PolicyRun:
            policy = make()
            exit_layer = getattr(policy, "exit_layer", None)
            if setting is None and exit_layer is not None:
                setting = f"exit layer {exit_layer}" + ", int8" * getattr(policy, "int8_drafts", False)
            if isinstance(policy, Fixed) and policy.stage is not None:
                setting = f"exit layer {exit_layer}, {policy.draft_length} drafts, sure at {policy.stage.sure:g}"
            bar.update()
            return PolicyRun(name, make, setting, replay(rounds, policy, config))

        def oracle_of(
            name: str, layers: Sequence[int], int8_layers: Sequence[int], setting: str | None, *, pairs: bool = False
        ) -> PolicyRun:
            bar.update()
            foresee = partial(oracle, proposing=0 if pairs else proposing, lookup=not pairs)
            found = [_as_rounds(text, foresee(text, layers, int8_layers)) for text in rounds]
            return PolicyRun(name, None, setting, found)

        seconds, int8_seconds = grid(exits, lengths, int8=False), grid(int8_exits, int8_lengths, int8=True)
        fixed = _best_pair(exits, seconds, int8=False)
        if int8_exits and int8_seconds.min() < seconds.min():
            fixed = _best_pair(int8_exits, int8_seconds, int8=True)
        best = f"exit layer {fixed[0]}, {fixed[1]} drafts" + ", int8" * fixed[2]
        runs = [
            PolicyRun("plain", partial(Fixed, 1, 0), None, replay(rounds, Fixed(1, 0), config)),
            run_of("best fixed", partial(Fixed, *fixed), best),
        ]
        for name, settings in policies.items():
            runs.append(_fastest([run_of(name, make) for make in settings]))
        if isinstance(cost, CostModel):
            setting, tree = best_tree(rounds, cost, exits, lengths)
            runs.append(PolicyRun("best tree", None, setting, tree))
        runs.append(oracle_of("oracle of pairs", exits, int8_exits, None, pairs=True))
        ones = [oracle_of("oracle of one", [layer], [], f"exit layer {layer}") for layer in exits]
        ones += [oracle_of("oracle of one", [], [layer], f"exit layer {layer}, int8") for layer in int8_exits]
        runs.append(_fastest(ones))
        runs.append(oracle_of("oracle", exits, int8_exits, None))
    return PolicyComparison(
        temperature=texts[0].temperature,
        tokens=[text.length for text in rounds],
        exit_layers=exits,
        draft_lengths=list(lengths),
        fixed_seconds=seconds,
        int8_exit_layers=int8_exits,
        int8_draft_lengths=list(int8_lengths),
        int8_fixed_seconds=int8_seconds,
        runs=runs,
        told=told_by_margin(texts),
        resamples=resamples,
        seed=seed,
    )


def _best_pair(exits: Sequence[int], seconds: Array, *, int8: bool) -> tuple[int, int, bool]:
    """Exit layer and draft length of the least of seconds [exits, lengths from 0]."""
    place, length = divmod(int(seconds.argmin()), seconds.shape[1])
    return exits[place], length, int8


def _fastest(runs: Sequence[PolicyRun]) -> PolicyRun:
    return min(runs, key=lambda run: sum(run.seconds))


def _as_rounds(text: TextRounds, foreseen: Sequence[ForeseenRound]) -> list[ReplayedRound]:
    """What they are in a replay, from the first place on."""
    rounds: list[ReplayedRound] = []
    place = 0
    for exit_layer, drafted, int8, staged in foreseen:
        experts = text.experts(place, exit_layer, drafted, int8=int8)
        seconds = text.seconds(place, exit_layer, drafted, int8=int8, staged=staged)
        rounds.append(ReplayedRound(exit_layer, drafted, drafted, experts, seconds, int8))
        place += drafted + 1
    return rounds


def _counts(rounds_by_prompt: Sequence[Sequence[ReplayedRound]], tokens: int) -> dict[str, Any]:
    """What a run's rounds come to."""
    rounds = [round for rounds in rounds_by_prompt for round in rounds]
    drafting = [round for round in rounds if round.exit_layer and round.drafted]  # (or all were looked up)
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
        "int8_share": fmean(round.int8 for round in drafting) if drafting else None,
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
