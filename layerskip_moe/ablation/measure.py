"""What is measured of each trained model of an ablation without a clock: its exits, and the experts that neighbouring
rows need.

Knows nothing of training. Next: `timing.py`, which times the same models; `study.py`, which measures one more fully.
"""

from dataclasses import asdict, dataclass
from typing import Any

from layerskip_moe.analysis import evaluate_exits, expert_union
from layerskip_moe.data import Corpus
from layerskip_moe.nn import MoEDecoder


@dataclass(frozen=True)
class MeasureConfig:
    """How a trained model is measured. The text is cut into windows of the recipe's seq_len.

    Attributes:
        max_windows: windows of held-out text
        spans: adjacent rows whose experts are counted together
    """

    max_windows: int = 100
    spans: tuple[int, ...] = (2, 4, 8)

    def __post_init__(self) -> None:
        if self.max_windows < 1:
            raise ValueError(f"max_windows={self.max_windows} must be 1 or more.")
        if not self.spans or min(self.spans) < 1:
            raise ValueError(f"spans={list(self.spans)} must be whole numbers from 1 on, at least one.")

    def check(self, corpus: Corpus, *, seq_len: int) -> None:
        """Raise ValueError for what `measure` would refuse, before a model is trained for it."""
        if len(corpus.validation) <= seq_len:
            raise ValueError(
                f"the held-out text has {len(corpus.validation)} tokens, too few for a window of seq_len={seq_len}; "
                "lower seq_len, or give more text."
            )
        if max(self.spans) > seq_len:
            raise ValueError(f"spans={list(self.spans)} must all be within a window of seq_len={seq_len}.")


def measure(
    model: MoEDecoder,
    corpus: Corpus,
    measures: MeasureConfig,
    *,
    seq_len: int,
    batch_size: int,
    progress: bool = True,
) -> dict[str, Any]:
    """{exits: as `ExitEvaluation`, union: as `ExpertUnion`}.

    seq_len, batch_size: of the windows of held-out text. Raises ValueError as `MeasureConfig.check` does.
    """
    measures.check(corpus, seq_len=seq_len)
    text: dict[str, Any] = {
        "seq_len": seq_len,
        "batch_size": batch_size,
        "max_windows": measures.max_windows,
        "progress": progress,
    }
    return {
        "exits": asdict(evaluate_exits(model, corpus.validation, **text)),
        "union": asdict(expert_union(model, corpus.validation, measures.spans, **text)),
    }
