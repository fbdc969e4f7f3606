"""fit_cost_model: the constants of a model's cost model on this machine, from rounds of the model itself, timed once.

L layers, E experts, K chosen. Next: `cost_model.py`; `policies/adaptive.py`, which asks for it.
"""

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch

from layerskip_moe.generation.autoregressive import Autoregressive
from layerskip_moe.generation.cost_model import CostModel, moe_layers
from layerskip_moe.generation.policies.exits import proposing_layers
from layerskip_moe.generation.policies.policy import RoundReport
from layerskip_moe.generation.sampling import Sampling
from layerskip_moe.generation.session import Session
from layerskip_moe.nn import ModelConfig, MoEDecoder, few_rows
from layerskip_moe.nn.int8_copies import int8_copies
from layerskip_moe.nn.modes import evaluating
from layerskip_moe.nn.ragged import MarginRule, Stage, Staged

_AT_MOST = 2.7  # times the time there is, where other work holds the processors, and a round may take as long
_BLOCKS, _STEPS = 5, 3  # of each kind in _SECONDS, while there is time, and of each block
_SECONDS = 1.5  # for timing rounds
_STAGED = 6  # drafts in stages
_COLD = 8  # places that come before: what a kind of step reads is not near at first

_fitted: "WeakKeyDictionary[MoEDecoder, dict[object, CostModel]]" = WeakKeyDictionary()


