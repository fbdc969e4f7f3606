"""The folder of a run: one run at a time, nothing lost by beginning anew, and what a killed one left half done removed.

Knows nothing of what is written to it. Next: `checkpoint.py`; `loop.py`, which works in it.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from layerskip_moe.files import explaining_failure, making_folder
from layerskip_moe.training.checkpoint import (
    CHECKPOINTS,
    Checkpoint,
    is_finished,
    newest_checkpoint,
    remove_checkpoints,
    remove_leftovers,
    steps_done,
)
from layerskip_moe.training.parallel import Ranks

_LOCK = ".lock"


@contextmanager
def run_folder(out_dir: Path, *, resume: bool) -> Iterator[Checkpoint | None]:
    """Have out_dir for one run: its newest whole checkpoint where it is to be resumed, else None.

    Made if need be. The checkpoints of a finished run (`finish_run`) make room for a new one; a stopped run's are
    refused, as is a folder in which another process, or another thread of this one, trains. A lock belongs to its
    process: with it, it is gone.
    Raises ValueError for those, and for a resume without a whole checkpoint; OSError, with a sentence, for a folder
    that cannot be written to.
    """
    import filelock

    if not resume:
        check_new_run(out_dir)
    elif not (out_dir / CHECKPOINTS).is_dir():
        newest_checkpoint(out_dir)  # says that there is none, without making a folder for it
    lock = filelock.FileLock(out_dir / _LOCK)
    with explaining_failure("this run", out_dir), making_folder(out_dir):
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            raise ValueError(
                f"another run is at work in {out_dir}; wait for its end, or give this one another out_dir."
            ) from None
    try:
        with explaining_failure("this run", out_dir):
            remove_leftovers(out_dir)
            if not resume:
                check_new_run(out_dir)  # again: another run may have stopped here meanwhile
                remove_checkpoints(out_dir)
        yield newest_checkpoint(out_dir) if resume else None
    finally:
        lock.release()


@contextmanager
def shared_run_folder(out_dir: Path, ranks: Ranks, *, resume: bool) -> Iterator[Checkpoint | None]:
    """`run_folder` of several processes: the first one has it, and all go on from the same checkpoint, or raise what it
    raises."""
    with ExitStack() as stack:
        checkpoint, refused = None, None
        with ranks.awaiting_the_first():
            if ranks.is_first:
                try:
                    checkpoint = stack.enter_context(run_folder(out_dir, resume=resume))
                except (ValueError, OSError) as error:
                    refused = error
        ranks.raise_together(refused)
        yield ranks.first_ones(checkpoint)  # which is read whole, to be verified, by that one alone


def check_new_run(out_dir: str | Path) -> None:
    """Raise ValueError where a new run in out_dir would lose a stopped one, or one whose model may not be saved yet."""
    done = steps_done(Path(out_dir))
    if done is None or is_finished(Path(out_dir)):
        return
    of = "" if done[1] is None else f" of {done[1]}"
    raise ValueError(
        f"{out_dir} holds a run that stopped after step {done[0]}{of}; go on with resume=True (--resume on the command "
        f"line), or give another out_dir, or remove {Path(out_dir) / CHECKPOINTS} to give it up."
    )
