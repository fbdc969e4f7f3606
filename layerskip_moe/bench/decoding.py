"""Decoding strategies timed side by side on the same model and prompts.

Measures what a single user waits for: batch 1, one prompt at a time. Knows nothing of what a strategy does.
Next: `generation/` for the strategies, `analysis/report.py` for how the result is told.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from statistics import median
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from layerskip_moe.analysis import ContinuationScore, distinct_ngrams, score_continuations
from layerskip_moe.bench.interleave import in_turn
from layerskip_moe.generation import Generation, GenerationStats, Strategy, generate
from layerskip_moe.nn import MoEDecoder

_WARM_UP_TOKENS = 16  # enough to touch every weight and every kernel


@dataclass(frozen=True)
class StrategyResult:
    """One strategy over all prompts. Medians are over prompts; counts are sums over them.

    Attributes:
        name: what the caller calls it
        exit_layer: the strategy's own, None for one that has none
        draft_length: likewise
        threshold: likewise
        tokens_per_second: median, decoding alone
        tokens_per_second_by_prompt: what it and `speed_up` are made from
        prefill_seconds: median time of running one prompt, which no other figure includes
        speed_up: median over prompts of this strategy's tokens/s over the baseline's on the same prompt
        speed_up_quartiles: the first and third quartile of those ratios
        mean_layers: layers run to choose a new token, on average; drafts are not counted
        drafted: tokens
        accepted: tokens
        acceptance_rate: accepted / drafted, None where nothing was drafted
        drafted_by_position: entry i: tokens drafted as the (i + 1)-th of a round
        accepted_by_position: how many of those were accepted
        tokens_per_verification: new tokens per choice of the strategy's last word, in most the full model's
        perplexity: of the outputs under the full model at temperature 1 (see `score_continuations`)
        agreement: share of the output tokens that are the full model's most likely ones after the same text
        distinct_4grams: `distinct_ngrams` of the outputs, None for outputs too short to have any
        identical: prompts whose output equals the baseline's
        first_differences: prompt -> first position at which its output is not the baseline's
        tokens: the outputs, token ids per prompt
        layers_run: how many layers ran to choose each of them
    """

    name: str
    exit_layer: int | None
    draft_length: int | None
    threshold: float | None
    tokens_per_second: float
    tokens_per_second_by_prompt: list[float]
    prefill_seconds: float
    speed_up: float
    speed_up_quartiles: tuple[float, float]
    mean_layers: float
    drafted: int
    accepted: int
    acceptance_rate: float | None
    drafted_by_position: list[int]
    accepted_by_position: list[int]
    tokens_per_verification: float
    perplexity: float
    agreement: float
    distinct_4grams: float | None
    identical: int
    first_differences: dict[int, int]
    tokens: list[list[int]]
    layers_run: list[list[int]]


@dataclass(frozen=True)
class DecodingComparison:
    """What was compared, and the result of each strategy, the baseline first."""

    prompts: int
    max_new_tokens: int
    temperature: float
    top_p: float | None
    seed: int
    strategies: list[StrategyResult]

    def as_report(self) -> dict[str, Any]:
        """The entry of a report's `decoding` list: everything but what there is of every token."""
        entry = asdict(self)
        for row in entry["strategies"]:
            del row["tokens"], row["layers_run"]
        return entry


