"""EarlyExit: each token leaves the network at the first layer that is sure enough of it (CALM, arXiv 2207.07061).

A later token may go deeper than an earlier one, and then needs the earlier one's keys and values in layers that it
never reached. They are made when they are first needed, for all waiting positions at once, and in many texts never.

A active rows, R of them still going down, L layers, P capacity, D width.
Knows nothing of how confidence is measured. Next: `confidence.py`; `calibration.py`, the file of a threshold.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from layerskip_moe.generation.calibration import Certified, read_calibration
from layerskip_moe.generation.confidence import (
    Confidence,
    asks_head,
    asks_previous,
    check_confidence,
    confidence_of,
    first_exit,
)
from layerskip_moe.generation.exit_classifier import ExitClassifier
from layerskip_moe.generation.session import Session
from layerskip_moe.nn import KVCache, ModelConfig
from layerskip_moe.refusals import shown

CacheRule = Literal["propagate", "exact"]


@dataclass(frozen=True)
class EarlyExit:
    """Dynamic early exit: after layer n the head is asked, and if it is confident enough its token is taken.

    Lossy: what comes out is the early exits' text. Prompts run through all layers. Rows of a batch leave at their
    own depth, and only those that go on cost anything below: their newest token, and what they have to make up for.
    `Generation.layers_run` has every token's exit layer.

    Attributes:
        threshold: an exit is taken at this confidence or above, 0 to 1; 1 never exits, 0 exits at the first allowed
            layer, whatever the confidence. Several: one for each of exit layers 1..L-1. A path: of a calibration's
            JSON (`layerskip-moe calibrate`), which then says all settings below too, and wins over one that is left
            at its default here. Decoding by it is refused where its promise does not hold: for other weights, more new
            tokens, another temperature or repetition penalty.
        confidence: "softmax_diff", the two largest probabilities' difference; "state", the cosine between the
            states before and after a layer, from layer 2 on; an `ExitClassifier`; or a function of (hidden [N, D],
            previous [N, D], logits [N, V]) to [N] (see `confidence.py`)
        min_layer: the first exit layer that may be taken, 1..L
        decay: lower the threshold along the text, as CALM does: clip(0.9 threshold + 0.1 exp(-tau t / N), 0, 1) for
            the t-th of N new tokens (t from 0), because early mistakes cost more; thresholds of 0 and 1 stay. This is
            the paper's form: the code released with it multiplies the second term by the threshold, too.
        cache: the keys and values of layers a token never reached. "propagate": the exit state passed through their
            projections (CALM's, cheap, approximate). "exact": its run is taken up again from the exit state when
            a later token goes deeper, so that a token sees what the full model would have stored.
        tau: how fast the threshold decays where it does, 0 or more; the paper's is 4
        certified: what the JSON's promise holds for; None where no JSON was given
    """

    threshold: float | Sequence[float] | str | Path
    confidence: Confidence = "softmax_diff"
    min_layer: int = 1
    decay: bool = False
    cache: CacheRule = "propagate"
    tau: float = 4.0
    certified: Certified | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if isinstance(self.threshold, str | Path):
            settings, certified = read_calibration(self.threshold)
            self._take(settings, Path(self.threshold))
            object.__setattr__(self, "certified", certified)
        if isinstance(self.threshold, list | tuple):
            object.__setattr__(self, "threshold", tuple(self.threshold))
        for level in self.threshold if isinstance(self.threshold, tuple) else (self.threshold,):
            if isinstance(level, bool) or not isinstance(level, int | float):
                raise ValueError(
                    f"threshold={shown(level)} must be a number between 0 and 1, or a calibration file; or a list of "
                    "numbers, one for each exit layer."
                )
            if not 0 <= level <= 1:  # NaN is not either
                raise ValueError(f"threshold={level} must be between 0 (first exit) and 1 (never exit).")
        tau_is_number = isinstance(self.tau, int | float) and not isinstance(self.tau, bool)
        if not tau_is_number or not 0 <= self.tau <= sys.float_info.max:
            raise ValueError(f"tau={shown(self.tau)} must be a number of 0 or more; 4 is usual.")
        check_confidence(self.confidence)
        if isinstance(self.min_layer, bool) or not isinstance(self.min_layer, int):
            raise ValueError(f"min_layer={shown(self.min_layer)} must be a whole number: it counts layers.")
        if self.cache not in get_args(CacheRule):
            raise ValueError(f"cache={shown(self.cache)} is unknown; it is 'propagate' or 'exact'.")

    def _take(self, calibrated: dict[str, object], path: Path) -> None:
        """Take over a calibration's settings; a threshold means nothing under others."""
        for name, value in calibrated.items():
            default = type(self).__dataclass_fields__[name].default
            if name != "threshold" and getattr(self, name) not in (default, value):
                raise ValueError(
                    f"{path} was calibrated with {name}={shown(value)}, not {shown(getattr(self, name))}; leave "
                    f"{name} out."
                )
            object.__setattr__(self, name, value)

    def check(self, config: ModelConfig) -> None:
        """Raise ValueError where the model has no layer min_layer, or other layers than the thresholds or the probes
        are of."""
        if not 1 <= self.min_layer <= config.n_layers:
            raise ValueError(f"min_layer={self.min_layer} must be between 1 and n_layers={config.n_layers}.")
        if isinstance(self.threshold, tuple) and len(self.threshold) != config.n_layers - 1:
            raise ValueError(
                f"threshold has {len(self.threshold)} numbers, but the model has {config.n_layers - 1} exit layers "
                "before its last; give one number for each, or a single one."
            )
        if isinstance(self.confidence, ExitClassifier):
            self.confidence.check(config)

    def start(self, session: Session) -> None:
        """Run the prompts through all layers. Raises ValueError where a calibration's promise does not hold."""
        if self.certified is not None:
            self.certified.check(session, decay=self.decay)
        session.prefill()
        session.state = _Depths(session)

    def step(self, session: Session) -> None:
        """One round: the newest token of each row goes down until it is confident, then one new token."""
        model, depths = session.model, session.state
        assert isinstance(depths, _Depths)
        n_layers = model.config.n_layers
        thresholds = self._by_layer(n_layers)
        going = list(range(len(session.newest)))  # the rows that have not left, R of them
        hidden, exit_layers = model.embed(session.newest), [n_layers] * len(going)
        order: list[int] = []  # the rows as they left, and the logits of those that left together
        said: list[Tensor] = []
        done = 0
        for end in self._exits(thresholds):
            everybody = thresholds[end - 1] == 0  # leaves here, and nobody is asked
            kind = "softmax_diff" if everybody else self.confidence  # then the head is all that is wanted
            hidden, previous, told = depths.run(session, hidden, going, range(done, end), self.cache, kind)
            if everybody:
                leaves = [True] * len(going)
            else:
                before, asked = (None if tensor is None else tensor[:, 0] for tensor in (previous, told))
                sure = confidence_of(self.confidence, hidden[:, 0], before, asked, layer=end)
                leaves = (sure >= self._decayed(thresholds[end - 1], session)).tolist()
            if any(leaves):
                left = [index for index, leave in enumerate(leaves) if leave]
                stay = [index for index, leave in enumerate(leaves) if not leave]
                rows, state = [going[index] for index in left], _picked(hidden, left)
                said.append(model.unembed(state) if told is None else _picked(told, left))
                order += rows
                if end < n_layers:
                    depths.leave(rows, state)
                for row in rows:
                    exit_layers[row] = end
                going, hidden = [going[index] for index in stay], _picked(hidden, stay)
            if not going:
                break
            done = end
        logits = said[0]
        if len(said) > 1:
            logits = torch.cat(said)[sorted(range(len(order)), key=order.__getitem__)]
        depths.newest = [position + 1 for position in depths.newest]
        session.append(session.choose(session.scores(logits), session.noise(1)), layers_run=exit_layers)

    def _by_layer(self, n_layers: int) -> tuple[float, ...]:
        """The thresholds of exit layers 1..L before they decay; at layer L, 0: everybody leaves."""
        assert isinstance(self.threshold, int | float | tuple), "a path was read at construction"
        levels = self.threshold if isinstance(self.threshold, tuple) else (self.threshold,) * (n_layers - 1)
        return (*levels, 0)

    def _exits(self, thresholds: tuple[float, ...]) -> list[int]:
        """The exit layers, up to L, that may be taken and ever are; the layers between two of them run together."""
        first = min(first_exit(self.confidence, self.min_layer), len(thresholds))
        return [layer for layer in range(first, len(thresholds) + 1) if thresholds[layer - 1] < 1]

    def _decayed(self, threshold: float, session: Session) -> float:
        """This round's threshold. Every active row has got equally many tokens, t of N."""
        if not self.decay:
            return threshold
        t = session.max_new_tokens - session.remaining[0]
        decayed = 0.9 * threshold + 0.1 * math.exp(-self.tau * t / session.max_new_tokens)
        return min(max(decayed, 0.0), 1.0)


# States [R, 1, D] of rows at an exit; where the confidence asks for them those one layer before; and logits [R, 1, V].
_Asked = tuple[Tensor, Tensor | None, Tensor | None]


class _Depths:
    """How deep every position of every active row has come, and the state it waits in.

    newest:  by row, the position of its newest token
    reached: by row and layer, how many leading positions have keys and values there. It never rises with the
             layer, so what waits for a layer is always the end of the text.
    states:  [A, P, D], the state each waiting position left in, or was brought to since
    """

    def __init__(self, session: Session) -> None:
        config, cache = session.model.config, session.cache
        self.newest: list[int] = cache.lengths.tolist()
        self.reached = [[length] * config.n_layers for length in self.newest]
        shape = (len(self.newest), session.capacity, config.d_model)
        self.states = torch.zeros(shape, dtype=session.model.dtype, device=session.model.device)

    def select(self, rows: Tensor) -> None:
        """Keep only the given rows, in that order."""
        kept = rows.tolist()
        self.newest, self.reached = [self.newest[row] for row in kept], [self.reached[row] for row in kept]
        self.states = self.states[rows]

    def leave(self, rows: list[int], hidden: Tensor) -> None:
        """The newest tokens of some rows stop here, in the states hidden [len(rows), 1, D]."""
        self.states[rows, [self.newest[row] for row in rows]] = hidden[:, 0]

    def run(
        self, session: Session, hidden: Tensor, rows: list[int], layers: range, rule: CacheRule, kind: Confidence
    ) -> _Asked:
        """The newest tokens of R rows, hidden [R, 1, D], through the layers between two exits, and first what waits
        there before them. kind: the confidence, of which follows what is returned."""
        waiting: dict[int, list[int]] = {}  # how many positions wait -> which of the R rows have that many
        for index, row in enumerate(rows):
            waiting.setdefault(self.newest[row] - self.reached[row][layers[0]], []).append(index)
            self.reached[row][layers[0] : layers[-1] + 1] = [self.newest[row] + 1] * len(layers)
        if waiting.keys() == {0}:
            return self._run_newest(session, hidden, rows, layers, kind)
        # Rows that have equally much to make up for do it together: padding would cost what early exit saves. What
        # waits for the first of the layers waits for all of them, because nobody leaves between them.
        after, before = torch.empty_like(hidden), torch.empty_like(hidden)
        for count, indices in waiting.items():
            at, positions, cache = self._places(session, [rows[index] for index in indices], count)
            if rule == "propagate":
                if count:
                    states = self.states[at, positions[:, :-1]]
                    session.model.fill(states, layers, positions=positions[:, :-1], cache=cache)
                continue
            self.states[at[:, 0], positions[:, -1]] = hidden[indices, 0]
            states, previous = _run(session, self.states[at, positions], layers, positions, cache)
            self.states[at, positions] = states
            after[indices], before[indices] = states[:, -1:], previous[:, -1:]
        if rule == "propagate":
            return self._run_newest(session, hidden, rows, layers, kind)
        return after, before, session.model.unembed(after) if asks_head(kind) else None

    def _run_newest(self, session: Session, hidden: Tensor, rows: list[int], layers: range, kind: Confidence) -> _Asked:
        _, positions, cache = self._places(session, rows, 0)
        if asks_head(kind) and not asks_previous(kind):  # in one call
            output, logits = session.model.decode(hidden, layers, positions=positions, cache=cache)
            return output.hidden, None, logits
        states, before = _run(session, hidden, layers, positions, cache)
        return states, before, session.model.unembed(states) if asks_head(kind) else None

    def _places(self, session: Session, rows: list[int], waiting: int) -> tuple[Tensor, Tensor, KVCache]:
        """Where the newest token of each of R rows stands, and as many positions before it as wait: rows [R, 1],
        positions [R, waiting + 1], and the cache of these rows."""
        if not waiting and len(rows) == len(self.newest):
            return session.rows[:, None], session.positions(1), session.cache
        device, cache = self.states.device, session.cache
        at = torch.tensor(rows, device=device)
        newest = torch.tensor([self.newest[row] for row in rows], device=device)
        if len(rows) < len(self.newest):
            cache = cache.subset(at)
        return at[:, None], newest[:, None] + torch.arange(-waiting, 1, device=device), cache


def _picked(tensor: Tensor, rows: list[int]) -> Tensor:
    """Some rows of a tensor, in rising order; all of them are the tensor itself."""
    return tensor if len(rows) == len(tensor) else tensor[rows]


def _run(session: Session, hidden: Tensor, layers: range, positions: Tensor, cache: KVCache) -> tuple[Tensor, Tensor]:
    """States [R, T, D] after the last of some layers, and before it."""
    before = layers[-2:-1]  # the layer whose output is wanted too; none where there is but one
    out = session.model.run(hidden, layers, positions=positions, cache=cache, collect=before)
    return out.hidden, out.collected[before[0]] if before else hidden
