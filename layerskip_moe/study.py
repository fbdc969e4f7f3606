"""Everything a report says about a trained model: what it is, and what is measured in one go, held-out text first,
then decoding.

What is measured lives in `analysis/` and `bench/`; here it is decided on how much. Knows nothing of how a model is
trained, nor of files. Next: `analysis/report.py`, whose sections these are; `main.py` and `cli/report.py`, which ask.
"""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from layerskip_moe.analysis import evaluate_early_exit, evaluate_exits, expert_choice, expert_use
from layerskip_moe.bench import compare_decoding, describe_machine, sweep_drafting
from layerskip_moe.data import Corpus
from layerskip_moe.generation import (
    Autoregressive,
    EarlyExit,
    LayerSkipping,
    Sampling,
    SelfSpeculative,
    Strategy,
    check_prompts,
)
from layerskip_moe.nn import ModelConfig, MoEDecoder
from layerskip_moe.nn.compiling import compiling
from layerskip_moe.nn.int8_copies import are_made_unasked, why_no_int8
from layerskip_moe.training import TrainResult


@dataclass(frozen=True)
class StudyConfig:
    """On how much text, and with which settings, a model is measured.

    Attributes:
        seq_len: tokens per window of held-out text, as the model was trained with
        batch_size: windows at a time
        max_windows: windows of held-out text that are read, 2 or more
        exit_layer: layers that draft; None: the sweep finds the fastest
        draft_length: tokens drafted per round; None: the sweep finds the fastest
        draft_lengths: what the sweep tries, at about the first half of the layers
        num_prompts: held-out prompts that the main comparison decodes; the sweep has a fifth as many, others, and
            the lossy strategies are tried on a quarter of them
        prompt_length: tokens of each
        max_new_tokens: of the main comparison; the others get half as many
        temperature: of the sampled comparisons; the others are greedy
        thresholds: of dynamic early exit, rising
        seed: of prompts and sampling
    """

    seq_len: int = 128
    batch_size: int = 8
    max_windows: int = 200
    exit_layer: int | None = None
    draft_length: int | None = None
    draft_lengths: tuple[int, ...] = (1, 2, 4)
    num_prompts: int = 20
    prompt_length: int = 32
    max_new_tokens: int = 128
    temperature: float = 0.8
    thresholds: tuple[float, ...] = (0.05, 0.1, 0.2, 0.5, 0.9)
    seed: int = 0

    def check(self, model: ModelConfig, corpus: Corpus) -> None:
        """Raise ValueError for what `study` would refuse, before a model is trained for it."""
        if self.temperature == 0:
            raise ValueError("temperature=0 is greedy, which is compared in any case; give one above 0, such as 0.8.")
        Sampling(self.temperature)
        if self.max_windows < 2:
            raise ValueError(f"max_windows={self.max_windows} must be 2 or more: one half foretells the other.")
        if len(corpus.validation) <= 2 * self.seq_len:
            raise ValueError(
                f"the held-out text has {len(corpus.validation)} tokens, too few for two windows of "
                f"seq_len={self.seq_len}; lower seq_len, or give more text."
            )
        if self.num_prompts < 1:
            raise ValueError(f"num_prompts={self.num_prompts} must be 1 or more.")
        if self.prompt_length < 1:
            raise ValueError(f"prompt_length={self.prompt_length} must be 1 or more.")
        if not self.thresholds or not self.draft_lengths:
            raise ValueError("give at least one threshold to exit at, and at least one draft length to try.")
        for threshold in self.thresholds:
            EarlyExit(threshold)
        if list(self.thresholds) != sorted(set(self.thresholds)):
            raise ValueError(f"thresholds={list(self.thresholds)} must rise, each once.")
        check_prompts(_prompts(corpus, self)[0], model, self.max_new_tokens)
        for length in self.draft_lengths if self.draft_length is None else [self.draft_length]:
            SelfSpeculative(1 if self.exit_layer is None else self.exit_layer, length).check(model)


