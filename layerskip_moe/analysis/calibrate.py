"""Calibrating early exit so that its loss is bounded: the shape of per-layer thresholds is chosen on one set of
sequences, and one number that scales them is certified on another (CALM, arXiv 2207.07061, section 4).

L layers, n sequences. Next: `consistency.py`, the losses; `exit_shape.py`; `learn_then_test.py`, the statistics;
`document_split.py`.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor
from tqdm.auto import tqdm

from layerskip_moe.analysis.consistency import Consistency, Measured, Sequences, full_model, measure
from layerskip_moe.analysis.document_split import one_of_each, split_documents
from layerskip_moe.analysis.exit_shape import choose_shape, spaced_exits, thresholds_at
from layerskip_moe.analysis.exit_states import exit_opinions
from layerskip_moe.analysis.learn_then_test import Trial, certified, p_value, sequences_needed, walk
from layerskip_moe.generation import EarlyExit, check_prompts
from layerskip_moe.generation.calibration import Certified, write_calibration
from layerskip_moe.generation.confidence import first_exit
from layerskip_moe.nn import MoEDecoder
from layerskip_moe.nn.fingerprint import model_fingerprint
from layerskip_moe.refusals import shown

SHAPE_SHARE = 4  # one sequence in so many chooses the shape; the others certify
NEW_DOCUMENTS = "new documents like these"
THESE_DOCUMENTS = "sequences drawn like these from these very documents, not new documents"


@dataclass(frozen=True)
class Calibration:
    """What was certified.

    The promise: with probability at least 1 - risk over the draw of the certifying sequences, the expected loss of a
    new sequence is at most tolerance. It holds for prompts drawn as those were, from one and the same source and
    independently, which stretches of one document are not (`holds_for`); for this model, decoded greedily, for
    max_new_tokens new tokens, under the strategy's own settings (its cache rule too). It is about the mean over
    sequences, not about each of them.

    Attributes:
        strategy: early exit with the certified thresholds, one for each of layers 1..L-1
        consistency: which loss: "textual", "token" or "risk"; see `consistency.py`
        tolerance: the expected loss allowed
        risk: how often the promise may fail
        scale: the certified number: thresholds are 1 - shape (1 - scale); 1: nothing could be certified but the full
            model, and no layer is left early
        shape: by layer 1..L-1, 0 (never left) to 1
        sequences: n, how many certified it
        documents: how many documents those are of; n where no two share one
        shape_sequences: how many others chose the shape
        shape_documents: how many documents those are of
        weights: `model_fingerprint` of the model
        prompt_lengths: the fewest and the most tokens of a prompt
        max_new_tokens: how long the texts were, at most
        mean_loss: at this scale, of the n sequences
        p_value: of "the expected loss is above the tolerance", at this scale
        agreement: share of places where early exit's token was the full model's, 0 to 1
        mean_layers: layers run per token, 1 to L
        tests: every scale tested, in order
    """

    strategy: EarlyExit
    consistency: Consistency
    tolerance: float
    risk: float
    scale: float
    shape: list[float]
    sequences: int
    documents: int
    shape_sequences: int
    shape_documents: int
    weights: str
    prompt_lengths: tuple[int, int]
    max_new_tokens: int
    mean_loss: float
    p_value: float
    agreement: float
    mean_layers: float
    tests: list[Trial]

    @property
    def holds_for(self) -> str:
        """What the promise is about: new documents, where no two certifying sequences share one."""
        return NEW_DOCUMENTS if self.documents == self.sequences else THESE_DOCUMENTS

    def save(self, path: str | Path, **more: Any) -> None:
        """Write the JSON that `EarlyExit(path)` reads, and trained probes beside it; `more` plain values for people.
        Raises ValueError where the confidence is a function."""
        names = ("threshold", "confidence", "min_layer", "decay", "cache", "tau")
        told = {name: value for name, value in vars(self).items() if name != "strategy"}
        told |= {"tests": [vars(test) for test in self.tests], "holds_for": self.holds_for}
        certified = Certified(self.weights, self.max_new_tokens)
        write_calibration(path, {name: getattr(self.strategy, name) for name in names}, certified, told | more)


def prompts_needed(tolerance: float, risk: float) -> int:
    """How many prompts `calibrate_early_exit` takes at least: enough to certify on, and those for the shape."""
    n = sequences_needed(tolerance, risk)
    return n + max(1, n // (SHAPE_SHARE - 1))


def calibrate_early_exit(
    model: MoEDecoder,
    prompts: Sequence[Sequence[int]],
    strategy: EarlyExit | None = None,
    *,
    references: Sequence[Sequence[int]] | None = None,
    documents: Sequence[int] | None = None,
    consistency: Consistency = "textual",
    tolerance: float = 0.05,
    risk: float = 0.05,
    max_new_tokens: int = 64,
    exits: int | None = None,
    stop_tokens: Collection[int] = (),
    steps: int = 12,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = True,
) -> Calibration:
    """Find thresholds for early exit whose expected loss is at most `tolerance`, except with probability `risk`; the
    promise in full is `Calibration`'s.

    prompts:     token ids, drawn independently from what is to be decoded later; a quarter of them, drawn by `seed`,
                 chooses the shape, and the others certify
    strategy:    confidence, min_layer, decay, tau and cache to calibrate; its threshold is not looked at. None:
                 EarlyExit's defaults. A function may be its confidence; a trained one is `train_classifier`'s, on
                 texts that are none of the prompts'
    references:  for consistency "risk": what truly follows each prompt, 1 token or more; of long ones the first
                 max_new_tokens count
    documents:   for each prompt the number of the document that it is of; None: each is of its own. No document then
                 has a part in both. Where the certifying ones are of as many documents as are needed, only the first
                 prompt of each counts; where not, all count, and the promise is not about new documents (`holds_for`).
    consistency: the loss that is bounded; see `consistency.py`
    exits:       at how many layers a token may leave, evenly spaced; None: at every one. Few are faster: each asks the
                 head, or its probe, about every token that comes to it, and the layers between two are one call
    stop_tokens: ids that end a text
    steps:       scales tried: 1 - (1 / steps)^2, 1 - (2 / steps)^2, ..., 0, in this order, up to the first that fails;
                 they lie closer near 1, where a long text of its own goes astray

    Every scale is decoded for real, so the bound holds whatever the approximations of the cache are. Raises ValueError,
    with the number needed, where there are too few prompts to certify anything at all.
    """
    strategy = EarlyExit(1.0) if strategy is None else replace(strategy, threshold=1.0)
    strategy.check(model.config)
    check_prompts(prompts, model.config, max_new_tokens)
    asked = [list(prompt) for prompt in prompts]
    texts = _check(len(asked), references, documents, consistency, tolerance, risk, max_new_tokens, exits, steps)
    documents = range(len(asked)) if documents is None else documents
    for_shape, certifies = split_documents(documents, max(1, len(asked) // SHAPE_SHARE), seed)
    apart = one_of_each(documents, certifies)
    certifies = apart if len(apart) >= sequences_needed(tolerance, risk) else certifies

    decoding: dict[str, Any] = {"max_new_tokens": max_new_tokens, "stop_tokens": stop_tokens, "batch_size": batch_size}
    total = (len(for_shape) + (1 + steps) * len(certifies)) * max_new_tokens
    with tqdm(total=total, desc="the full model's texts", unit="token", disable=not progress, leave=False) as bar:
        decoding["on_token"] = lambda row, token: bar.update()

        def full(chosen: list[int]) -> Sequences:
            references = None if texts is None else [texts[i] for i in chosen]
            return full_model(model, [asked[i] for i in chosen], references, consistency, **decoding)

        shape = _shape(model, strategy, full(for_shape), tolerance, exits, batch_size, progress)
        certifying = full(certifies)
        n, n_layers = len(certifying.prompts), model.config.n_layers
        measured = {1.0: Measured(torch.zeros(n), 1.0, float(n_layers))}  # the full model itself

        def losses_at(scale: float) -> Tensor:
            bar.set_description(f"early exit at scale {scale:.3g}")
            early = replace(strategy, threshold=thresholds_at(shape, scale))
            measured[scale] = measure(model, early, certifying, consistency, **decoding)
            return measured[scale].losses

        # Where the shape lets nobody leave, every scale is the full model.
        scales = [1 - ((step + 1) / steps) ** 2 for step in range(steps)] if any(shape) else []
        tests = walk(losses_at, scales, tolerance=tolerance, risk=risk)
    found = certified(tests, risk=risk) or Trial(1.0, 0.0, p_value(measured[1.0].losses, tolerance))
    return Calibration(
        strategy=replace(strategy, threshold=thresholds_at(shape, found.scale)),
        consistency=consistency,
        tolerance=tolerance,
        risk=risk,
        scale=found.scale,
        shape=shape,
        sequences=n,
        documents=len(apart),
        shape_sequences=len(for_shape),
        shape_documents=len(one_of_each(documents, for_shape)),
        weights=model_fingerprint(model),
        prompt_lengths=(min(map(len, asked)), max(map(len, asked))),
        max_new_tokens=max_new_tokens,
        mean_loss=found.mean_loss,
        p_value=found.p_value,
        agreement=measured[found.scale].agreement,
        mean_layers=measured[found.scale].mean_layers,
        tests=tests,
    )


def _check(
    n_prompts: int,
    references: Sequence[Sequence[int]] | None,
    documents: Sequence[int] | None,
    consistency: str,
    tolerance: float,
    risk: float,
    max_new_tokens: int,
    exits: int | None,
    steps: int,
) -> list[list[int]] | None:
    """The references that are used, cut; ValueError as `calibrate_early_exit` says."""
    if consistency not in get_args(Consistency):
        raise ValueError(f"consistency={shown(consistency)} is unknown; it is 'textual', 'token' or 'risk'.")
    if steps < 1:
        raise ValueError(f"steps={steps} must be 1 or more: how many scales are tried.")
    if exits is not None and exits < 1:
        raise ValueError(f"exits={exits} must be 1 or more, or None for all: at how many layers a token may leave.")
    needed, left = sequences_needed(tolerance, risk), n_prompts - max(1, n_prompts // SHAPE_SHARE)
    if left < needed:
        raise ValueError(
            f"{n_prompts} prompts leave {left} to certify on, but tolerance={tolerance} at risk={risk} takes at "
            f"least {needed}, even without any loss; give {prompts_needed(tolerance, risk)} or more."
        )
    if documents is not None and len(documents) != n_prompts:
        raise ValueError(f"documents has {len(documents)} numbers for {n_prompts} prompts; give one for each.")
    if consistency != "risk":
        return None
    texts = [list(reference)[:max_new_tokens] for reference in references or ()]
    if len(texts) != n_prompts or not all(texts):
        raise ValueError("consistency='risk' needs one reference for each prompt, of 1 token or more.")
    return texts


def _shape(
    model: MoEDecoder,
    strategy: EarlyExit,
    sequences: Sequences,
    tolerance: float,
    exits: int | None,
    batch_size: int,
    progress: bool,
) -> list[float]:
    """By layer 1..L-1, from what every exit says along the texts of these sequences."""
    n_layers = model.config.n_layers
    first = min(first_exit(strategy.confidence, strategy.min_layer), n_layers)
    opinions = exit_opinions(
        model,
        sequences.prompts,
        sequences.texts,
        confidence=strategy.confidence,
        first=first,
        batch_size=batch_size,
        progress=progress,
    )
    # Along its own text the full model says what stands there; along a reference, more or less often.
    right = opinions.labels if sequences.full is not sequences.texts else opinions.choice[-1]
    wrong = (opinions.choice != right).float()
    layers = spaced_exits(first, n_layers, exits)
    which = [layer - first for layer in layers]
    chosen = choose_shape(opinions.confidence[which], (wrong[:-1] - wrong[-1])[which], tolerance)
    shape = dict(zip(layers, chosen, strict=True))
    return [shape.get(layer, 0.0) for layer in range(1, n_layers)]
