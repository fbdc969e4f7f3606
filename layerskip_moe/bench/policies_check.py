"""Replays of policies against real decoding of the same prompts: are the rounds the same, and is the time?

Rounds are, each accepting as many drafts, where a policy looks neither at the clock nor at what is drafted behind a
refused draft, nor at what was done to make drafts in stages. Times are this machine's as it is now, the modelled ones
too: by cost models of rounds that are timed between prompts, for a machine's speed changes from minute to minute.

Next: `policies.py`, which replays; `decoding.py`, which times strategies.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from tqdm.auto import tqdm

from layerskip_moe.analysis.trace import TracedText
from layerskip_moe.bench.contenders import both_costs, cost_fit
from layerskip_moe.bench.interleave import in_turn
from layerskip_moe.bench.policies import PolicyRun
from layerskip_moe.bench.replay import replay
from layerskip_moe.bench.rounds import TextRounds
from layerskip_moe.generation import Autoregressive, GenerationStats, SelfSpeculative, generate
from layerskip_moe.generation.policies.policy import Policy, RoundReport
from layerskip_moe.nn import MoEDecoder
from layerskip_moe.nn.compiling import can_compile, compiling

_WARM_UP_TOKENS = 16
_EVERY, _SECONDS = 2, 1.5  # prompts from one timing of rounds to the next, and for how long it goes on


class WatchedPolicy:
    """A policy whose rounds are kept: it is the other one in all but that."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self.rounds: list[RoundReport] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._policy, name)

    def observe(self, round: RoundReport) -> None:
        """Keep the round, and tell the policy."""
        self.rounds.append(round)
        self._policy.observe(round)


@dataclass(frozen=True)
class CheckedRun:
    """One policy, decoded for real.

    Attributes:
        name: as in the comparison
        same_rounds: prompts whose every round accepted as many drafts as the replay's
        prompts: of how many
        same_text: prompts whose text is the trace's
        modelled_seconds: of all prompts, by the cost model
        measured_seconds: of the same, decoding alone
        measured_over_modelled: median over prompts
        modelled_speed_up: over plain decoding, of all prompts
        measured_speed_up: likewise
    """

    name: str
    same_rounds: int
    prompts: int
    same_text: int
    modelled_seconds: float
    measured_seconds: float
    measured_over_modelled: float
    modelled_speed_up: float
    measured_speed_up: float


def check_policies(
    model: MoEDecoder, texts: Sequence[TracedText], runs: Sequence[PolicyRun], *, progress: bool = True
) -> list[CheckedRun]:
    """Decode the prompts of these continuations with every policy of the runs; the first is plain decoding, by
    `Autoregressive`.

    Each policy is new and meets the prompts in their order; the policies take turns, prompt by prompt, after a few
    untimed tokens each. Runs without a policy are left out. Between prompts rounds are timed, for cost models of the
    very minutes in which all was decoded.
    """
    makers = {run.name: run.make for run in runs if run.make is not None}
    policies = {name: WatchedPolicy(make()) for name, make in makers.items()}
    counts: dict[str, list[GenerationStats]] = {name: [] for name in makers}
    same_rounds, same_text = dict.fromkeys(makers, 0), dict.fromkeys(makers, 0)
    replayed, fit, first = {run.name: run for run in runs}, cost_fit(model), next(iter(makers))

    def decode(
        name: str, policy: Policy | WatchedPolicy, text: TracedText, count: int
    ) -> tuple[list[int], GenerationStats]:
        out = generate(
            model,
            [text.tokens[: text.prompt_length].tolist()],
            Autoregressive() if name == first else SelfSpeculative(policy=policy),
            max_new_tokens=count,
            temperature=text.temperature,
            seed=text.seed,
        )
        return out.tokens[0], out.stats

    total = (1 + len(texts)) * len(makers)
    with tqdm(total=total, desc="decoding with policies", disable=not progress, leave=False) as bar:
        for name, make in makers.items():
            decode(name, make(), texts[0], min(_WARM_UP_TOKENS, len(texts[0].tokens) - texts[0].prompt_length))
            bar.update()
        for index, text in enumerate(texts):
            if index % _EVERY == 0:
                with compiling(model, can_compile(model.device)):
                    fit.time(_SECONDS)
            expected = text.tokens[text.prompt_length :].tolist()
            for name in in_turn(list(makers), index, len(texts)):
                policy = policies[name]
                policy.rounds.clear()
                new, stats = decode(name, policy, text, len(expected))
                counts[name].append(stats)
                # (Of steps of plain decoding nobody is told.)
                accepted = [0] * len(new) if name == first else [report.accepted[0] for report in policy.rounds]
                same_rounds[name] += accepted == [round.accepted for round in replayed[name].rounds[index]]
                same_text[name] += new == expected
                bar.update()
    measured = {name: [stats.decode_seconds for stats in found] for name, found in counts.items()}
    costs = both_costs(fit)
    rounds = [TextRounds(text, model.config, *costs) for text in texts]
    modelled = {
        name: [sum(round.seconds for round in of_text) for of_text in replay(rounds, make(), model.config)]
        for name, make in makers.items()
    }
    return [
        CheckedRun(
            name=name,
            same_rounds=same_rounds[name],
            prompts=len(texts),
            same_text=same_text[name],
            modelled_seconds=sum(modelled[name]),
            measured_seconds=sum(seconds),
            measured_over_modelled=median(real / told for real, told in zip(seconds, modelled[name], strict=True)),
            modelled_speed_up=sum(modelled[first]) / sum(modelled[name]),
            measured_speed_up=sum(measured[first]) / sum(seconds),
        )
        for name, seconds in measured.items()
    ]