def compare_decoding(
    model: MoEDecoder,
    prompts: Sequence[Sequence[int]],
    strategies: Mapping[str, Strategy],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float | None = None,
    seed: int = 0,
    progress: bool = True,
) -> DecodingComparison:
    """Time every strategy on every prompt; the first strategy is the baseline of the others.

    prompts: lists of token ids, each of which gets exactly max_new_tokens new ones. temperature, top_p: as in
    `generate`; prompt i is decoded with seed + i by all strategies.

    Each strategy first decodes a little of the first prompt untimed, to warm up. Then, prompt by prompt, each runs
    once, the order rotated from prompt to prompt so that over all prompts each stands as often early as late, as far
    as there are prompts enough: drift of the machine hits all about alike, and a ratio compares runs of one prompt.
    Garbage collection stays on, as it is for users; medians absorb it.

    Raises ValueError without prompts or strategies, and for what `generate` refuses.
    """
    if not strategies or not prompts:
        raise ValueError(
            f"There are {len(strategies)} strategies and {len(prompts)} prompts to compare; give at least one of each."
        )
    names = list(strategies)
    runs: dict[str, list[Generation]] = {name: [] for name in names}

    def decode(name: str, index: int, new_tokens: int = max_new_tokens) -> Generation:
        return generate(
            model,
            [prompts[index]],
            strategies[name],
            max_new_tokens=new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed + index,
        )

    total = (1 + len(prompts)) * len(names)
    with tqdm(total=total, desc="comparing decoding", disable=not progress, leave=False) as bar:
        for name in names:
            decode(name, 0, min(max_new_tokens, _WARM_UP_TOKENS))
            bar.update()
        for index in range(len(prompts)):
            for name in in_turn(names, index, len(prompts)):
                runs[name].append(decode(name, index))
                bar.update()
    baseline = runs[names[0]]

    @cache  # lossless strategies write the same text
    def score(outputs: tuple[tuple[int, ...], ...]) -> ContinuationScore:
        return score_continuations(model, prompts, outputs)

    return DecodingComparison(
        prompts=len(prompts),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        strategies=[
            _summarise(
                name,
                strategies[name],
                runs[name],
                baseline,
                score(tuple(tuple(run.tokens[0]) for run in runs[name])),
            )
            for name in names
        ],
    )


def first_difference(tokens: Sequence[int], others: Sequence[int]) -> int | None:
    """The first position where two outputs are not the same, the shorter one's end included; None if equal."""
    for position, (one, other) in enumerate(zip(tokens, others, strict=False)):
        if one != other:
            return position
    return None if len(tokens) == len(others) else min(len(tokens), len(others))


def _summarise(
    name: str, strategy: Strategy, runs: list[Generation], baseline: list[Generation], score: ContinuationScore
) -> StrategyResult:
    outputs = [run.tokens[0] for run in runs]
    speeds = [run.stats.tokens_per_second for run in runs]
    base_speeds = [run.stats.tokens_per_second for run in baseline]
    assert min(base_speeds) > 0, "without stop tokens every prompt gets new tokens, which take time"
    ratios = [speed / base for speed, base in zip(speeds, base_speeds, strict=True)]
    first_quartile, third_quartile = np.quantile(ratios, [0.25, 0.75]).tolist()
    counts = GenerationStats()
    for run in runs:
        counts.add_counts(run.stats)
    differences = {
        prompt: position
        for prompt, (output, run) in enumerate(zip(outputs, baseline, strict=True))
        if (position := first_difference(output, run.tokens[0])) is not None
    }
    return StrategyResult(
        name=name,
        exit_layer=getattr(strategy, "exit_layer", None),
        draft_length=getattr(strategy, "draft_length", None),
        threshold=getattr(strategy, "threshold", None),
        tokens_per_second=median(speeds),
        tokens_per_second_by_prompt=speeds,
        prefill_seconds=median(run.stats.prefill_seconds for run in runs),
        speed_up=median(ratios),
        speed_up_quartiles=(first_quartile, third_quartile),
        mean_layers=counts.mean_layers,
        drafted=counts.drafted,
        accepted=counts.accepted,
        acceptance_rate=counts.acceptance_rate if counts.drafted else None,
        drafted_by_position=counts.drafted_by_position,
        accepted_by_position=counts.accepted_by_position,
        tokens_per_verification=counts.tokens_per_round,
        perplexity=score.perplexity,
        agreement=score.agreement,
        distinct_4grams=distinct_ngrams(outputs, 4) if max(map(len, outputs)) >= 4 else None,
        identical=len(runs) - len(differences),
        first_differences=differences,
        tokens=outputs,
        layers_run=[run.layers_run[0] for run in runs],
    )
