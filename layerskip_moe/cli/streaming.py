"""Showing tokens as they come, and which of them a draft had proposed.

Knows nothing of text or terminals. Next: `generate.py`, which prints.
"""

from collections.abc import Callable

from layerskip_moe.generation import Sampling, Session, Strategy
from layerskip_moe.nn import ModelConfig, MoEDecoder


class RoundByRound:
    """A strategy that tells, after each of its rounds, every new token of its one prompt and whether it is an
    accepted draft. Of a round's tokens the drafts come first.

    It decodes as `strategy` does; its `on_token` must be given to `generate` beside it.
    """

    def __init__(self, strategy: Strategy, show: Callable[[int, bool], None]) -> None:
        self._strategy, self._show = strategy, show
        if hasattr(strategy, "draft_model"):
            self.draft_model = strategy.draft_model  # which `generate` runs in eval mode
        self._round: list[int] = []

    def on_token(self, row: int, token: int) -> None:
        """Keep the token until its round is over."""
        self._round.append(token)

    def check(self, config: ModelConfig) -> None:
        """As the strategy."""
        self._strategy.check(config)

    def prepare(self, model: MoEDecoder, rows: int, sampling: Sampling) -> None:
        """As the strategy, where it has something to prepare."""
        getattr(self._strategy, "prepare", lambda *_: None)(model, rows, sampling)

    def start(self, session: Session) -> None:
        """As the strategy."""
        self._strategy.start(session)

    def step(self, session: Session) -> None:
        """A round of the strategy's, then its tokens."""
        before = session.stats[0].accepted
        self._strategy.step(session)
        accepted = session.stats[0].accepted - before
        for place, token in enumerate(self._round):
            self._show(token, place < accepted)
        self._round.clear()
