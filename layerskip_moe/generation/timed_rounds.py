"""Rounds of self-speculation of all kinds, timed in turn.

Next: `fit_cost_model.py`, which finds what the times come to.
"""

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from layerskip_moe.generation.autoregressive import Autoregressive
from layerskip_moe.generation.policies.exits import MOST_DRAFTS, proposing_layers
from layerskip_moe.generation.policies.policy import RoundReport
from layerskip_moe.generation.sampling import Sampling
from layerskip_moe.generation.session import Session
from layerskip_moe.nn import ModelConfig, MoEDecoder, few_rows
from layerskip_moe.nn.ragged import MarginRule, Stage, Staged

SECONDS = 1.5  # for timing rounds
_BLOCKS, _STEPS = 5, 3  # of each kind in SECONDS, while there is time, and of each block
_STAGED, _SURE = 6, 0.5  # drafts in stages, and the margin at which proposals are followed
_COLD = 8  # places that come before: what a kind of step reads is not near at first
_MOST, _MOST_INT8 = 5, 11  # drafts of a row, of the weights themselves and from int8 copies


class Kind(NamedTuple):
    """A kind of round: layers that draft, none where drafts are looked up; drafts of each row; whether the first is to
    be let go, and none verified, where a margin rule holds; how drafts are made in stages, and whether from int8
    copies; and what is asked for: whether to stop after each draft, and shadow tokens of all layers. (Drafts that are
    looked up, and such that are let go, tell what verifying a draft costs from what making it does.)"""

    exit_layer: int
    drafts: int
    let_go: bool = False
    stage: Stage | None = None
    int8: bool = False
    stops: bool = False
    shadow: bool = False

    @property
    def asks(self) -> bool:
        """Whether anything is asked for."""
        return self.stops or self.shadow


PLAIN = Kind(0, 0)


@dataclass(frozen=True)
class Block:
    """Steps of one kind, one after the other.

    drafted, made: by row; none of plain decoding
    experts: as `RoundReport` has them, of one of the steps; None of plain decoding
    greedy: whether the text is
    seconds: of the last few; of the last, where a text has room for no more
    staged: of drafts in stages, as `RoundReport` has it: each such step is a block of its own, for no two do the same
    """

    kind: Kind
    drafted: tuple[int, ...]
    made: tuple[int, ...]
    experts: list[int] | None
    greedy: bool
    seconds: list[float]
    staged: Staged | None = None


class _OneAfterAnother:
    """A policy of one kind of round after another, as it is told."""

    def __init__(self) -> None:
        self.kind, self.experts = PLAIN, False
        self.lookup_drafts: list[list[int]] = []
        self.report: RoundReport | None = None
        self.margin_rule: MarginRule | None = None
        self.stage: Stage | None = None

    @property
    def shadow(self) -> bool:
        return self.kind.shadow

    @property
    def int8_drafts(self) -> bool:
        return self.kind.int8

    @property
    def should_stop(self) -> Callable[[Tensor, int], bool] | None:
        return self._never if self.kind.stops else None

    def plan(self, session: Session) -> list[tuple[int, int]]:
        """The same for every row. What is looked up is the end of its text, once more."""
        exit_layer, drafts, let_go, self.stage = self.kind[:4]
        rows, looks_up = len(session.row_numbers), drafts and not exit_layer
        self.margin_rule = MarginRule([math.inf] * rows, 1.0) if let_go else None
        self.lookup_drafts = [(text * drafts)[-drafts:] for text in session.texts()] if looks_up else []
        return [(exit_layer or 1, drafts)] * rows

    def observe(self, round: RoundReport) -> None:
        """Keep it."""
        self.report = round

    def _never(self, confidence: Tensor, position: int) -> bool:
        return False


def time_rounds(
    model: MoEDecoder, rows: int, kinds: list[Kind], wanted: float, at_most: float, *, begun: int = 0
) -> list[list[Block]]:
    """Steps of so many rows, of all kinds in turn, for about as many seconds, and for no more than so many where two
    turns take longer: of each turn its blocks. begun: how often that was done before, with other texts."""
    config = model.config
    blocks, started, draw = list[list[Block]](), time.perf_counter(), random.Random(rows + 100 * begun)
    most = _BLOCKS * len(kinds) * max(wanted / SECONDS, 1.0)
    least, before, sessions = 2 * len(kinds), -1, begun  # the first of a kind is recorded, and takes longer

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
        _run(session, kinds, blocks, is_over)
        session.close()
    # The first of a kind, where it is not the only one.
    first = max(min(len(kinds), len(blocks) - len(kinds)), 0)
    return blocks[first:]


