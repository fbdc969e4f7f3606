"""LookupSpeculative: early layers draft, and the text itself, which repeats what followed the last tokens when they
stood in it before.

Drafts by early layers cost their layers and the head, one after another; those from the text cost nothing, and are
verified in the same pass. Jakiro's mix (arXiv 2502.06282): the first drafts one by one, the rest at once.

Next: `prompt_lookup.py`, the text alone; `self_speculative.py`, the early layers alone; `proposals.py`.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from layerskip_moe.generation.autoregressive import check_exit_layer
from layerskip_moe.generation.ngrams import Texts, check_ngrams
from layerskip_moe.generation.proposals import draft, propose, verify, verify_rest
from layerskip_moe.generation.session import Session
from layerskip_moe.generation.verification import Round, check_drafting
from layerskip_moe.nn import ModelConfig
from layerskip_moe.refusals import require_index, shown


@dataclass(frozen=True)
class LookupSpeculative:
    """Draft by early layers and by looking up. The text is plain decoding's, token for token, at any temperature.

    Attributes:
        exit_layer: n in 1..L: the first n layers draft
        draft_length: tokens that they draft in a round, 1 or more
        lookup_length: tokens that the text may add in a round, 1 or more
        lookup: "instead": the text is asked first, and the early layers draft only in rows whose end is new to it;
            "after": it goes on from the early layers' drafts, where these complete an n-gram of it
        ngram: as in `PromptLookup`
        min_ngram: as in `PromptLookup`
    """

    exit_layer: int
    draft_length: int = 2
    lookup_length: int = 4
    lookup: Literal["after", "instead"] = "instead"
    ngram: int = 3
    min_ngram: int = 2

    def __post_init__(self) -> None:
        check_drafting(self.draft_length, "shared")
        check_ngrams(self.ngram, self.min_ngram)
        require_index("lookup_length", self.lookup_length)
        if self.lookup_length < 1:
            raise ValueError(f"lookup_length={self.lookup_length} must be 1 or more; without it use SelfSpeculative.")
        if self.lookup not in ("after", "instead"):
            raise ValueError(f"lookup={shown(self.lookup)} is unknown; it is 'after' or 'instead'.")

    def check(self, config: ModelConfig) -> None:
        """Raise ValueError where the model has no such exit layer."""
        check_exit_layer(self.exit_layer, config)

    def start(self, session: Session) -> None:
        """Run the prompts, and note their n-grams."""
        session.prefill()
        session.state = Texts(session, self.ngram, self.min_ngram)

    def step(self, session: Session) -> None:
        """One round: draft, look up, verify, append what the full model chose."""
        texts = session.state
        assert isinstance(texts, Texts)
        found: list[list[int]] = [[] for _ in texts.rows]
        if self.lookup == "instead":
            found = [text.continuation(self.lookup_length) for text in texts.rows]
        round_ = Round.begin(session, [self.draft_length + self.lookup_length] * len(found), "shared")
        rows = [row for row, limit in enumerate(round_.limits) if limit and not found[row]]
        if rows:
            logits = self._draft_and_verify(round_, texts, found, rows)
        else:
            propose(round_, found)
            logits, _ = verify(round_)
        tokens, accepted = round_.settle(logits)
        texts.extend(tokens, accepted)
        session.append(tokens, accepted, drafted=round_.limits)

    def _draft_and_verify(self, round_: Round, texts: Texts, found: list[list[int]], rows: list[int]) -> Tensor:
        """Draft in these rows, beside what was found for the others: the full model's logits [A, T, V]."""
        index = None if len(rows) == len(found) else round_.session.newest.new_tensor(rows)
        count = min(self.draft_length, round_.length)
        drafts, [states] = draft(round_, range(self.exit_layer), count, rows=index)
        for row, tokens in zip(rows, drafts.tolist(), strict=True):
            more = texts.rows[row].continuation(self.lookup_length, tokens) if self.lookup == "after" else []
            found[row] = [*tokens, *more]
        propose(round_, found)
        if index is not None:
            states = states.new_zeros(len(found), *states.shape[1:]).index_copy(0, index, states)
        drafted = set(rows)
        known = [min(count, limit) + 1 if row in drafted else 0 for row, limit in enumerate(round_.limits)]
        return verify_rest(round_, self.exit_layer, states, known)
