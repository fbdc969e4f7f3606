"""What any round of self-speculation would do to a traced text: drafts accepted, experts read, seconds by a cost model.

A round at place n has n tokens of the continuation behind it. Its drafts are the text itself up to the first one that
the full model refuses; what is drafted after that, no trace has. Which experts those last drafts are sent to is taken
to be what the text's own tokens at their places are, and how many of them a margin rule keeps is what it would keep of
these; all else is exact, but for what is done to make drafts in stages (`staging.py`).

Drafts are made from the weights themselves, or from int8 copies of them (int8), and then all layers verify.

L layers, M MoE layers, N tokens of a continuation, D drafts, E experts, K chosen.
Knows nothing of policies. Next: `replay.py`, which asks one for every round; `oracle.py`, which knows the future.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from layerskip_moe.analysis.trace import Array, TracedText
from layerskip_moe.generation.ngrams import Text
from layerskip_moe.generation.policies.text_lookup import REPEATED
from layerskip_moe.nn import ModelConfig
from layerskip_moe.nn.ragged import LOOK_BACK, Stage, Staged


class RoundCost(Protocol):
    """What is asked of a cost model: of `CostModel`, or of any object that stands in for it."""

    def round_seconds(
        self,
        exit_layers: Sequence[int],
        drafted: Sequence[int],
        experts: Sequence[float] | None = None,
        made: Sequence[int] | None = None,
        staged: Staged | None = None,
    ) -> float:
        """Seconds of a round. By row: the layers that drafted (0: none) and the drafts that are verified; by MoE layer:
        how many different experts verification reads; by row the drafts that are made, where more are; what was done to
        make them in stages."""

    def asking_seconds(self, *, stops: bool, made: int, shadow: int) -> float:
        """Seconds more of a round in which a policy is asked whether to stop, after each draft that is made, or wants
        so many shadow tokens."""


class TextRounds:
    """The rounds that one continuation may be made of.

    text:       it and its prompt, whose tokens together are `all_tokens`
    agreeing:   [L, N + 1] from each place on, how many tokens in a row each layer would say right
    int8_agreeing: [L, N] of int8 drafts of a round there likewise, D at most
    confidence: [L, N] of what each layer says at each place, as in `TracedText`, whose prompt is left out here
    second, margin: [L, N], likewise
    """

    def __init__(
        self, text: TracedText, config: ModelConfig, cost: RoundCost, int8_cost: RoundCost | None = None
    ) -> None:
        """cost, int8_cost: of rounds of either kind of drafts; None: there are no int8 ones"""
        assert text.is_own, "rounds are of what the model wrote"
        self.text, self._config, self._costs = text, config, (cost, int8_cost)
        first = text.prompt_length - 1
        self.said, self.second, self.confidence, self.margin = (
            part[:, first:] for part in (text.said, text.second, text.confidence, text.margin)
        )
        self.tokens = text.tokens[text.prompt_length :]
        self.length, self.all_tokens = len(self.tokens), text.tokens.tolist()
        assert (self.said[-1] == self.tokens).all(), "the text is the last layer's"
        self.agreeing = np.zeros((len(self.said), self.length + 1), dtype=np.int64)
        for place in reversed(range(self.length)):
            right = self.said[:, place] == self.tokens[place]
            self.agreeing[:, place] = np.where(right, self.agreeing[:, place + 1] + 1, 0)
        self.int8_agreeing = np.logical_and.accumulate(text.int8_right, axis=2).sum(axis=2)
        self._moe_layers = [layer for layer in range(config.n_layers) if config.is_moe(layer)]
        chosen = text.experts[:, first:]
        sent = (chosen[..., None] == np.arange(config.num_experts)).any(axis=2)  # [M, N, E]
        # By place: [M, N - place], the different experts of that place and so many after it.
        self._union = [
            np.logical_or.accumulate(sent[:, place:], axis=1).sum(axis=-1, dtype=np.uint16)
            for place in range(self.length)
        ]
        self._seconds: dict[tuple[int, int, int, int, bool, Staged | None], float] = {}
        self._repetitions: dict[tuple[int, int], tuple[int, int]] = {}

    @property
    def most_int8(self) -> int:
        """D: the most int8 drafts of a round that are told of; 0 where there are none."""
        return 0 if self._costs[1] is None else self.text.int8_right.shape[2]

    def margins(self, place: int, exit_layer: int, drafted: int, *, int8: bool = False) -> Array:
        """[drafted] of that many drafts of that layer."""
        if int8:
            return self.text.int8_margin[exit_layer - 1, place, :drafted]
        return self.margin[exit_layer - 1, place : place + drafted]

    def accepted(self, place: int, exit_layer: int, drafted: int, *, int8: bool = False) -> int:
        """How many of that many drafts of that layer the full model agrees with."""
        agreeing = self.int8_agreeing if int8 else self.agreeing
        return min(int(agreeing[exit_layer - 1, place]), drafted) if drafted else 0

    def experts(self, place: int, exit_layer: int, drafted: int, *, int8: bool = False) -> list[int]:
        """By MoE layer, how many different experts verification reads. Layers that drafted run over the last place
        alone, where the draft's states are the model's; the others over the newest token and all drafts."""
        union = self._union[place][:, drafted].tolist()
        return [
            self._config.top_k if layer < exit_layer and not int8 else read
            for layer, read in zip(self._moe_layers, union, strict=True)
        ]

    def repetition(self, place: int, least: int) -> tuple[int, int]:
        """Of the last tokens before a place, so many or more, where they last stood: see `repeated_tokens`."""
        if (place, least) not in self._repetitions:
            found = repeated_tokens(self.all_tokens, self.text.prompt_length + place, least)
            self._repetitions[place, least] = found
        return self._repetitions[place, least]

    def foretold(self, place: int) -> int:
        """How many tokens from a place on are right, whichever lookup that policies do finds them."""
        return max(self.repetition(place, least)[1] for least in (Stage.lookup, REPEATED))

    def seconds(
        self,
        place: int,
        exit_layer: int,
        drafted: int,
        made: int | None = None,
        *,
        int8: bool = False,
        staged: Staged | None = None,
    ) -> float:
        """By the cost model; exit_layer 0: no layer was asked for drafts; without any this is a step of plain
        decoding. made: the drafts that layers made, where one more was than is verified; staged: what was done to make
        them."""
        if not exit_layer:
            made = 0
        elif made is None:
            made = drafted - (staged.looked_up if staged else 0)
        key = place, exit_layer, drafted, made, int8, staged
        if key not in self._seconds:
            experts = self.experts(place, exit_layer, drafted, int8=int8) if self._moe_layers else None
            cost = self._costs[int8]
            assert cost is not None, "there are int8 drafts"
            self._seconds[key] = cost.round_seconds([exit_layer], [drafted], experts, [made], staged)
        return self._seconds[key]

    def asking_seconds(self, *, int8: bool, stops: bool, made: int, shadow: int) -> float:
        """Likewise, of what is asked for."""
        cost = self._costs[int8]
        assert cost is not None, "there are int8 drafts"
        return cost.asking_seconds(stops=stops, made=made, shadow=shadow)


def repeated_tokens(tokens: Sequence[int], end: int, least: int) -> tuple[int, int]:
    """Where the last tokens before `end` last stood, `least` or more: how many of them, and how many tokens from `end`
    on are what followed them there, as the kernel finds it; (0, 0) where they stand nowhere else, or `least` is 0."""
    if not least:
        return 0, 0
    text, after = Text(tokens[max(end - LOOK_BACK, 0) : end], least, least), tokens[end:]
    same = (one == other for one, other in zip(text.continuation(len(after)), after, strict=False))
    return text.repeated(LOOK_BACK), [*same, False].index(False)
