"""What is measured of each trained model of an ablation: its exits, the experts that neighbouring rows need, and how
much faster the best of a few exit layers and draft lengths decodes.

Knows nothing of training. Next: `summary.py`, which compares; `study.py`, which measures one model more fully.
"""

from dataclasses import asdict, dataclass
from typing import Any

from layerskip_moe.analysis import evaluate_exits, expert_union
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
class MeasureConfig:
    """How a trained model is measured. The text is cut into windows of the recipe's seq_len.

    Attributes:
        max_windows: windows of held-out text
        spans: adjacent rows whose experts are counted together
        draft_lengths: tokens per round that are tried, at an eighth, a quarter and a half of the layers
        num_prompts: held-out prompts that the fastest pair is timed on; it is picked on a third as many others
        prompt_length: tokens of each
        max_new_tokens: of each; half as many while picking
        temperatures: at which that is done, 0 being greedy; a fastest pair for each
    """

    max_windows: int = 100
    spans: tuple[int, ...] = (2, 4, 8)
    draft_lengths: tuple[int, ...] = (2, 4)
    num_prompts: int = 9
    prompt_length: int = 32
    max_new_tokens: int = 96
    temperatures: tuple[float, ...] = (0.0, 0.8)

    def __post_init__(self) -> None:
        for name in ("max_windows", "num_prompts", "prompt_length", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be 1 or more.")
        for name in ("spans", "draft_lengths"):
            if not getattr(self, name) or min(getattr(self, name)) < 1:
                raise ValueError(f"{name}={list(getattr(self, name))} must be whole numbers from 1 on, at least one.")
        if len(set(self.temperatures)) != len(self.temperatures):
            raise ValueError(f"temperatures={list(self.temperatures)} must differ from each other.")
        for temperature in self.temperatures:
            Sampling(temperature)

    def check(self, network: ModelConfig, corpus: Corpus, *, seq_len: int, seed: int) -> None:
        """Raise ValueError for what `measure` would refuse, before a model is trained for it."""
        if len(corpus.validation) <= seq_len:
            raise ValueError(
                f"the held-out text has {len(corpus.validation)} tokens, too few for a window of seq_len={seq_len}; "
                "lower seq_len, or give more text."
            )
        if max(self.spans) > seq_len:
            raise ValueError(f"spans={list(self.spans)} must all be within a window of seq_len={seq_len}.")
        check_prompts(_prompts(corpus, self, seed)[0], network, self.max_new_tokens)


def measure(
    model: MoEDecoder,
    corpus: Corpus,
    measures: MeasureConfig,
    *,
    seq_len: int,
    batch_size: int,
    seed: int,
    progress: bool = True,
) -> dict[str, Any]:
    """{exits: as `ExitEvaluation`, union: as `ExpertUnion`, decoding: [a dict for each temperature]}.

    seq_len, batch_size: of the windows of held-out text. seed: of prompts and sampling. Each dict of `decoding` has the
    temperature, the fastest pair's exit_layer and draft_length, and what `compare_decoding` found of it. Raises
    ValueError as `MeasureConfig.check` does.
    """
    measures.check(model.config, corpus, seq_len=seq_len, seed=seed)
    text: dict[str, Any] = {
        "seq_len": seq_len,
        "batch_size": batch_size,
        "max_windows": measures.max_windows,
        "progress": progress,
    }
    return {
        "exits": asdict(evaluate_exits(model, corpus.validation, **text)),
        "union": asdict(expert_union(model, corpus.validation, measures.spans, **text)),
        "decoding": [
            _decoding(model, corpus, measures, temperature, seed, progress) for temperature in measures.temperatures
        ],
    }


def _decoding(
    model: MoEDecoder, corpus: Corpus, measures: MeasureConfig, temperature: float, seed: int, progress: bool
) -> dict[str, Any]:
    """The fastest pair of exit layer and draft length, and what it makes of other prompts, beside plain decoding."""
    n_layers = model.config.n_layers
    prompts, others = _prompts(corpus, measures, seed)
    settings: dict[str, Any] = {"temperature": temperature, "seed": seed, "progress": progress}
    swept = sweep_drafting(
        model,
        others,
        exit_layers=[-(-n_layers // part) for part in (8, 4, 2)],
        draft_lengths=measures.draft_lengths,
        max_new_tokens=-(-measures.max_new_tokens // 2),
        **settings,
    )
    fastest = SelfSpeculative(swept.chosen["exit_layer"], swept.chosen["draft_length"])
    strategies: dict[str, Strategy] = {"plain": Autoregressive(), "self-speculative": fastest}
    compared = compare_decoding(model, prompts, strategies, max_new_tokens=measures.max_new_tokens, **settings)
    plainly, drafting = compared.strategies
    return {
        "temperature": temperature,
        **{name: getattr(drafting, name) for name in _TOLD},
        "prompts": compared.prompts,
        "plain_tokens_per_second": plainly.tokens_per_second,
    }


def _prompts(corpus: Corpus, measures: MeasureConfig, seed: int) -> tuple[list[list[int]], list[list[int]]]:
    """Held-out prompts to time, and others to pick a pair on."""
    more = -(-measures.num_prompts // 3)
    both = corpus.validation_prompts(measures.num_prompts + more, measures.prompt_length, seed=seed)
    return both[: measures.num_prompts], both[measures.num_prompts :]