def fit_cost_model(
    model: MoEDecoder,
    batch_size: int = 1,
    *,
    exits: Sequence[int] = (),
    int8_drafts: bool = False,
    seconds: float = _SECONDS,
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


@dataclass(frozen=True)
class _Block:
    """Steps of one kind, one after the other.

    exit_layer, drafted, made: 0, 0 and 0 of plain decoding; by row
    experts: as `RoundReport` has them, of one of the steps; None of plain decoding
    greedy: whether the text is
    seconds: of the last few; of the last, where a text has room for no more
    staged: of drafts in stages, as `RoundReport` has it: each such step is a block of its own, for no two do the same
    """

    exit_layer: int
    drafted: tuple[int, ...]
    made: tuple[int, ...]
    experts: list[int] | None
    greedy: bool
    seconds: list[float]
    staged: Staged | None = None


class _Kind(NamedTuple):
    """A kind of round: layers that draft, drafts of each row, whether the first is to be let go, and none verified,
    where a margin rule holds: this tells what choosing a draft costs from what verifying one does; and how drafts are
    made in stages."""

    exit_layer: int
    drafts: int
    let_go: bool = False
    stage: Stage | None = None


class _OneAfterAnother:
    """A policy of one kind of round after another, as it is told."""

    shadow, should_stop = False, None

    def __init__(self, int8_drafts: bool) -> None:
        self.kind, self.experts, self.int8_drafts = _Kind(0, 0), False, int8_drafts
        self.margin_rule: MarginRule | None = None
        self.stage: Stage | None = None
        self.report: RoundReport | None = None

    def plan(self, session: Session) -> list[tuple[int, int]]:
        """The same for every row."""
        rows = len(session.row_numbers)
        self.margin_rule = MarginRule([math.inf] * rows, 1.0) if self.kind.let_go else None
        self.stage = self.kind.stage
        return [(self.kind.exit_layer, self.kind.drafts)] * rows

    def observe(self, round: RoundReport) -> None:
        """Keep it."""
        self.report = round


def _fit(model: MoEDecoder, batch_size: int, exits: Sequence[int], int8_drafts: bool, seconds: float) -> CostModel:
    config = model.config
    kinds = _kinds(config, batch_size, exits, 11 if int8_drafts else 5)
    if int8_drafts and batch_size == 1 and (proposing := proposing_layers(config.n_layers)):
        # Every proposal is followed, most in vain: this tells what further places of a run cost.
        kinds.append(
            _Kind(config.n_layers, min(_STAGED, max(kind.drafts for kind in kinds)), False, Stage(proposing, 0.0, 0))
        )
    # Rows of a batch end one by one, and what fewer take cannot be told from what all do. (All come last: their
    # recordings serve the batch.)
    sizes = [batch_size] if batch_size == 1 else [-(-batch_size // 4), batch_size]
    if int8_drafts:
        int8_copies(model)  # which is not to be timed
    policy = _OneAfterAnother(int8_drafts)
    # (The rounds of all take longer, and are what is decoded for most of the time.)
    shares = [(rows, seconds * rows / sum(sizes)) for rows in sizes]
    at_most = _AT_MOST * seconds / len(sizes)
    timed = [some for rows, share in shares for some in _time_rounds(model, rows, policy, kinds, share, at_most)]
    blocks = [block for some in timed for block in some]
    top_k = config.top_k * bool(config.num_experts)
    empty = CostModel(config.n_layers, moe_layers(config), config.num_experts, top_k, (), int8_drafts)
    return _fitted_to(empty, blocks, head=_head_over_layer(model))


def _head_over_layer(model: MoEDecoder) -> float:
    """How many weights the head has, of how many a token meets in a layer."""
    _, active = model.parameter_counts()
    outside = sum(weight.numel() for name, weight in model.named_parameters() if not name.startswith("blocks."))
    return model.config.vocab_size * model.config.d_model * model.config.n_layers / max(active - outside, 1)


def _time_rounds(
    model: MoEDecoder, rows: int, policy: _OneAfterAnother, kinds: list[_Kind], wanted: float, at_most: float
) -> list[list[_Block]]:
    """Steps of so many rows, of all kinds in turn, for about as many seconds, and for no more than so many where two
    turns take longer: of each turn its blocks."""
    config = model.config
    blocks, started, draw = list[list[_Block]](), time.perf_counter(), random.Random(rows)
    most = _BLOCKS * len(kinds) * max(wanted / _SECONDS, 1.0)
    least, before, sessions = 2 * len(kinds), -1, 0  # the first of a kind is recorded, and takes longer

    def is_over() -> bool:
        late = time.perf_counter() - started > (wanted if len(blocks) >= least else at_most)
        return late or len(blocks) >= most

    while before < len(blocks) and not is_over():
        before = len(blocks)
        tokens = min(256, config.max_seq_len - 2)
        prompts = [[draw.randrange(config.vocab_size) for _ in range(2)] for _ in range(rows)]
        # Greedy text runs in circles, and reads fewer experts: that tells what they cost from what rows cost.
        sampling = Sampling(temperature=float(sessions % 2 == 0))
        session, sessions = Session(model, prompts, sampling, max_new_tokens=tokens), sessions + 1
        _run(session, policy, kinds, blocks, is_over)
        session.close()
    return blocks[len(kinds) :] or blocks


def _run(
    session: Session,
    policy: _OneAfterAnother,
    kinds: list[_Kind],
    blocks: list[list[_Block]],
    is_over: Callable[[], bool],
) -> None:
    """Time steps of all kinds, some of each in turn, until a row has no use for the longest drafts, or time is up."""
    from layerskip_moe.generation.self_speculative import SelfSpeculative  # which imports `Adaptive`, and that this

    rows = len(session.rows)
    plain, drafting = Autoregressive(), SelfSpeculative(policy=policy)
    longest = max(kind.drafts for kind in kinds)
    session.prefill()
    while len(session.row_numbers) == rows and min(session.remaining) > longest and not is_over():
        policy.kind = exit_layer, drafts, _, stage = kinds[len(blocks) % len(kinds)]
        seconds, experts, staged = list[float](), None, list[Staged | None]()
        cold = max(math.ceil(_COLD / (rows * (drafts + 1))), 2)  # the first tells of experts, which is another step
        for turn in range(cold + _STEPS):
            if turn and (len(session.row_numbers) < rows or min(session.remaining) <= longest or is_over()):
                break
            policy.experts = turn == 0
            began = time.perf_counter()
            (drafting if drafts else plain).step(session)
            seconds.append(time.perf_counter() - began)  # a GPU was waited for: it was asked for the tokens
            if policy.experts and drafts and policy.report is not None:
                experts = policy.report.experts
            staged.append(policy.report.staged if stage and policy.report is not None else None)
        made = (drafts,) * rows
        drafted = tuple(policy.report.drafted) if drafts and policy.report is not None else made
        timed = seconds[cold:] or seconds[-1:]
        of_block = exit_layer, drafted, made, experts, session.sampling.greedy
        if stage:
            told = zip(timed, staged[-len(timed) :], strict=True)
            blocks.append([_Block(*of_block, [took], did) for took, did in told])
        else:
            blocks.append([_Block(*of_block, timed)])


def _kinds(config: ModelConfig, batch_size: int, exits: Sequence[int], most: int) -> list[_Kind]:
    """The rounds to time: plain ones, early to late exits, no drafts, short and long drafts, of at most so many."""
    exits = exits or list(dict.fromkeys(max(config.n_layers // part, 1) for part in (6, 4, 2)))
    exits = exits if batch_size == 1 else list(dict.fromkeys([exits[0], exits[-1]]))  # their rounds take longer
    room = few_rows.MOST_ROWS // batch_size - 1
    if batch_size > 1:  # half of it: the longest would take the time that several turns of all kinds need
        room = max(room // 2, min(room, 2))
    longest = max(min(most, room, config.max_seq_len - 4), 1)
    pairs = [_Kind(exit_layer, length) for exit_layer in exits for length in sorted({1, longest})]
    let_go = [_Kind(exit_layer, 1, True) for exit_layer in sorted({exits[0], exits[-1]})]
    return [_Kind(0, 0), *pairs, *(_Kind(exits[-1], length) for length in range(3, longest, most // 2)), *let_go]


# Features of the head, and those of layers whose costs it has, times its weights over a layer's: in rounds of one row a
# draft is chosen for every place that is verified, but for one, and what either costs would hardly be told apart.
_TIED = {2: 3, 8: 6}


def _fitted_to(empty: CostModel, blocks: Sequence[_Block], *, head: float) -> CostModel:
    """Least squares of relative errors, no cost below 0; of steps of one kind the median counts. Of no steps, as where
    texts have room for none, nothing costs anything. head: its weights over a layer's"""
    if not blocks:
        return replace(empty, seconds=(0.0,) * len(empty.amounts(0, 0, 0, 1, 1, 0.0)))
    seconds: dict[object, list[float]] = {}
    did: dict[object, list[list[float]]] = {}
    for block in blocks:
        kind = block.exit_layer, block.drafted, block.made, block.greedy, block.staged
        exit_layers = [block.exit_layer] * len(block.drafted)
        # (A plain step of several rows: as many experts as independent choices read.)
        seconds.setdefault(kind, []).extend(block.seconds)
        did.setdefault(kind, []).append(
            empty.features(exit_layers, block.drafted, block.experts, block.made, block.staged)
        )
    medians = torch.tensor([sorted(some)[len(some) // 2] for some in seconds.values()], dtype=torch.float64)
    features = torch.stack([torch.tensor(some, dtype=torch.float64).mean(dim=0) for some in did.values()])
    free = [feature for feature in range(features.shape[1]) if feature not in _TIED]
    for of_head, of_layer in _TIED.items():
        features[:, of_layer] += head * features[:, of_head]
    costs = torch.zeros(features.shape[1], dtype=torch.float64)
    costs[free] = _nonnegative_least_squares(features[:, free] / medians[:, None], torch.ones_like(medians))
    for of_head, of_layer in _TIED.items():
        costs[of_head] = head * costs[of_layer]
    return replace(empty, seconds=tuple(costs.tolist()))


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
