"""Every variant trained with every seed over the same text and steps, and measured: unattended, and taken up again
where it was stopped.

    <out_dir>/runs/<variant>/seed<n>/   recipe.json, metrics.jsonl and, while the run lasts, checkpoint.pt
                                        result.json once it is measured: this run is not made again

Knows nothing of what a variant changes. Next: `summary.py`, which compares the results.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from layerskip_moe.ablation.measure import MeasureConfig, measure
from layerskip_moe.ablation.variants import BASE, Variant
from layerskip_moe.ablation.write import write_ablation
from layerskip_moe.bench import describe_machine
from layerskip_moe.data import Corpus
from layerskip_moe.files import plain, replacing
from layerskip_moe.nn import ModelConfig, MoEDecoder
from layerskip_moe.training import TrainConfig, train
from layerskip_moe.training.checkpoint import NAME as CHECKPOINT
from layerskip_moe.training.checkpoint import fingerprint
from layerskip_moe.training.losses import step_exit_weights

RESULT = "result.json"
_LENGTH = ("max_steps", "epochs", "seq_len", "batch_size", "accumulation", "seed")  # equal for all, or set by the grid


@dataclass(frozen=True)
class _Run:
    """One training: a variant with a seed, and the folder that is its own."""

    variant: str
    network: ModelConfig
    recipe: TrainConfig
    folder: Path


def ablate(
    corpus: Corpus,
    network: ModelConfig,
    recipe: TrainConfig,
    variants: Mapping[str, Variant],
    out_dir: str | Path,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    measures: MeasureConfig | None = None,
    device: torch.device | str = "cpu",
    command: str | None = None,
    progress: bool = True,
) -> Path:
    """Train and measure every variant with every seed; writes ablation.json, ablation.md and figures to out_dir, anew
    after each run, and gives ablation.md's path.

    network, recipe: the base, which the variant of that name is, and which the others change.
    seeds: of first weights, batches, dropout and prompts; runs of a seed are pairs. All variants have a turn with the
        first seed, then all with the next.
    command: to be written down with the results.
    A run whose result is there is not made again; one that was stopped goes on from its checkpoint. One whose loss
    stops being finite is written down as failed, and the next begins.
    Raises ValueError, before anything is trained, where a variant makes no sense, no base is among the variants, the
    text is too short, or out_dir holds runs of other settings.
    """
    measures, out_dir = measures or MeasureConfig(), Path(out_dir)
    runs = _plan(network, recipe, variants, out_dir, seeds)
    _check(corpus, runs, measures)
    settings = [_setting(run, corpus, measures) for run in runs]
    results = [_finished(run, setting) for run, setting in zip(runs, settings, strict=True)]
    about = {
        "command": command,
        "machine": describe_machine(device),
        "corpus": {"name": corpus.name, "train_tokens": len(corpus.train), "vocab_size": corpus.vocab_size},
        "seeds": list(seeds),
        "measures": asdict(measures),
        "base": {"network": asdict(network), "recipe": asdict(recipe)},
        "variants": {name: asdict(variant) for name, variant in variants.items()},
    }
    bar = tqdm(runs, desc="ablation", unit="run", disable=not progress)
    for index, (run, setting) in enumerate(zip(bar, settings, strict=True)):
        if results[index] is None:
            results[index] = _make(run, setting, corpus, measures, torch.device(device), progress)
            if progress:
                bar.write(_line(results[index]), file=sys.stderr)
            write_ablation(out_dir, about, [result for result in results if result is not None])
    return write_ablation(out_dir, about, [result for result in results if result is not None])


def _plan(
    network: ModelConfig, recipe: TrainConfig, variants: Mapping[str, Variant], out_dir: Path, seeds: Sequence[int]
) -> list[_Run]:
    """All runs in their order; ValueError for variants and seeds that make no grid."""
    if BASE not in variants:
        raise ValueError(f"the variants {', '.join(variants)} lack {BASE!r}, which all are compared with; add it.")
    if not seeds or len(set(seeds)) != len(seeds):
        raise ValueError(f"seeds={list(seeds)} must be at least one, and differ from each other.")
    for name, variant in variants.items():
        fixed = [field for field in _LENGTH if field in variant.recipe]
        if Path(name).name != name:
            raise ValueError(f"variant {name!r} must be named as a folder can be, without slashes.")
        if fixed:
            raise ValueError(f"variant {name!r} changes {', '.join(fixed)}, but all are trained alike; leave it out.")
    configs = {
        name: (dataclasses.replace(network, **variant.network), dataclasses.replace(recipe, **variant.recipe))
        for name, variant in variants.items()
    }
    return [
        _Run(name, changed, dataclasses.replace(how, seed=seed), out_dir / "runs" / name / f"seed{seed}")
        for seed in seeds
        for name, (changed, how) in configs.items()
    ]


def _check(corpus: Corpus, runs: Sequence[_Run], measures: MeasureConfig) -> None:
    """Raise ValueError for what training or measuring would refuse after hours."""
    for run in runs:
        seq_len, seed, network = run.recipe.seq_len, run.recipe.seed, run.network
        if seq_len > network.max_seq_len:
            raise ValueError(f"seq_len={seq_len} is longer than max_seq_len={network.max_seq_len}; change one of them.")
        step_exit_weights(run.recipe, network.n_layers, 0, 1)
        measures.check(network, corpus, seq_len=seq_len, seed=seed)


def _setting(run: _Run, corpus: Corpus, measures: MeasureConfig) -> dict[str, Any]:
    """All that a result depends on, as JSON has it."""
    setting = {
        "network": asdict(run.network),
        "recipe": asdict(run.recipe),
        "measures": asdict(measures),
        "text": fingerprint(corpus.train, corpus.validation),
    }
    return json.loads(json.dumps(plain(setting)))


def _finished(run: _Run, setting: Mapping[str, Any]) -> dict[str, Any] | None:
    """The result that is there; None where there is none. ValueError where it is of other settings."""
    path = run.folder / RESULT
    if not path.exists():
        return None
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        saved = {part: result["setting"][part] for part in setting}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); remove it, and the run is made again.") from None
    for part, values in setting.items():
        if saved[part] != values:
            raise ValueError(
                f"{path} is of another {part}{_difference(saved[part], values)}; "
                "give the same settings again, or another out_dir."
            )
    return result


def _difference(saved: Any, now: Any) -> str:
    if not isinstance(now, dict):
        return ""
    changed = [name for name in now if saved.get(name) != now[name]]
    return f" ({', '.join(f'{name} was {saved.get(name)!r} and is now {now[name]!r}' for name in changed)})"


def _make(
    run: _Run,
    setting: Mapping[str, Any],
    corpus: Corpus,
    measures: MeasureConfig,
    device: torch.device,
    progress: bool,
) -> dict[str, Any]:
    """Train, measure, and write the result, upon which the checkpoint is removed."""
    model = MoEDecoder(run.network, seed=run.recipe.seed).to(device)
    parameters, active_parameters = model.parameter_counts()
    result: dict[str, Any] = {
        "variant": run.variant,
        "seed": run.recipe.seed,
        "parameters": parameters,
        "active_parameters": active_parameters,
        "failed": None,
    }
    checkpoint = run.folder / CHECKPOINT
    try:
        trained = train(model, corpus, run.recipe, run.folder, resume=checkpoint.exists(), progress=progress)
    except FloatingPointError as error:
        result["failed"] = str(error)
    else:
        started = time.perf_counter()
        result |= {"steps": trained.steps, "tokens": trained.tokens, "training_seconds": trained.seconds}
        settings: dict[str, Any] = {"seq_len": run.recipe.seq_len, "batch_size": run.recipe.batch_size}
        result |= measure(model, corpus, measures, **settings, seed=run.recipe.seed, progress=progress)
        result["measuring_seconds"] = time.perf_counter() - started
    result = plain(result | {"setting": setting})
    with replacing(run.folder / RESULT) as beside:
        beside.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    checkpoint.unlink(missing_ok=True)
    return result


def _line(result: Mapping[str, Any] | None) -> str:
    """What is printed of a run that has ended."""
    assert result is not None
    run = f"{result['variant']}, seed {result['seed']}"
    if result["failed"]:
        return f"{run}: failed, {result['failed']}"
    faster = [f"{of['speed_up']:.2f} at temperature {of['temperature']:g}" for of in result["decoding"]]
    took = result["training_seconds"] + result["measuring_seconds"]
    perplexity = result["exits"]["perplexity"][-1]
    return f"{run}: perplexity {perplexity:.2f}, speed-up {', '.join(faster)} ({took:.0f} s)"