def _run(session: Session, kinds: list[Kind], blocks: list[list[Block]], is_over: Callable[[], bool]) -> None:
    """Time steps of all kinds, some of each in turn, until a row has no use for so long drafts, or time is up."""
    from layerskip_moe.generation.self_speculative import SelfSpeculative  # which imports `Adaptive`, and that this

    rows, policy = len(session.rows), _OneAfterAnother()
    plain, drafting = Autoregressive(), SelfSpeculative(policy=policy)
    session.prefill()
    begun = len(blocks)
    while len(session.row_numbers) == rows and not is_over():
        policy.kind = kind = kinds[len(blocks) % len(kinds)]
        cold = max(math.ceil(_COLD / (rows * (kind.drafts + 1))), 2)  # the first tells of experts, and is another step
        # (A text that has no room for more than cold steps makes way for another one, which has more.)
        if min(session.remaining) <= (kind.drafts if len(blocks) == begun else (cold + 1) * (kind.drafts + 1)):
            break
        seconds, experts, staged = list[float](), None, list[Staged | None]()
        for turn in range(cold + _STEPS):
            if turn and (len(session.row_numbers) < rows or min(session.remaining) <= kind.drafts or is_over()):
                break
            policy.experts = turn == 0
            began = time.perf_counter()
            (plain if kind == PLAIN else drafting).step(session)
            seconds.append(time.perf_counter() - began)  # a GPU was waited for: it was asked for the tokens
            if policy.experts and kind.drafts and policy.report is not None:
                experts = policy.report.experts
            staged.append(policy.report.staged if kind.stage and policy.report is not None else None)
        drafted = made = (0,) * rows
        if kind.drafts and policy.report is not None:
            drafted, made = tuple(policy.report.drafted), tuple(policy.report.made)
        timed = seconds[cold:] or seconds[-1:]
        of_block = kind, drafted, made, experts, session.sampling.greedy
        if kind.stage:
            told = zip(timed, staged[-len(timed) :], strict=True)
            blocks.append([Block(*of_block, [took], did) for took, did in told])
        else:
            blocks.append([Block(*of_block, timed)])


def kinds_of(
    config: ModelConfig, batch_size: int, exits: Sequence[int], int8: bool, *, asking: bool = False
) -> list[Kind]:
    """The rounds to time: plain ones, early to late exits, no drafts, short and long drafts, drafts that are looked up;
    with asking, also such that ask for something."""
    most = _MOST_INT8 if int8 else _MOST
    exits = exits or list(dict.fromkeys(max(config.n_layers // part, 1) for part in (6, 4, 2)))
    exits = exits if batch_size == 1 else list(dict.fromkeys([exits[0], exits[-1]]))  # their rounds take longer
    room = few_rows.MOST_ROWS // batch_size - 1
    if batch_size > 1:  # half of it: the longest would take the time that several turns of all kinds need
        room = max(room // 2, min(room, 2))
    longest = max(min(most, room, config.max_seq_len - 4), 1)
    pairs = [Kind(exit_layer, length, int8=int8) for exit_layer in exits for length in sorted({1, longest})]
    let_go = [Kind(exit_layer, 1, True, int8=int8) for exit_layer in sorted({exits[0], exits[-1]})]
    most_of_all = max(min(MOST_DRAFTS, room, config.max_seq_len - 4), 1)
    looked_up = [Kind(0, length) for length in sorted({longest, most_of_all})]
    between = [Kind(exits[-1], length, int8=int8) for length in range(3, longest, most // 2)]
    staged, asks = list[Kind](), list[Kind]()
    if int8 and batch_size == 1 and (proposing := proposing_layers(config.n_layers)):
        # Every proposal is followed, most in vain: this tells what further places of a run cost. Of long rounds, which
        # are decoded by for most of the time, some are.
        every, some = Stage(proposing, 0.0, 0), Stage(proposing, _SURE)
        staged = [Kind(config.n_layers, min(_STAGED, longest), stage=every, int8=True)]
        staged += [Kind(config.n_layers, most_of_all, stage=stage, int8=True) for stage in (some, None)]
    if asking:
        asks = [PLAIN._replace(shadow=True)]
        asks += [kind._replace(shadow=True) for kind in pairs[:2]]
        asks += [] if int8 else [kind._replace(stops=True) for kind in pairs]
    # (Where time is up before all had their turn: none of the others tells what verification takes.)
    return [PLAIN, *looked_up, *pairs, *between, *let_go, *staged, *asks]
