"""CostModel: how long a round of self-speculation takes on this machine, by how much is drafted and verified.

Verifying several tokens reads the union of their experts, so its time depends on the text: a formula of layers, rows
and experts, and a few constants.

L layers, E experts, K chosen. Knows nothing of acceptance. Next: `fit_cost_model.py`, which finds the constants;
`policies/reckoning.py`; `bench/replay.py`.
"""

import operator
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace

from layerskip_moe.nn import ModelConfig
from layerskip_moe.nn.ragged import Staged


@dataclass(frozen=True)
class CostModel:
    """Seconds of a round: the sum of what it does times what each costs.

    Attributes:
        n_layers: L
        moe_layers: those with experts, by index
        num_experts, top_k: E and K; 0 and 0 in a dense model
        seconds: of each of `features`
        int8_drafts: whether drafts are made from int8 copies of the weights: then every layer verifies
        asking: seconds that a round takes longer where a policy has `should_stop`, and for each draft that is made;
            where it wants shadow tokens, and for each of them
    """

    n_layers: int
    moe_layers: tuple[int, ...]
    num_experts: int
    top_k: int
    seconds: tuple[float, ...]
    int8_drafts: bool = False
    asking: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0)

    def is_of(self, config: ModelConfig) -> bool:
        """Whether it is of such a network."""
        return (self.n_layers, self.moe_layers, self.num_experts) == (
            config.n_layers,
            moe_layers(config),
            config.num_experts,
        )

    def beside(self, other: "CostModel") -> "CostModel":
        """The same in proportion, with plain decoding as fast as the other's: the two were timed at different times,
        and a machine is not always as fast."""
        ours, others = (cost.round_seconds([0], [0]) for cost in (self, other))
        if not (ours and others):  # of no steps, as where texts have room for none
            return self
        seconds, asking = (tuple(others / ours * one for one in costs) for costs in (self.seconds, self.asking))
        return replace(self, seconds=seconds, asking=asking)

    def round_seconds(
        self,
        exit_layers: Sequence[int],
        drafted: Sequence[int],
        experts: Sequence[float] | None = None,
        made: Sequence[int] | None = None,
        staged: Staged | None = None,
    ) -> float:
        """Seconds of a round. By row: the layers that draft (0: none) and the drafts that are verified; by MoE layer:
        how many different experts verification reads, by default as many as independent choices would be; by row the
        drafts that are made, where more are than are verified; what was done to make one row's in stages."""
        return self.seconds_of(self.features(exit_layers, drafted, experts, made, staged))

    def asking_seconds(self, *, stops: bool, made: int, shadow: int) -> float:
        """Seconds more of a round that asks for something: of `should_stop`, after each of the drafts that are made;
        of shadow tokens, so many."""
        did = stops, stops * made, shadow > 0, shadow
        assert len(self.asking) == len(did)
        return sum(map(operator.mul, self.asking, did))

    def seconds_of(self, features: Sequence[float]) -> float:
        """Seconds of a round that does so much."""
        assert len(features) == len(self.seconds)
        return sum(map(operator.mul, self.seconds, features))

    def features(
        self,
        exit_layers: Sequence[int],
        drafted: Sequence[int],
        experts: Sequence[float] | None = None,
        made: Sequence[int] | None = None,
        staged: Staged | None = None,
    ) -> list[float]:
        """What a round does: one round; drafting at all; tokens chosen while drafting; layers run while drafting, and
        further rows of them; layers run while verifying, further rows of them, further experts of them; further rows
        of the head."""
        rows, places, most = len(drafted), sum(drafted) + len(drafted), max(made or drafted)
        exit_layer = max(exit_layers) if most else 0
        later = self.more_experts(exit_layer, places) if experts is None else self.later_experts(exit_layer, experts)
        return self.amounts(exit_layer, max(drafted), most, rows, places, later, staged)

    def amounts(
        self,
        exit_layer: int,
        longest: int,
        most: int,
        rows: int,
        places: int,
        later: float,
        staged: Staged | None = None,
    ) -> list[float]:
        """`features` of a round of so many rows and places, where the longest draft that is verified has so many
        tokens, and the longest that is made has `most`, whose verification reads `later` more experts than one row
        would; in stages, where so much was done for it."""
        first = self.first_to_verify(exit_layer)
        # (The last draft's own early layers are run where verification goes on from them.)
        early, late = float(exit_layer * (most if self.int8_drafts else longest + 1)), self.n_layers - first
        chosen, more_early = float(most), early * (rows - 1)
        if staged is not None and most:
            then = exit_layer - staged.exit_layer
            assert rows == 1, "drafts of one row are made in stages"
            chosen = staged.heads  # (over how many places is among what further rows cost)
            early = staged.exit_layer * staged.proposing + then * staged.choosing
            more_early = exit_layer * staged.places - early
        further = float(places - 1)
        return [
            1.0,
            float(most > 0),
            chosen,
            early,
            more_early,
            float(late),
            late * further,
            later,
            further,
        ]

    def first_to_verify(self, exit_layer: int) -> int:
        """The first of the layers that run over all places at verification."""
        return 0 if self.int8_drafts else exit_layer

    def later_experts(self, exit_layer: int, experts: Sequence[float]) -> float:
        """Of the different experts that each MoE layer read, those that verification did beyond those of one place."""
        pairs, first = zip(self.moe_layers, experts, strict=True), self.first_to_verify(exit_layer)
        return sum(read - self.top_k for layer, read in pairs if layer >= first)

    def more_experts(self, exit_layer: int, places: int) -> float:
        """Experts that so many places read in the layers that verify beyond those of one place, were all to choose
        independently and evenly."""
        layers = len(self.moe_layers) - bisect_left(self.moe_layers, self.first_to_verify(exit_layer))
        return layers * (self.expected_experts(places) - self.top_k)

    def expected_experts(self, rows: int) -> float:
        """Different experts that `rows` rows choose, were they to choose independently and evenly."""
        return self.num_experts * (1 - (1 - self.top_k / self.num_experts) ** rows) if self.num_experts else 0.0


def moe_layers(config: ModelConfig) -> tuple[int, ...]:
    """The layers with experts, by index."""
    return tuple(layer for layer in range(config.n_layers) if config.is_moe(layer))
