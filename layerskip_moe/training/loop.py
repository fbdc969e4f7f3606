"""The training loop: batches in, a trained model and its metrics out.

What is random or scheduled is a function of the step alone, so stopping and resuming changes nothing.
Knows nothing of how a step is computed, nor of a run's files. Next: `run.py`; `run_folder.py` and `checkpoint.py`.
"""

import contextlib
import math
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from layerskip_moe.data import ahead, steps_per_epoch
from layerskip_moe.interrupts import Interrupted, interrupts_wait
from layerskip_moe.nn import MoEDecoder
from layerskip_moe.nn.modes import in_mode
from layerskip_moe.training.checkpoint import finish_run, save_checkpoint
from layerskip_moe.training.config import TrainConfig
from layerskip_moe.training.metrics import MetricsWriter, skipped_record, train_record, write_recipe
from layerskip_moe.training.parallel import join
from layerskip_moe.training.run import Run, Text
from layerskip_moe.training.run_folder import shared_run_folder
from layerskip_moe.training.sharding import check_sharing, give_back, whole

_FINAL_LOSSES = ("loss", "exit_losses", "balance_loss", "router_z_loss")


@dataclass
class TrainResult:
    """What a training run gave; the model itself was updated in place.

    metrics:  the records of metrics.jsonl, in order
    losses:   raw parts of the last step: {"loss", "exit_losses", "balance_loss", "router_z_loss"}; empty for a
              finished run that is resumed without its metrics.jsonl
    validation: last validation's perplexity per exit layer 1..L, of the weights the model now has; empty
              without a validation split
    steps, tokens, seconds: optimizer steps, training tokens seen, wall time; what went before a resume included
    skipped_steps: how many of the steps changed nothing, their loss or gradient not being finite
    best_step: the step whose weights the model now has
    recipe:   how it was trained, for `save_pretrained` to keep beside the weights: recipe.json's facts and more
    """

    metrics: list[dict[str, Any]]
    losses: dict[str, Any]
    validation: list[float]
    steps: int
    tokens: int
    seconds: float
    skipped_steps: int
    best_step: int
    recipe: dict[str, Any]


