"""fit_cost_model: the constants of a model's cost model on this machine, from rounds of the model itself, timed once.

L layers, E experts, K chosen. Next: `cost_model.py`; `timed_rounds.py`, which times; `policies/adaptive.py`, which asks
for it.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from weakref import WeakKeyDictionary

import torch

from layerskip_moe.generation.cost_model import CostModel, moe_layers
from layerskip_moe.generation.timed_rounds import SECONDS, Block, kinds_of, time_rounds
from layerskip_moe.nn import MoEDecoder
from layerskip_moe.nn.int8_copies import int8_copies
from layerskip_moe.nn.modes import evaluating
from layerskip_moe.nn.ragged import Staged

_AT_MOST = 2.7  # times the time there is, where other work holds the processors, and a round may take as long

_fitted: "WeakKeyDictionary[MoEDecoder, dict[object, CostModel]]" = WeakKeyDictionary()


def fit_cost_model(
    model: MoEDecoder,
    batch_size: int = 1,
    *,
    exits: Sequence[int] = (),
    int8_drafts: bool = False,
    seconds: float = SECONDS,
) -> CostModel:
    """Time rounds of this model, for about so many seconds, or 2.7 times that where the machine is busy, and fit the
    cost model; at once where it was done before in this process. The rounds are those of `generate` under `compiling`,
    which is left as it is, on texts sampled at temperature 1 and greedy ones in turn. Raises ValueError for no seconds.

    exits: exit layers, rising, that rounds are to be drafted by; by default some between early and late
    int8_drafts: whether drafts are made from int8 copies of the weights
    """
    if not seconds > 0:
        raise ValueError(f"seconds={seconds} must be above 0: it is the time for timing rounds.")
    key = batch_size, model.device, model.dtype, model.compiled, tuple(exits), int8_drafts, seconds
    fitted = _fitted.setdefault(model, {})
    if key not in fitted:
        with evaluating(model):
            fitted[key] = _fit(model, batch_size, exits, int8_drafts, seconds)
    return fitted[key]


class CostFit:
    """Cost models of rounds of one row, one for each way to draft, whose rounds are timed in turn, at once or now and
    then, and what a policy asks for, too. Plain decoding is as fast in all of them.

    ways: exit layers, as `fit_cost_model` has them, and whether drafts are int8
    """

    def __init__(self, model: MoEDecoder, ways: Sequence[tuple[Sequence[int], bool]]) -> None:
        kinds = [kind for exits, int8 in ways for kind in kinds_of(model.config, 1, exits, int8, asking=True)]
        self._model, self._ways, self._kinds = model, list(ways), list(dict.fromkeys(kinds))
        self._blocks, self._times, self._next = list[Block](), 0, 0

    def time(self, seconds: float) -> None:
        """Time rounds, for about so many seconds; for two turns of all kinds at least, where these do not take 2.7
        times as long: then the next call goes on with those that are left."""
        with evaluating(self._model):
            if any(int8 for _, int8 in self._ways):
                int8_copies(self._model)  # which is not to be timed
            kinds = self._kinds[self._next :] + self._kinds[: self._next]
            timed = time_rounds(self._model, 1, kinds, seconds, _AT_MOST * seconds, begun=self._times)
        self._blocks += [block for some in timed for block in some]
        self._times += 1
        if timed:
            self._next = (self._kinds.index(timed[-1][0].kind) + 1) % len(self._kinds)

    def cost_models(self) -> list[CostModel]:
        """By what was timed so far."""
        first, *others = (_cost_model(self._model, self._blocks, int8) for _, int8 in self._ways)
        return [first, *(other.beside(first) for other in others)]


def _fit(model: MoEDecoder, batch_size: int, exits: Sequence[int], int8: bool, seconds: float) -> CostModel:
    kinds = kinds_of(model.config, batch_size, exits, int8)
    # Rows of a batch end one by one, and what fewer take cannot be told from what all do. (All come last: their
    # recordings serve the batch.)
    sizes = [batch_size] if batch_size == 1 else [-(-batch_size // 4), batch_size]
    if int8:
        int8_copies(model)
    # (The rounds of all take longer, and are what is decoded for most of the time.)
    shares = [(rows, seconds * rows / sum(sizes)) for rows in sizes]
    at_most = _AT_MOST * seconds / len(sizes)
    timed = [some for rows, share in shares for some in time_rounds(model, rows, kinds, share, at_most)]
    return _cost_model(model, [block for some in timed for block in some], int8)


def _cost_model(model: MoEDecoder, blocks: Sequence[Block], int8: bool) -> CostModel:
    """Of one way to draft, by those of the blocks that are of it, or of none."""
    config = model.config
    top_k = config.top_k * bool(config.num_experts)
    empty = CostModel(config.n_layers, moe_layers(config), config.num_experts, top_k, (), int8)
    of_way = [block for block in blocks if not block.kind.exit_layer or block.kind.int8 == int8]
    cost = _fitted_to(empty, [block for block in of_way if not block.kind.asks], head=_head_over_layer(model))
    return replace(cost, asking=_asking(cost, [block for block in of_way if block.kind.asks]))


def _head_over_layer(model: MoEDecoder) -> float:
    """How many weights the head has, of how many a token meets in a layer."""
    _, active = model.parameter_counts()
    outside = sum(weight.numel() for name, weight in model.named_parameters() if not name.startswith("blocks."))
    return model.config.vocab_size * model.config.d_model * model.config.n_layers / max(active - outside, 1)


# Features of the head, and those of layers whose costs it has, times its weights over a layer's: in rounds of one row a
# draft is chosen for every place that is verified, but for one, and what either costs would hardly be told apart.
_TIED = {2: 3, 8: 6}


def _fitted_to(empty: CostModel, blocks: Sequence[Block], *, head: float) -> CostModel:
    """Least squares of relative errors, no cost below 0; of steps of one kind the median counts. Of no steps, as where
    texts have room for none, nothing costs anything. head: its weights over a layer's"""
    if not blocks:
        return replace(empty, seconds=(0.0,) * len(empty.amounts(0, 0, 0, 1, 1, 0.0)))
    # (A plain step of several rows: as many experts as independent choices read.)
    medians, features = _by_kind(blocks, lambda block: empty.features(*_round_of(block)))
    free = [feature for feature in range(features.shape[1]) if feature not in _TIED]
    for of_head, of_layer in _TIED.items():
        features[:, of_layer] += head * features[:, of_head]
    costs = torch.zeros(features.shape[1], dtype=torch.float64)
    costs[free] = _nonnegative_least_squares(features[:, free] / medians[:, None], torch.ones_like(medians))
    for of_head, of_layer in _TIED.items():
        costs[of_head] = head * costs[of_layer]
    return replace(empty, seconds=tuple(costs.tolist()))


