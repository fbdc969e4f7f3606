"""One run of an ablation, a variant trained with a seed: how it is made, and the files that say that it is.

    <out_dir>/runs/<variant>/seed<n>/   recipe.json, metrics.jsonl and, while the run lasts, checkpoints/
                                        model/          the trained model, for `MoEDecoder.from_pretrained`
                                        result.json     once it is measured: this run is not trained again
                                        decoding.json   once it is timed: this run is not timed again

Knows nothing of the other runs. Next: `result_files.py`, which reads them; `grid.py`, which makes all of
them; `measure.py` and `timing.py`.
"""

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from layerskip_moe.ablation.measure import MeasureConfig, measure
from layerskip_moe.ablation.result_files import DECODING, RESULT, as_json, decoding_setting
from layerskip_moe.ablation.timing import DecodingConfig, time_decoding
from layerskip_moe.ablation.variants import Variant
from layerskip_moe.bench import describe_machine
from layerskip_moe.data import Corpus
from layerskip_moe.files import replacing
from layerskip_moe.interrupts import Interrupted
from layerskip_moe.nn import ModelConfig, MoEDecoder
from layerskip_moe.training import TrainConfig, train
from layerskip_moe.training.checkpoint import has_checkpoint, remove_checkpoints

MODEL = "model"


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        variant: its name
        changes: what the name stands for
        network: the base's, so changed
        recipe: likewise, with the run's seed
        folder: its own
    """

    variant: str
    changes: Variant
    network: ModelConfig
    recipe: TrainConfig
    folder: Path


def train_run(
    run: Run, setting: Mapping[str, Any], corpus: Corpus, measures: MeasureConfig, device: torch.device, progress: bool
) -> dict[str, Any]:
    """Train, save the model, measure it, and write result.json, upon which the checkpoints are removed; what was
    written. setting: all that it depends on, which `result_files.read_result` compares.

    A run that was stopped goes on from its newest one, and Ctrl-C says so. Where the loss stops being finite, `failed`
    does.
    """
    (run.folder / DECODING).unlink(missing_ok=True)  # which would be of another training
    model = MoEDecoder(run.network, seed=run.recipe.seed).to(device)
    parameters, active_parameters = model.parameter_counts()
    result: dict[str, Any] = {
        "variant": run.variant,
        "changes": asdict(run.changes),
        "seed": run.recipe.seed,
        "parameters": parameters,
        "active_parameters": active_parameters,
        "machine": describe_machine(device),
        "failed": None,
    }
    try:
        trained = train(model, corpus, run.recipe, run.folder, resume=has_checkpoint(run.folder), progress=progress)
    except Interrupted as stop:
        sentence = (
            f"{run.variant}, seed {run.recipe.seed}, is saved as far as it is; the same again goes on from there."
        )
        raise Interrupted(sentence, stop.received) from None
    except FloatingPointError as error:
        result["failed"] = str(error)
    else:
        recipe = {"corpus": corpus.name, **trained.recipe}
        model.save_pretrained(run.folder / MODEL, tokenizer=corpus.tokenizer, recipe=recipe)
        started = time.perf_counter()
        result |= {"steps": trained.steps, "tokens": trained.tokens, "training_seconds": trained.seconds}
        settings: dict[str, Any] = {"seq_len": run.recipe.seq_len, "batch_size": run.recipe.batch_size}
        result |= measure(model, corpus, measures, **settings, progress=progress)
        result["measuring_seconds"] = time.perf_counter() - started
    result = as_json(result | {"setting": setting})
    _write(run.folder / RESULT, result)
    remove_checkpoints(run.folder)
    return result


def time_run(
    run: Run, corpus: Corpus, decoding: DecodingConfig, machine: Mapping[str, Any], device: torch.device, progress: bool
) -> dict[str, Any]:
    """Time decoding of the saved model and write decoding.json; what was written."""
    started = time.perf_counter()
    model = MoEDecoder.from_pretrained(run.folder / MODEL, device=device)
    timed = as_json(
        {
            "variant": run.variant,
            "seed": run.recipe.seed,
            "machine": machine,
            "decoding": time_decoding(model, corpus, decoding, progress=progress),
            "seconds": time.perf_counter() - started,
            "setting": decoding_setting(decoding),
        }
    )
    _write(run.folder / DECODING, timed)
    return timed


def _write(path: Path, values: Mapping[str, Any]) -> None:
    with replacing(path) as beside:
        beside.write_text(json.dumps(values, indent=1, allow_nan=False) + "\n", encoding="utf-8")