def train(
    model: MoEDecoder,
    corpus: Text,
    config: TrainConfig,
    out_dir: str | Path,
    *,
    resume: bool = False,
    finish: bool = True,
    progress: bool = True,
) -> TrainResult:
    """Train the model in place by the LayerSkip recipe.

    Writes to out_dir: at the start recipe.json, {"steps", "n_layers": L, "train_config": {field: value}}; then
    metrics.jsonl (a line per log_every steps and per validation), checkpoints/, and TensorBoard files when
    tensorboard is installed. resume: go on from out_dir's newest whole checkpoint; the run ends with the weights it
    would have had without the stop, bit for bit on a CPU. Without it, a finished run in out_dir is replaced, and a
    stopped one refused. finish: when this returns, the run is finished; with False it is when `finish_run(out_dir)` is
    called, which is for after the model is saved, so that a kill meanwhile loses nothing.

    In processes that torchrun started (`parallel.py`) all of them call this, with the same arguments, and train one
    model together: each on a part of every batch, with a part of the weights. Losses, metrics and weights are those of
    one process but for rounding; rank 0 alone writes and talks; in the end every rank's model has all the weights. A
    model that lies on the CPU of a process with a GPU of its own stays there meanwhile.

    A first Ctrl-C or SIGTERM waits for the step's end, saves, and raises `Interrupted`, a KeyboardInterrupt that says
    how to go on; a second one does not wait.

    The model's mode is put back at the end. Raises ValueError for a text shorter than one sample, a model
    shorter than seq_len, a checkpoint that is missing, damaged, or of a run with other settings, and an out_dir with a
    stopped run or one at work; OSError, with a sentence, where out_dir cannot be written to; FloatingPointError when
    max_skipped_steps in a row had a loss or gradient that is not finite, and then the newest checkpoint and the
    model's weights are of before the first of them. Warns of a validation split too short to use, and of damaged
    checkpoints.
    """
    if config.seq_len > model.config.max_seq_len:
        raise ValueError(
            f"seq_len={config.seq_len} is longer than the model's max_seq_len={model.config.max_seq_len}; "
            "shorten seq_len, or build the model with a larger max_seq_len."
        )
    out_dir, ranks = Path(out_dir), join(model.device)
    check_sharing(model.config, config, ranks.size)
    per_step = config.batch_size * config.accumulation
    epoch = steps_per_epoch(corpus.train, config.seq_len, per_step)
    max_steps = config.max_steps or math.ceil(config.epochs * epoch)
    run = Run(model, config, max_steps, corpus, ranks)
    validates = len(corpus.validation) > config.seq_len
    if len(corpus.validation) and not validates and ranks.is_first:
        warnings.warn(
            f"the validation split has {len(corpus.validation)} tokens but one sample needs seq_len + 1 = "
            f"{config.seq_len + 1}, so nothing is validated; use a longer text or a smaller seq_len.",
            stacklevel=2,
        )
    tenth = max(max_steps // 10, 1)
    validate_every = tenth if config.validate_every is None else config.validate_every
    checkpoint_every = tenth if config.checkpoint_every is None else config.checkpoint_every

    with shared_run_folder(out_dir, ranks, resume=resume) as checkpoint, in_mode(run.model, training=True):
        first = 0 if checkpoint is None else run.restore(checkpoint)
        recipe = write_recipe(out_dir, max_steps, model.config.n_layers, config, writes=ranks.is_first)
        shown = progress and ranks.is_first
        with (
            contextlib.closing(ahead(run.text_from(first))) as text_ahead,
            MetricsWriter(out_dir, before_step=first, writes=ranks.is_first) as metrics,
            tqdm(total=max_steps, initial=first, desc="training", unit="step", disable=not shown) as bar,
            interrupts_wait() as interruption,
        ):
            logged_at, logged_step, done = time.perf_counter(), first, first
            for step in range(first, max_steps):
                losses, gradient_norm = run.step(step, text_ahead)
                bar.update()
                done, last = step + 1, step + 1 == max_steps
                if run.skips.in_a_row:
                    metrics.write("skipped", step, skipped_record(losses, gradient_norm, run.skips.count))
                    if run.skips.in_a_row >= config.max_skipped_steps:
                        give_back(run.network, model, ranks)
                        raise FloatingPointError(run.told_why_it_stops(step))
                elif done % config.log_every == 0 or last:
                    now = time.perf_counter()
                    speed = (done - logged_step) * per_step * config.seq_len / (now - logged_at)
                    seconds = run.timer.mean_seconds(done - logged_step)
                    record = train_record(losses, run.learning_rate, gradient_norm, speed, seconds)
                    metrics.write("train", step, record)
                    bar.set_postfix(loss=f"{record['loss']:.3f}", perplexity=f"{record['perplexity']:.1f}")
                    logged_at, logged_step = now, done
                if validates and (last or (validate_every and done % validate_every == 0)):
                    paused = time.perf_counter()
                    with run.autocast():
                        metrics.write("validation", step, run.validate(corpus.validation, done))
                    logged_at += time.perf_counter() - paused
                stopping = ranks.largest(interruption.received or 0) > 0  # as any of them is asked to
                # Among skipped steps none is due: a run that stops there is to have one from before them.
                due = checkpoint_every and done % checkpoint_every == 0 and not run.skips.in_a_row
                if checkpoint_every != 0 and (last or due or stopping):
                    tensors = whole(run.tensors(), keep=ranks.is_first)
                    with ranks.awaiting_the_first():
                        if ranks.is_first:
                            save_checkpoint(out_dir, run.facts(done), tensors)
                if stopping:
                    break
        received = ranks.largest(interruption.received or 0)  # also while the last step was saved
        if received:
            give_back(run.network, model, ranks)
            raise Interrupted(_told_how_to_resume(out_dir, done, max_steps, checkpoint_every), received)
        best_step = run.take_best()
    give_back(run.network, model, ranks)
    if finish and ranks.is_first:
        finish_run(out_dir)
    trained = [r for r in metrics.records if r["split"] == "train"]
    kept = [r for r in metrics.records if r["split"] == "validation" and r["step"] + 1 == best_step]
    tokens = max_steps * per_step * config.seq_len
    return TrainResult(
        metrics=metrics.records,
        losses={name: trained[-1][name] for name in _FINAL_LOSSES} if trained else {},
        validation=kept[-1]["perplexity"] if kept else [],
        steps=max_steps,
        tokens=tokens,
        seconds=run.seconds,
        skipped_steps=run.skips.count,
        best_step=best_step,
        recipe=recipe | {"tokens": tokens, "best_step": best_step},
    )


def _told_how_to_resume(out_dir: Path, done: int, max_steps: int, checkpoint_every: int) -> str:
    if checkpoint_every == 0:
        return f"stopped after step {done} of {max_steps}; nothing was saved, as checkpoint_every=0 asks."
    return (
        f"stopped after step {done} of {max_steps}, and saved in {out_dir}: the same again with resume=True (--resume "
        "on the command line) goes on from there."
    )