def describe(model: MoEDecoder, corpus: Corpus) -> dict[str, Any]:
    """The report's sections machine, model and corpus. The machine's device is the one the model is on."""
    parameters, active_parameters = model.parameter_counts()
    return {
        "machine": describe_machine(model.device),
        "model": {"parameters": parameters, "active_parameters": active_parameters, "config": model.config},
        "corpus": {
            "name": corpus.name,
            "train_tokens": len(corpus.train),
            "validation_tokens": len(corpus.validation),
            "vocab_size": corpus.vocab_size,
        },
    }


def study(
    model: MoEDecoder, corpus: Corpus, config: StudyConfig, *, whole: bool = True, progress: bool = True
) -> dict[str, Any]:
    """The report's sections exits, experts, sweep, decoding and continuations; where `whole`, also expert_choice,
    early_exit and strategies; and seconds of both stages. Raises ValueError as `StudyConfig.check` does.

    The setting of self-speculative decoding is picked by the sweep, and stated on other prompts.
    """
    config.check(model.config, corpus)
    prompts, sweep_prompts = _prompts(corpus, config)
    started = time.perf_counter()
    text: dict[str, Any] = {
        "seq_len": config.seq_len,
        "batch_size": config.batch_size,
        "max_windows": config.max_windows,
        "progress": progress,
    }
    report: dict[str, Any] = {
        "exits": evaluate_exits(model, corpus.validation, **text),
        "experts": expert_use(model, corpus.validation, **text),
    }
    if whole:
        report["expert_choice"] = expert_choice(model, corpus.validation, corpus.tokenizer, **text)
        held_out = evaluate_early_exit(model, corpus.validation, thresholds=config.thresholds, **text)
    evaluated = time.perf_counter()

    report["sweep"], setting = _sweep(model, sweep_prompts, config, progress)
    strategies: dict[str, Strategy] = {
        "plain": Autoregressive(),
        "self-speculative": setting,
        "self-speculative, adaptive": SelfSpeculative(),
    }
    with compiling(model):
        if why_no_int8(model) is None and are_made_unasked(model):  # else that is what it does
            strategies["self-speculative, adaptive, no int8"] = SelfSpeculative(int8_drafts=False)
    settings: dict[str, Any] = {"max_new_tokens": config.max_new_tokens, "seed": config.seed, "progress": progress}
    greedy = compare_decoding(model, prompts, strategies, **settings)
    sampled = compare_decoding(model, prompts, strategies, temperature=config.temperature, **settings)
    report["decoding"] = [greedy.as_report(), sampled.as_report()]
    report["continuations"] = [
        {
            "prompt": corpus.tokenizer.decode(prompts[i]),
            "plain": corpus.tokenizer.decode(greedy.strategies[0].tokens[i]),
            "self_speculative": corpus.tokenizer.decode(greedy.strategies[1].tokens[i]),
        }
        for i in range(min(3, len(prompts)))
    ]
    if whole:
        few = prompts[: max(len(prompts) // 4, 1)]
        settings["max_new_tokens"] = max(config.max_new_tokens // 2, 1)
        report["early_exit"] = _early_exit(model, few, config, settings) | {"held_out": asdict(held_out)}
        every = strategies | _lossy(model.config, config)
        compared = compare_decoding(model, few, every, temperature=config.temperature, **settings)
        report["strategies"] = [compared.as_report()]
    report["seconds"] = {"evaluation": evaluated - started, "decoding": time.perf_counter() - evaluated}
    return report


def side_by_side(
    with_layerskip: TrainResult,
    found: Mapping[str, Any],
    without: TrainResult,
    found_without: Mapping[str, Any],
    *,
    seed: int,
) -> dict[str, Any]:
    """The report's `comparison`: two runs of the same network over the same steps, and what `study` found of each."""
    assert with_layerskip.steps == without.steps, "a comparison is at equal steps"
    runs = [("with LayerSkip", with_layerskip, found), ("without LayerSkip", without, found_without)]
    return {
        "steps": with_layerskip.steps,
        "seed": seed,
        "runs": [
            {
                "name": name,
                "perplexity": of["exits"].perplexity,
                "agreement": of["exits"].agreement,
                "best_step": result.best_step,
                "experts": of["experts"].metrics,
                "decoding": of["decoding"],
                "seconds": result.seconds,
            }
            for name, result, of in runs
        ],
    }


def _prompts(corpus: Corpus, config: StudyConfig) -> tuple[list[list[int]], list[list[int]]]:
    """Held-out prompts of the comparisons, and others of the sweep."""
    more = max(config.num_prompts // 5, 1)
    try:
        both = corpus.validation_prompts(config.num_prompts + more, config.prompt_length, seed=config.seed)
    except ValueError as error:
        raise ValueError(f"num_prompts={config.num_prompts}, and {more} for the sweep, are too many. {error}") from None
    return both[: config.num_prompts], both[config.num_prompts :]


def _sweep(
    model: MoEDecoder, prompts: list[list[int]], config: StudyConfig, progress: bool
) -> tuple[dict[str, Any] | None, SelfSpeculative]:
    """The fastest setting, at the sampled temperature: greedy text of small models loops, and loops are easy to
    draft. A setting that was given whole needs no sweep."""
    if config.exit_layer is not None and config.draft_length is not None:
        return None, SelfSpeculative(config.exit_layer, config.draft_length)
    half = max(model.config.n_layers // 2, 1)
    layers = range(1, half + 1, -(-half // 5)) if config.exit_layer is None else [config.exit_layer]
    swept = sweep_drafting(
        model,
        prompts,
        exit_layers=layers,
        draft_lengths=config.draft_lengths if config.draft_length is None else [config.draft_length],
        max_new_tokens=max(config.max_new_tokens // 2, 1),
        temperature=config.temperature,
        seed=config.seed,
        progress=progress,
    )
    chosen = SelfSpeculative(swept.chosen["exit_layer"], swept.chosen["draft_length"])
    return swept.as_report(), chosen


def _lossy(model: ModelConfig, config: StudyConfig) -> dict[str, Strategy]:
    """Ways to decode that change the text, each leaving out about as much as a small network can bear."""
    n_layers = model.n_layers
    threshold = config.thresholds[_middle(config)]
    strategies: dict[str, Strategy] = {
        f"early exit at {threshold}": EarlyExit(threshold),
        f"early exit at {threshold}, exact cache": EarlyExit(threshold, cache="exact"),
    }
    if n_layers >= 2:
        strategies[f"first {n_layers // 2} layers alone"] = Autoregressive(exit_layer=n_layers // 2)
    if n_layers >= 4:
        strategies["without every 4th layer"] = LayerSkipping(every=4)
        strategies[f"without {n_layers // 4} layers at random"] = LayerSkipping(random=n_layers // 4)
    return strategies


def _early_exit(
    model: MoEDecoder, prompts: list[list[int]], config: StudyConfig, settings: dict[str, Any]
) -> dict[str, Any]:
    """Decoding at every threshold, and at the middle one where the tokens of each prompt left. At the sampled
    temperature: the loops of greedy text are easy to leave early."""
    exits: dict[str, Strategy] = {f"threshold {threshold}": EarlyExit(threshold) for threshold in config.thresholds}
    strategies = {"plain": Autoregressive()} | exits
    compared = compare_decoding(model, prompts, strategies, temperature=config.temperature, **settings)
    middle = compared.strategies[1 + _middle(config)]
    layers = range(1, model.config.n_layers + 1)
    return {
        "confidence": "softmax_diff",
        "min_layer": 1,
        "cache": "propagate",
        "decoding": compared.as_report(),
        "by_prompt": {
            "threshold": middle.threshold,
            "exits": [[run.count(layer) for layer in layers] for run in middle.layers_run],
        },
    }


def _middle(config: StudyConfig) -> int:
    """Which threshold stands for all, where there is room for one."""
    return (len(config.thresholds) - 1) // 2
