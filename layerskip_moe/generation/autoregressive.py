"""Autoregressive: plain decoding, one token per pass of the full model. What every other strategy is
compared with.

Next: `self_speculative.py`.
"""

from dataclasses import dataclass

import torch

from layerskip_moe.generation.session import Session
from layerskip_moe.nn import ModelConfig


@dataclass(frozen=True)
class Autoregressive:
    """Plain decoding."""

    def check(self, config: ModelConfig) -> None:
        """Nothing can be wrong: every model decodes plainly."""

    def step(self, session: Session) -> None:
        """One round: every layer over the newest token of each row, then one new token."""
        model = session.model
        hidden = session.run(model.embed(session.newest), range(model.config.n_layers), session.positions(1))
        tokens = session.choose(model.unembed(hidden), session.noise(1))
        session.append(tokens, torch.ones_like(tokens[:, 0]))
