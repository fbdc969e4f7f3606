"""Every variant trained with every seed over the same text and steps, and measured; then, when all are, every one
timed: unattended, and taken up again where it was stopped.

The runs' folders are all the state there is (see `runs.py`).
Knows nothing of what a variant changes. Next: `summary.py`, which compares the results.
"""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from layerskip_moe.ablation.measure import MeasureConfig
from layerskip_moe.ablation.result_files import (
    DECODING,
    RESULT,
    as_json,
    check_machine,
    decoding_setting,
    read_result,
    read_run,
    read_timing,
)
from layerskip_moe.ablation.runs import MODEL, Run, time_run, train_run
from layerskip_moe.ablation.timing import DecodingConfig
from layerskip_moe.ablation.variants import BASE, Variant
from layerskip_moe.ablation.write import write_ablation
from layerskip_moe.analysis.report_text.markdown import number
from layerskip_moe.bench import describe_machine
from layerskip_moe.data import Corpus
from layerskip_moe.nn import ModelConfig
from layerskip_moe.refusals import shortened, shown
from layerskip_moe.training import TrainConfig
from layerskip_moe.training.losses import step_exit_weights
from layerskip_moe.training.run_facts import fingerprint

_LENGTH = ("max_steps", "epochs", "seq_len", "batch_size", "accumulation", "seed")  # equal for all, or set by the grid


def ablate(
    corpus: Corpus,
    network: ModelConfig,
    recipe: TrainConfig,
    variants: Mapping[str, Variant],
    out_dir: str | Path,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    measures: MeasureConfig | None = None,
    decoding: DecodingConfig | None = None,
    timing: bool = True,
    device: torch.device | str = "cpu",
    command: str | None = None,
    progress: bool = True,
) -> Path:
    """Train and measure every variant with every seed, then time decoding of each; writes ablation.json, ablation.md
    and figures to out_dir, anew after each run, and gives ablation.md's path. They tell of every result in
    out_dir/runs, those of other variants and seeds than are asked for too.

    network, recipe: the base, which the variant of that name is, and which the others change.
    seeds: of first weights, batches and dropout; runs of a seed are pairs. All variants have a turn with the first
        seed, then all with the next, in training and in timing: drift of the machine falls on all variants alike.
    timing: False: stop when all are trained. Only what comes then needs a machine that does nothing else.
    command: to be written down with the results.
    A run whose result is there is not made again; one that was stopped goes on from its checkpoint. One whose loss
    stops being finite is written down as failed, and the next begins.
    Raises ValueError, before anything is trained, where a variant makes no sense, no base is among the variants, the
    text is too short, or out_dir holds runs of other settings, or timings of another machine.
    """
    measures, decoding = measures or MeasureConfig(), decoding or DecodingConfig()
    device, out_dir = torch.device(device), Path(out_dir)
    asked = _plan(network, recipe, variants, out_dir, seeds)
    _check(corpus, asked, measures, decoding)
    about = {
        "command": command,
        "corpus": {"name": corpus.name, "train_tokens": len(corpus.train), "vocab_size": corpus.vocab_size},
        "measures": asdict(measures),
        "decoding": asdict(decoding),
        "base": {"network": asdict(network), "recipe": asdict(recipe)},
    }

    def known(run: Run) -> dict[str, Any] | None:
        return _known(run, _setting(run, corpus, measures, device), decoding)

    def results() -> list[dict[str, Any]]:
        runs = [*asked, *_others(asked, network, recipe, out_dir)]  # another process may have made some meanwhile
        return [result for result in map(known, runs) if result is not None]

    results()  # refuses what is of other settings
    machine = describe_machine(device)
    if timing:
        _check_timing({run.folder: known(run) for run in asked}, machine)
    untrained = [run for run in asked if known(run) is None]
    bar = tqdm(untrained, desc="training variants", unit="run", disable=not progress)
    for run in bar:
        result = train_run(run, _setting(run, corpus, measures, device), corpus, measures, device, progress)
        if progress:
            bar.write(_trained(result), file=sys.stderr)
        write_ablation(out_dir, about, results())
    untimed = [run for run in asked if timing and _is_untimed(known(run))]
    bar = tqdm(untimed, desc="timing variants", unit="run", disable=not progress)
    for run in bar:
        timed = time_run(run, corpus, decoding, machine, device, progress)
        if progress:
            bar.write(_timed(timed), file=sys.stderr)
        write_ablation(out_dir, about, results())
    return write_ablation(out_dir, about, results())


def _plan(
    network: ModelConfig, recipe: TrainConfig, variants: Mapping[str, Variant], out_dir: Path, seeds: Sequence[int]
) -> list[Run]:
    """All runs in their order; ValueError for variants and seeds that make no grid."""
    if BASE not in variants:
        raise ValueError(f"the variants {', '.join(variants)} lack {BASE!r}, which all are compared with; add it.")
    if not seeds or len(set(seeds)) != len(seeds):
        raise ValueError(f"seeds={list(seeds)} must be at least one, and differ from each other.")
    for name, variant in variants.items():
        fixed = [field for field in _LENGTH if field in variant.recipe]
        if name in ("", ".", "..") or Path(name).name != name:
            raise ValueError(f"variant {name!r} must be named as a folder can be, without slashes.")
        if fixed:
            raise ValueError(f"variant {name!r} changes {', '.join(fixed)}, but all are trained alike; leave it out.")
    return [_run(name, variant, network, recipe, out_dir, seed) for seed in seeds for name, variant in variants.items()]


