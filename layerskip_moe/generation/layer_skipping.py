"""LayerSkipping: decode with some layers left out. Faster by what they cost, and lossy: the text is not the full
model's.

Knows nothing of which layers matter. Next: `early_exit.py`, which decides by the token.
"""

from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from layerskip_moe.generation.layer_sets import layer_indices
from layerskip_moe.generation.session import Session
from layerskip_moe.nn import ModelConfig
from layerskip_moe.nn.noise import hash_uniform
from layerskip_moe.refusals import require_index, shown

_STREAM = 4  # of the draws that leave out layers; see verification.py for 1 to 3


@dataclass(frozen=True)
class LayerSkipping:
    """Leave layers out, in one of three ways; layers are indices 0..L-1.

    A given set, and every n-th, are left out for the prompts too: the text is, token for token, that of the
    smaller network without those layers.

    Attributes:
        layers: the layers to leave out
        every: leave out every n-th layer: n - 1, 2n - 1, ...; 2 or more
        random: how many layers each new token leaves out, drawn anew for each from all but the first and the last;
            a pure function of (seed, row, position), as the sampling noise is. Prompts run through all layers. A
            skipped layer gets the keys and values of the state that passes it by, so that later tokens that do
            run it find something there.
    """

    layers: tuple[int, ...] = ()
    every: int | None = None
    random: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.layers, int):
            raise ValueError(f"layers={self.layers} is one index; give a list, such as [{self.layers}].")
        object.__setattr__(self, "layers", layer_indices("layers", self.layers))
        for name in ("every", "random"):
            if getattr(self, name) is not None:
                require_index(name, getattr(self, name))
        given = (bool(self.layers), self.every is not None, self.random is not None)
        if sum(given) != 1:
            raise ValueError("LayerSkipping takes one of layers, every and random: say which layers to leave out.")
        if self.every is not None and self.every < 2:
            raise ValueError(f"every={self.every} must be 2 or more: 2 leaves out every second layer.")
        if self.random is not None and self.random < 1:
            raise ValueError(f"random={self.random} must be 1 or more: how many layers each token leaves out.")

    def check(self, config: ModelConfig) -> None:
        """Raise ValueError where the model has no such layers, or none would be left."""
        n_layers = config.n_layers
        outside = [layer for layer in self.layers if not 0 <= layer < n_layers]
        if outside:
            raise ValueError(
                f"layers={shown(list(self.layers))} names {outside[0]}, but layers are 0 to {n_layers - 1}."
            )
        if len(self.layers) == n_layers:
            raise ValueError(f"layers={shown(list(self.layers))} leaves out all {n_layers} layers; keep at least one.")
        if self.every is not None and self.every > n_layers:
            raise ValueError(f"every={self.every} leaves out no layer: the model has {n_layers}.")
        if self.random is not None and self.random > n_layers - 2:
            raise ValueError(
                f"random={self.random} is too many: the first and last of {n_layers} layers always run, "
                f"so at most {max(n_layers - 2, 0)} can be left out."
            )

    def start(self, session: Session) -> None:
        """Run the prompts: without the left-out layers where these are fixed."""
        session.prefill(None if self.random is not None else self._kept(session.model.config.n_layers))

    def step(self, session: Session) -> None:
        """One round: the layers that stay over the newest token of each row, then one new token."""
        model, positions = session.model, session.positions(1)
        if self.random is not None:
            run = self._drawn(session, positions)
            hidden, counts = _run_some(session, model.embed(session.newest), positions, run), run.sum(dim=1).tolist()
            logits = model.unembed(hidden)
        else:
            kept = self._kept(model.config.n_layers)
            logits = session.decode(session.newest, kept, positions)
            counts = [len(kept)] * len(logits)
        tokens = session.choose(session.scores(logits), session.noise(1))
        session.append(tokens, layers_run=counts)

    def _kept(self, n_layers: int) -> list[int]:
        out = self.layers if self.every is None else range(self.every - 1, n_layers, self.every)
        return [layer for layer in range(n_layers) if layer not in out]

    def _drawn(self, session: Session, positions: Tensor) -> Tensor:
        """Which layers run for each row's newest token: [A, L] bool, on the CPU."""
        n_layers = session.model.config.n_layers
        middle = torch.arange(1, n_layers - 1, device=positions.device)
        draws = hash_uniform(session.sampling.seed, _STREAM, session.rows[:, None], positions, middle)
        run = torch.ones(len(draws), n_layers, dtype=torch.bool, device=positions.device)
        assert self.random is not None
        return run.scatter_(1, 1 + draws.topk(self.random, dim=1).indices, False).cpu()


def _run_some(session: Session, hidden: Tensor, positions: Tensor, run: Tensor) -> Tensor:
    """Each row of hidden [A, 1, D] through its own layers, run [A, L]; the others get its keys and values."""
    model, cache = session.model, session.cache
    # Neighbouring layers that the same rows run are run together.
    for rows_run, group in groupby(range(run.shape[1]), key=lambda layer: run[:, layer].tolist()):
        layers = list(group)
        for runs in (True, False):
            chosen = [row for row, goes in enumerate(rows_run) if goes == runs]
            if not chosen:
                continue
            rows = torch.tensor(chosen, device=hidden.device)
            part = cache if len(rows) == len(hidden) else cache.subset(rows)
            if runs:
                out = model.run(hidden[rows], layers, positions=positions[rows], cache=part).hidden
                hidden = hidden.index_copy(0, rows, out)
            else:
                model.fill(hidden[rows], layers, positions=positions[rows], cache=part)
    return hidden
