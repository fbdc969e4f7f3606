"""How fast each trained model of an ablation decodes: plainly, and by the best of a few exit layers and draft lengths.

Knows nothing of training, nor of the other models. Next: `runs.py`, which keeps the numbers; `summary.py`, which
compares them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from layerskip_moe.bench import compare_decoding, sweep_drafting
from layerskip_moe.data import Corpus
from layerskip_moe.generation import Autoregressive, Sampling, SelfSpeculative, Strategy, check_prompts
from layerskip_moe.nn import ModelConfig, MoEDecoder

# What is kept of the fastest pair; see `StrategyResult`.
_TOLD = (
    "exit_layer",
    "draft_length",
    "speed_up",
    "speed_up_quartiles",
    "acceptance_rate",
    "tokens_per_second",
    "tokens_per_verification",
    "distinct_4grams",
    "identical",
)


@dataclass(frozen=True)
class DecodingConfig:
    """How decoding is timed: on the same held-out prompts for every model.

    Attributes:
        draft_lengths: tokens per round that are tried, at an eighth, a quarter and a half of the layers
        num_prompts: held-out prompts that the fastest pair is timed on; it is picked on a third as many others
        prompt_length: tokens of each
        max_new_tokens: of each; half as many while picking
        temperatures: at which that is done, 0 being greedy; a fastest pair for each
        prompt_seed: of the choice of prompts, and of sampling
    """

    draft_lengths: tuple[int, ...] = (2, 4)
    num_prompts: int = 9
    prompt_length: int = 32
    max_new_tokens: int = 96
    temperatures: tuple[float, ...] = (0.0, 0.8)
    prompt_seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_prompts", "prompt_length", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be 1 or more.")
        if not self.draft_lengths or min(self.draft_lengths) < 1:
            raise ValueError(f"draft_lengths={list(self.draft_lengths)} must be whole numbers from 1 on, at least one.")
        if len(set(self.temperatures)) != len(self.temperatures):
            raise ValueError(f"temperatures={list(self.temperatures)} must differ from each other.")
        for temperature in self.temperatures:
            Sampling(temperature)

    def check(self, corpus: Corpus, networks: Sequence[ModelConfig]) -> None:
        """Raise ValueError for what `time_decoding` would refuse, before a model is trained for it."""
        prompts, _ = _prompts(corpus, self)
        for network in networks:
            check_prompts(prompts, network, self.max_new_tokens)


def time_decoding(
    model: MoEDecoder, corpus: Corpus, decoding: DecodingConfig, *, progress: bool = True
) -> list[dict[str, Any]]:
    """A dict for each temperature: the fastest pair's exit_layer and draft_length, picked on prompts of its own, and
    what `compare_decoding` found of it beside plain decoding, whose speed is plain_tokens_per_second.

    Raises ValueError as `DecodingConfig.check` does.
    """
    decoding.check(corpus, [model.config])
    return [_fastest(model, corpus, decoding, temperature, progress) for temperature in decoding.temperatures]


def _fastest(
    model: MoEDecoder, corpus: Corpus, decoding: DecodingConfig, temperature: float, progress: bool
) -> dict[str, Any]:
    n_layers = model.config.n_layers
    prompts, others = _prompts(corpus, decoding)
    settings: dict[str, Any] = {"temperature": temperature, "seed": decoding.prompt_seed, "progress": progress}
    swept = sweep_drafting(
        model,
        others,
        exit_layers=[-(-n_layers // part) for part in (8, 4, 2)],
        draft_lengths=decoding.draft_lengths,
        max_new_tokens=-(-decoding.max_new_tokens // 2),
        **settings,
    )
    fastest = SelfSpeculative(swept.chosen["exit_layer"], swept.chosen["draft_length"])
    strategies: dict[str, Strategy] = {"plain": Autoregressive(), "self-speculative": fastest}
    compared = compare_decoding(model, prompts, strategies, max_new_tokens=decoding.max_new_tokens, **settings)
    plainly, drafting = compared.strategies
    return {
        "temperature": temperature,
        **{name: getattr(drafting, name) for name in _TOLD},
        "prompts": compared.prompts,
        "plain_tokens_per_second": plainly.tokens_per_second,
    }


def _prompts(corpus: Corpus, decoding: DecodingConfig) -> tuple[list[list[int]], list[list[int]]]:
    """Held-out prompts to time, and others to pick a pair on."""
    more = -(-decoding.num_prompts // 3)
    both = corpus.validation_prompts(decoding.num_prompts + more, decoding.prompt_length, seed=decoding.prompt_seed)
    return both[: decoding.num_prompts], both[decoding.num_prompts :]
