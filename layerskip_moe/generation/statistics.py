"""What a generation counted and timed.

Knows nothing of how tokens were made. Next: `generate.py`, which fills it.
"""

from dataclasses import dataclass


@dataclass
class GenerationStats:
    """Counts of one prompt, or of a whole batch: then each count is the sum over its prompts.

    generated: new tokens given back (a stop token is not one of them)
    rounds:    passes of the full model over a row: verifications, or plain steps; one that only met a stop
               token is counted too
    drafted:   tokens proposed by a draft
    accepted:  drafted tokens the full model agreed with; the token it adds itself is not one of them
    prefill_seconds, decode_seconds: wall time of running the prompts, and of all that came after. A row
               decoded in a batch has the batch's times: they cannot be told apart.
    """

    generated: int = 0
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    @property
    def acceptance_rate(self) -> float:
        """accepted / drafted; 0.0 when nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def tokens_per_round(self) -> float:
        """Tokens each verification yielded, at most the draft length + 1."""
        return self.generated / self.rounds if self.rounds else 0.0

    @property
    def tokens_per_second(self) -> float:
        """New tokens per second of decoding, prefill apart."""
        return self.generated / self.decode_seconds if self.decode_seconds else 0.0

    def add_counts(self, other: "GenerationStats") -> None:
        """Add another's counts; times are not counts."""
        self.generated += other.generated
        self.rounds += other.rounds
        self.drafted += other.drafted
        self.accepted += other.accepted
