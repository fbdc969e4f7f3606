"""Ctrl-C and SIGTERM, kept until a good moment: work at hand is finished and saved before the process leaves.

Knows nothing of what is at hand. Next: `training/loop.py`, which asks after every step; `constants.py` and
`cli/dispatch.py`, which end the process with the sentence and status that `Interrupted` has.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_NOTE = b"\nstopping as soon as what is at hand is done; once more stops at once\n"


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM came, and what was at hand is done: the text says what was saved, and how to go on.

    A KeyboardInterrupt, as notebooks and callers expect. received: the signal's number; exit_status: what a shell would
    call the end by it, 130 or 143.
    """

    def __init__(self, sentence: str, received: int) -> None:
        super().__init__(sentence)
        self.received = received
        self.exit_status = 128 + received


def is_first_process() -> bool:
    """Whether this one says that it was interrupted: of processes that torchrun started, all of which are, rank 0."""
    return os.environ.get("RANK", "0") == "0"


@dataclass
class Interruption:
    """The number of the signal that came first, None while there was none."""

    received: int | None = None


@contextmanager
def interrupts_wait() -> Iterator[Interruption]:
    """Meanwhile the first Ctrl-C or SIGTERM is only noted, and whoever has the time looks; a second one raises
    `Interrupted` where it comes.

    Only the main thread can have it so; in others, and for signals that this process ignores, all stays as it is.
    Handlers are put back at the end.
    """
    seen = Interruption()

    def note(number: int, frame: FrameType | None) -> None:
        if seen.received is not None:
            raise Interrupted("interrupted", number)
        seen.received = number
        if is_first_process():
            with suppress(OSError):  # not `print`, which may be what was interrupted
                os.write(2, _NOTE)

    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in _SIGNALS}
        # None is a handler that was not set from Python, which could not be put back.
        before = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, note)
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
