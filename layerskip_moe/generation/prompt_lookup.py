"""PromptLookup: what followed the text's last tokens when they stood in it before is proposed, and the model verifies
(prompt lookup decoding, Saxena 2023; Inference with Reference, arXiv 2304.04487).

No network drafts: a wrong proposal costs its share of a verification and nothing else. Code, tables and quotations
repeat themselves; free prose hardly.

Next: `ngrams.py`, which looks up; `lookup_speculative.py`, where early layers draft as well.
"""

from dataclasses import dataclass

from layerskip_moe.generation.ngrams import Texts, check_ngrams
from layerskip_moe.generation.proposals import propose, verify
from layerskip_moe.generation.session import Session
from layerskip_moe.generation.verification import Round, check_drafting
from layerskip_moe.nn import ModelConfig


@dataclass(frozen=True)
class PromptLookup:
    """Draft what followed the text's last tokens where they stood last, prompt and new tokens alike. A row whose end is
    new to it is decoded plainly. The text is plain decoding's, token for token, at any temperature.

    Attributes:
        draft_length: tokens drafted per round, 1 or more
        ngram: the longest end of the text that is looked up, in tokens, 1 or more; the longest that is found counts
        min_ngram: the shortest; single tokens come again by chance, and what follows them is mostly wrong
    """

    draft_length: int = 4
    ngram: int = 3
    min_ngram: int = 2

    def __post_init__(self) -> None:
        check_drafting(self.draft_length, "shared")
        check_ngrams(self.ngram, self.min_ngram)

    def check(self, config: ModelConfig) -> None:
        """Every model can be decoded this way."""

    def start(self, session: Session) -> None:
        """Run the prompts, and note their n-grams."""
        session.prefill()
        session.state = Texts(session, self.ngram, self.min_ngram)

    def step(self, session: Session) -> None:
        """One round: look up, verify, append what the full model chose."""
        texts = session.state
        assert isinstance(texts, Texts)
        round_ = Round.begin(session, [self.draft_length] * len(texts.rows), "shared")
        propose(round_, [text.continuation(self.draft_length) for text in texts.rows])
        logits, _ = verify(round_)
        tokens, accepted = round_.settle(logits)
        texts.extend(tokens, accepted)
        session.append(tokens, accepted, drafted=round_.limits)