def _run(name: str, variant: Variant, network: ModelConfig, recipe: TrainConfig, out_dir: Path, seed: int) -> Run:
    return Run(
        name,
        variant,
        dataclasses.replace(network, **variant.network),
        dataclasses.replace(recipe, **variant.recipe, seed=seed),
        out_dir / "runs" / name / f"seed{seed}",
    )


def _others(asked: Sequence[Run], network: ModelConfig, recipe: TrainConfig, out_dir: Path) -> list[Run]:
    """Runs that have a result and are not asked for, as this base makes them; ValueError where it cannot."""
    changes, folders = {run.variant: run.changes for run in asked}, {run.folder for run in asked}
    runs = []
    for path in sorted((out_dir / "runs").glob(f"*/seed*/{RESULT}")):
        if path.parent in folders:
            continue
        name = path.parent.parent.name
        changed, seed = read_run(path)
        try:
            variant = changes.setdefault(name, Variant(**changed))  # one name stands for the same in all seeds
            run = _run(name, variant, network, recipe, out_dir, seed)
            if run.folder != path.parent:
                raise ValueError(f"its seed is {seed}")
        except (ValueError, TypeError) as error:
            why = shortened(str(error))
            raise ValueError(f"{path} does not fit here ({why}); remove it, or give another out_dir.") from None
        runs.append(run)
    return runs


def _check(corpus: Corpus, runs: Sequence[Run], measures: MeasureConfig, decoding: DecodingConfig) -> None:
    """Raise ValueError for what training, measuring or timing would refuse after hours."""
    for run in runs:
        seq_len, network = run.recipe.seq_len, run.network
        if seq_len > network.max_seq_len:
            raise ValueError(f"seq_len={seq_len} is longer than max_seq_len={network.max_seq_len}; change one of them.")
        step_exit_weights(run.recipe, network.n_layers, 0, 1)
    measures.check(corpus, seq_len=runs[0].recipe.seq_len)
    decoding.check(corpus, [run.network for run in runs])


def _check_timing(results: Mapping[Path, Mapping[str, Any] | None], machine: Mapping[str, Any]) -> None:
    """Raise ValueError where runs cannot be timed, or not beside those that are. results: of each run's folder."""
    untimed = [folder for folder, result in results.items() if result is None or _is_untimed(result)]
    for folder in untimed:
        if results[folder] is not None and not (folder / MODEL).is_dir():
            raise ValueError(
                f"{folder / MODEL} is gone, so that it cannot be timed; remove {RESULT} beside it, and it is trained "
                "again."
            )
    if untimed:
        for path in sorted(untimed[0].parents[1].glob(f"*/seed*/{DECODING}")):
            check_machine(path, machine)


def _is_untimed(result: Mapping[str, Any] | None) -> bool:
    return result is not None and not result["failed"] and not result["decoding"]


def _setting(run: Run, corpus: Corpus, measures: MeasureConfig, device: torch.device) -> dict[str, Any]:
    """All that a result depends on, as JSON has it."""
    return as_json(
        {
            "network": asdict(run.network),
            "recipe": asdict(run.recipe),
            "measures": asdict(measures),
            "text": fingerprint(corpus.train, corpus.validation),
            "device": device.type,
        }
    )


def _known(run: Run, setting: Mapping[str, Any], decoding: DecodingConfig) -> dict[str, Any] | None:
    """What is known of a run: its result, with `decoding` and `timed_on`, both None where it is not timed; None where
    there is no result."""
    result = read_result(run.folder / RESULT, setting)
    if result is None:
        return None
    if (result["variant"], result["seed"]) != (run.variant, run.recipe.seed):
        told = f"{shown(result['variant'])}, seed {shown(result['seed'])}"
        raise ValueError(f"{run.folder / RESULT} is of another run ({told}); remove it, and the run is made again.")
    timed = read_timing(run.folder / DECODING, decoding_setting(decoding))
    return result | {
        "decoding": timed and timed["decoding"],
        "timed_on": timed and timed["machine"],
    }


def _trained(result: Mapping[str, Any]) -> str:
    """What is printed of a run that has ended."""
    run = f"{result['variant']}, seed {result['seed']}"
    if result["failed"]:
        return f"{run}: failed, {result['failed']}"
    took = result["training_seconds"] + result["measuring_seconds"]
    return f"{run}: perplexity {number(result['exits']['perplexity'][-1], 2)} ({took:.0f} s)"


def _timed(timed: Mapping[str, Any]) -> str:
    """What is printed of a run that was timed."""
    speeds = [
        f"{of['tokens_per_second']:.0f} tokens/s at temperature {of['temperature']:g}, {of['speed_up']:.2f} times plain"
        for of in timed["decoding"]
    ]
    return f"{timed['variant']}, seed {timed['seed']}: {', '.join(speeds)}"
