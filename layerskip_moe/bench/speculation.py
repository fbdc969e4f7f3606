"""Self-speculative decoding as a user meets it: by `SelfSpeculative()`, beside plain decoding and beside the best fixed
pair of exit layer and draft length, on several texts; where no draft is ever right; and in a batch.

Everything is timed as `generate` times it, strategies in turn, prompt by prompt; ratios are of the same prompt.
Knows nothing of files. Next: `decoding.py`, which times; `speculation_tables.py`, which tells.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import product
from statistics import median
from typing import Any

import numpy as np
from torch import Tensor
from tqdm.auto import tqdm

from layerskip_moe.bench.decoding import DecodingComparison, compare_decoding
from layerskip_moe.bench.interleave import in_turn
from layerskip_moe.generation import Autoregressive, SelfSpeculative, Session, Strategy, generate, self_speculative
from layerskip_moe.generation.policies.exits import candidate_exits
from layerskip_moe.generation.verification import Round
from layerskip_moe.nn import MoEDecoder
from layerskip_moe.nn.compiling import compiling
from layerskip_moe.nn.int8_copies import why_no_int8
from layerskip_moe.nn.ragged import Judged


@dataclass(frozen=True)
class SpeculationSettings:
    """What is decoded.

    Attributes:
        num_prompts: prompts of each text
        prompt_length: tokens of each
        max_new_tokens: decoded after each
        temperatures: at which that is done; 0 is greedy
        draft_lengths: of the fixed pairs, at the exit layers that `Adaptive` tries
        int8_draft_lengths: of fixed pairs whose drafts are int8, at the last of these layers and at the last of all
        wrong_tokens: decoded where no draft is ever right
        wrong_repeats: how often that is done with each prompt, each time with another seed
        batch_size: prompts of the batch, whose lengths differ
        batches: how many, each of other prompts
        seed: of prompts and of sampling
    """

    num_prompts: int = 20
    prompt_length: int = 32
    max_new_tokens: int = 128
    temperatures: tuple[float, ...] = (0.0, 0.8)
    draft_lengths: tuple[int, ...] = (1, 2, 3, 4, 6)
    int8_draft_lengths: tuple[int, ...] = (7, 15)
    wrong_tokens: int = 512
    wrong_repeats: int = 3
    batch_size: int = 8
    batches: int = 10
    seed: int = 0


def speculation_benchmark(
    model: MoEDecoder,
    texts: Mapping[str, Sequence[Sequence[int]]],
    settings: SpeculationSettings,
    *,
    progress: bool = True,
) -> dict[str, Any]:
    """{rows: one for each text and temperature, wrong: one for each temperature, batch: likewise}.

    texts: prompts by the text they are from, as many as num_prompts; the first one's serve the rest, too.
    """
    rows, wrong, batch = [], [], []
    prompts = next(iter(texts.values()))
    for temperature in settings.temperatures:
        rows += [
            {"text": name, **_text_row(model, some, temperature, settings, progress)} for name, some in texts.items()
        ]
        with drafts_never_right():
            compared = compare_decoding(
                model,
                [*prompts] * settings.wrong_repeats,
                {"plain": Autoregressive(), "adaptive": SelfSpeculative()},
                max_new_tokens=settings.wrong_tokens,
                temperature=temperature,
                seed=settings.seed,
                progress=progress,
            )
        wrong.append(_row(compared, "adaptive"))
        batch.append(_batch_row(model, prompts, temperature, settings, progress))
    return {"rows": rows, "wrong": wrong, "batch": batch}


def _text_row(
    model: MoEDecoder,
    prompts: Sequence[Sequence[int]],
    temperature: float,
    settings: SpeculationSettings,
    progress: bool,
) -> dict[str, Any]:
    """Adaptive beside plain decoding and all fixed pairs; the best of these is chosen on the very same prompts."""
    exits, n_layers = candidate_exits(model.config.n_layers), model.config.n_layers
    fixed: dict[str, SelfSpeculative] = {}
    for layer, length in product(exits, settings.draft_lengths):
        fixed[f"{layer}, {length}"] = SelfSpeculative(layer, length)
    with compiling(model):
        can_be_int8 = why_no_int8(model) is None
    for layer, length in product((*exits[-1:], n_layers), settings.int8_draft_lengths if can_be_int8 else ()):
        fixed[f"{layer}, {length}, int8"] = SelfSpeculative(layer, length, int8_drafts=True)
    strategies: dict[str, Strategy] = {"plain": Autoregressive(), "adaptive": SelfSpeculative(), **fixed}
    compared = compare_decoding(
        model,
        prompts,
        strategies,
        max_new_tokens=settings.max_new_tokens,
        temperature=temperature,
        seed=settings.seed,
        progress=progress,
    )
    best = max(compared.strategies[2:], key=lambda result: result.speed_up)
    adaptive = compared.strategies[1]
    ratios = _ratios(adaptive.tokens_per_second_by_prompt, best.tokens_per_second_by_prompt)
    return {
        **_row(compared, "adaptive"),
        "best_fixed": _row(compared, best.name),
        "over_best_fixed": ratios,
        "grid": [
            {
                "exit_layer": result.exit_layer,
                "draft_length": result.draft_length,
                "int8": bool(fixed[result.name].int8_drafts),
                "speed_up": result.speed_up,
            }
            for result in compared.strategies[2:]
        ],
        "identical_in_grid": sum(result.identical for result in compared.strategies[1:]),
        "outputs_in_grid": compared.prompts * (len(compared.strategies) - 1),
    }


def _row(compared: DecodingComparison, name: str) -> dict[str, Any]:
    """Plain values of one strategy of a comparison."""
    result = next(result for result in compared.strategies if result.name == name)
    values = asdict(result)
    kept = ("name", "tokens_per_second", "speed_up", "speed_up_quartiles", "acceptance_rate", "tokens_per_verification")
    return {
        "temperature": compared.temperature,
        "prompts": compared.prompts,
        "tokens": compared.max_new_tokens,
        "plain_tokens_per_second": compared.strategies[0].tokens_per_second,
        **{key: values[key] for key in (*kept, "distinct_4grams", "identical")},
    }


def _ratios(ours: Sequence[float], others: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of the ratios of each prompt."""
    ratios = [one / other for one, other in zip(ours, others, strict=True)]
    low, high = np.quantile(ratios, [0.25, 0.75]).tolist()
    return {"median": median(ratios), "low": low, "high": high}


