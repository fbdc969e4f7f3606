"""What a generation counted and timed.

Knows nothing of how tokens were made. Next: `generate.py`, which fills it.
"""

from dataclasses import dataclass, field


@dataclass
class GenerationStats:
    """Counts of one prompt, or of a whole batch: then each count is the sum over its prompts.

    Attributes:
        generated: new tokens given back (a stop token is not one of them)
        rounds: choices by the strategy's last word, the full model in most: verifications, or plain steps; one that
            only met a stop token is counted too
        layers_run: layers run to choose the new tokens, summed over them; neither drafts are counted, nor what early
            exit makes up for at earlier positions
        drafted_by_position: entry i: how many tokens were proposed, and verified, as the (i + 1)-th draft of a round;
            one that a margin rule lets go is not
        accepted_by_position: how many of those the full model agreed with; the token it adds itself is not one
        prefill_seconds: wall time of running the prompts
        decode_seconds: wall time of all that came after. A row decoded in a batch has the batch's times: they
            cannot be told apart.
    """

    generated: int = 0
    rounds: int = 0
    layers_run: int = 0
    drafted_by_position: list[int] = field(default_factory=list)
    accepted_by_position: list[int] = field(default_factory=list)
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    @property
    def drafted(self) -> int:
        """Tokens proposed by a draft."""
        return sum(self.drafted_by_position)

    @property
    def accepted(self) -> int:
        """Drafted tokens the full model agreed with."""
        return sum(self.accepted_by_position)

    @property
    def acceptance_rate(self) -> float:
        """accepted / drafted; 0.0 when nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def tokens_per_round(self) -> float:
        """Tokens each verification yielded, at most the draft length + 1."""
        return self.generated / self.rounds if self.rounds else 0.0

    @property
    def mean_layers(self) -> float:
        """Layers run to choose a new token, on average: the mean exit layer under early exit. See `layers_run` for
        what it leaves out."""
        return self.layers_run / self.generated if self.generated else 0.0

    @property
    def tokens_per_second(self) -> float:
        """New tokens per second of decoding, prefill apart."""
        return self.generated / self.decode_seconds if self.decode_seconds else 0.0

    def add_drafts(self, drafted: int, *, accepted: int) -> None:
        """Count one round's drafts."""
        _add(self.drafted_by_position, [1] * drafted)
        _add(self.accepted_by_position, [1] * accepted + [0] * (drafted - accepted))

    def add_counts(self, other: "GenerationStats") -> None:
        """Add another's counts; times are not counts."""
        self.generated += other.generated
        self.rounds += other.rounds
        self.layers_run += other.layers_run
        _add(self.drafted_by_position, other.drafted_by_position)
        _add(self.accepted_by_position, other.accepted_by_position)


def _add(counts: list[int], others: list[int]) -> None:
    """Add entry by entry, the shorter list taken to go on with zeros."""
    counts += [0] * (len(others) - len(counts))
    for index, count in enumerate(others):
        counts[index] += count