def _asking(cost: CostModel, blocks: Sequence[Block]) -> tuple[float, ...]:
    """`CostModel.asking`: what rounds that ask took beyond what the others would have, fitted likewise."""
    if not blocks:
        return cost.asking

    def did(block: Block) -> list[float]:
        kind, rows, made = block.kind, len(block.drafted), max(block.made)
        shadow = kind.shadow * (cost.n_layers - 1) * (sum(block.drafted) + rows)
        return [kind.stops, kind.stops * made, kind.shadow, shadow, cost.round_seconds(*_round_of(block))]

    medians, features = _by_kind(blocks, did)
    more = (medians - features[:, -1]) / medians
    return tuple(_nonnegative_least_squares(features[:, :-1] / medians[:, None], more).tolist())


def _round_of(block: Block) -> tuple[Sequence[int], Sequence[int], Sequence[int] | None, Sequence[int], Staged | None]:
    """What `CostModel.round_seconds` is asked of."""
    return [block.kind.exit_layer] * len(block.drafted), block.drafted, block.experts, block.made, block.staged


def _by_kind(blocks: Sequence[Block], amounts: Callable[[Block], Sequence[float]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Of steps that did the same, N of them, median seconds [N] and mean amounts [N, .], float64."""
    seconds, did = dict[object, list[float]](), dict[object, list[Sequence[float]]]()
    for block in blocks:
        same = block.kind, block.drafted, block.made, block.greedy, block.staged
        seconds.setdefault(same, []).extend(block.seconds)
        did.setdefault(same, []).append(amounts(block))
    medians = torch.tensor([sorted(some)[len(some) // 2] for some in seconds.values()], dtype=torch.float64)
    return medians, torch.stack([torch.tensor(some, dtype=torch.float64).mean(dim=0) for some in did.values()])


def _nonnegative_least_squares(matrix: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """x >= 0 of least |matrix x - target|, by coordinate descent on columns of unit length."""
    norms = matrix.norm(dim=0).clamp(min=1e-30)
    gram, goal = (matrix / norms).T @ (matrix / norms), (matrix / norms).T @ target
    grams, goals, x = gram.tolist(), goal.tolist(), [0.0] * len(goal)
    for _ in range(500):
        for i, row in enumerate(grams):
            if row[i] > 0:
                x[i] = max(0.0, (goals[i] - sum(a * b for a, b in zip(row, x, strict=True)) + row[i] * x[i]) / row[i])
    return torch.tensor(x, dtype=torch.float64) / norms
