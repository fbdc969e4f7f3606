"""NewText: tells a policy that another text begins, where what it knows row by row is of no use any more.

Knows nothing of what a policy keeps. Next: `heuristic.py`, which forgets all; `draft_verify.py`, which does not.
"""

import weakref

from layerskip_moe.generation.session import Session


class NewText:
    """Called with the session before each round: whether it is another one than the last time."""

    def __init__(self) -> None:
        self._last: weakref.ref[Session] | None = None  # a session holds a cache, which is not to live on here

    def __call__(self, session: Session) -> bool:
        if self._last is not None and self._last() is session:
            return False
        self._last = weakref.ref(session)
        return True