def _batch_row(
    model: MoEDecoder,
    prompts: Sequence[Sequence[int]],
    temperature: float,
    settings: SpeculationSettings,
    progress: bool,
) -> dict[str, Any]:
    """Batches of prompts of different lengths: adaptive over plain, in turn."""
    size = min(settings.batch_size, len(prompts))
    strategies: dict[str, Strategy] = {"plain": Autoregressive(), "adaptive": SelfSpeculative()}
    speeds: dict[str, list[float]] = {name: [] for name in strategies}
    identical = 0
    for turn in tqdm(range(-1, settings.batches), desc="batch", disable=not progress, leave=False):
        outputs, batch = {}, random.Random(settings.seed + turn).sample(prompts, size)
        ragged = [prompt[: max(len(prompt) * (index + 1) // size, 1)] for index, prompt in enumerate(batch)]
        for name in in_turn(list(strategies), max(turn, 0), settings.batches):
            out = generate(
                model,
                ragged,
                strategies[name],
                max_new_tokens=settings.max_new_tokens,
                temperature=temperature,
                seed=settings.seed + turn + 1,
            )
            outputs[name] = out.tokens
            if turn >= 0:  # the first is to warm up
                speeds[name].append(out.stats.tokens_per_second)
        identical += sum(map(list.__eq__, outputs["plain"], outputs["adaptive"])) if turn >= 0 else 0
    return {
        "temperature": temperature,
        "batch_size": size,
        "batches": settings.batches,
        "plain_tokens_per_second": median(speeds["plain"]),
        "tokens_per_second": median(speeds["adaptive"]),
        "speed_up": _ratios(speeds["adaptive"], speeds["plain"]),
        "identical": identical,
        "outputs": size * settings.batches,
    }


@contextmanager
def drafts_never_right() -> Iterator[None]:
    """For a while, no draft is accepted, and no exit seems to have been right. All is computed as always, to no
    avail."""
    settle, in_one_call = Round.settle, self_speculative.draft_and_verify
    shadow, agreement = self_speculative.shadow_tokens, Session.prompt_agreement

    def refused(round_: Round, logits: Tensor) -> tuple[Tensor, list[int]]:
        tokens, accepted = settle(round_, logits)
        return tokens, [0] * len(accepted)

    def refused_in_one_call(*arguments: Any) -> tuple[Any, ...]:
        tokens, accepted, judged, *how = in_one_call(*arguments)
        wrong = None if judged is None else [[(margin, False) for margin, _ in of_row[:1]] for of_row in judged]
        return tokens, [0] * len(accepted), wrong, *how

    def wrong_shadow(session: Session, *arguments: Any) -> tuple[Tensor, Tensor]:
        said, margins = shadow(session, *arguments)
        said[:, :-1] = said[:, :-1].where(said[:, :-1] < 0, (said[:, :-1] + 1) % session.model.config.vocab_size)
        return said, margins

    def none_right(session: Session, exits: Sequence[int]) -> list[dict[int, list[Judged]]]:
        return [
            {exit_layer: [(margin, False) for margin, _ in judged] for exit_layer, judged in by_exit.items()}
            for by_exit in agreement(session, exits)
        ]

    with (
        _put(Round, "settle", refused),
        _put(self_speculative, "draft_and_verify", refused_in_one_call),
        _put(self_speculative, "shadow_tokens", wrong_shadow),
        _put(Session, "prompt_agreement", none_right),
    ):
        yield


@contextmanager
def _put(owner: Any, name: str, value: Any) -> Iterator[None]:
    """For a while, another attribute of a class or a module."""
    own = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, own)
