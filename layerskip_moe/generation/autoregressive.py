"""Autoregressive: plain decoding, one token per pass of the full model, or of its first layers alone. What every
other strategy is compared with.

Next: `self_speculative.py`.
"""

from dataclasses import dataclass

from layerskip_moe.generation.session import Session
from layerskip_moe.nn import ModelConfig
from layerskip_moe.refusals import require_index


@dataclass(frozen=True)
class Autoregressive:
    """Plain decoding.

    Attributes:
        exit_layer: decode with the first n layers and the head, prompt included, n in 1..L; None: the whole
            model. An early layer's text is its own: nothing of the full model's is promised.
    """

    exit_layer: int | None = None

    def check(self, config: ModelConfig) -> None:
        """Raise ValueError where the model has no such exit layer."""
        if self.exit_layer is not None:
            check_exit_layer(self.exit_layer, config)

    def start(self, session: Session) -> None:
        """Run the prompts."""
        session.prefill(self._layers(session))

    def step(self, session: Session) -> None:
        """One round: the layers over the newest token of each row, then one new token."""
        layers = self._layers(session)
        logits = session.decode(session.newest, layers, session.positions(1))
        tokens = session.choose(session.scores(logits), session.noise(1))
        session.append(tokens, layers_run=[len(layers)] * len(tokens))

    def _layers(self, session: Session) -> range:
        return range(self.exit_layer or session.model.config.n_layers)


def check_exit_layer(exit_layer: int, config: ModelConfig) -> None:
    """Raise ValueError unless 1 <= exit_layer <= L."""
    require_index("exit_layer", exit_layer)
    if not 1 <= exit_layer <= config.n_layers:
        raise ValueError(
            f"exit_layer={exit_layer} must be between 1 and n_layers={config.n_layers}: "
            "it counts the layers that run before the head."
        )
