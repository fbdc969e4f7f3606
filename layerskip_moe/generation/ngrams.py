"""What followed the last tokens of a text when they occurred in it before: drafts that no network has to compute.

Knows nothing of models. Next: `prompt_lookup.py`, `lookup_speculative.py`,
`policies/text_lookup.py`.
"""

from collections.abc import Sequence

from torch import Tensor

from layerskip_moe.generation.session import Session
from layerskip_moe.refusals import require_index


class Text:
    """The tokens of one row, and where each of its n-grams stood last. A token costs an entry per length."""

    def __init__(self, tokens: Sequence[int], longest: int, shortest: int) -> None:
        """longest, shortest: the lengths of the n-grams that are looked up, in tokens."""
        self._tokens: list[int] = []
        self._longest, self._shortest = longest, shortest
        self._after: dict[tuple[int, ...], int] = {}  # n-gram -> the place after its latest occurrence
        self.extend(tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """Add tokens at the end."""
        for token in tokens:
            # Only now does anything follow the n-grams that ended the text.
            end = len(self._tokens)
            for length in range(self._shortest, min(self._longest, end) + 1):
                self._after[tuple(self._tokens[end - length :])] = end
            self._tokens.append(token)

    def continuation(self, count: int, drafts: Sequence[int] = ()) -> list[int]:
        """`count` tokens that may follow the text and `drafts`: those that followed the longest of their ends that
        stands in the text, where it stood last; none where none does.

        Where that place is nearer than `count` to the end, what follows repeats: "a b a b" goes on "a b a b a b".
        """
        said = [*self._tokens[-self._longest :], *drafts]
        for length in range(min(self._longest, len(said)), self._shortest - 1, -1):
            place = self._after.get(tuple(said[-length:]))
            if place is not None:
                period = len(self._tokens) + len(drafts) - place
                followed = [*self._tokens[place : place + count], *drafts]
                while len(followed) < count:
                    followed.append(followed[-period])
                return followed[:count]
        return []

    def repeated(self, most: int) -> int:
        """How many of the last tokens, as many as the longest n-grams have or more, up to `most`, stand where
        `continuation` goes on from; 0 where these stand nowhere else."""
        tokens, count = self._tokens, self._longest
        place = self._after.get(tuple(tokens[-count:]))
        if place is None:
            return 0
        period = len(tokens) - place
        while count < min(place, most) and tokens[place - 1 - count] == tokens[place + period - 1 - count]:
            count += 1
        return count


class Texts:
    """The `Text` of each active row of a session."""

    def __init__(self, session: Session, longest: int, shortest: int) -> None:
        self.rows = [Text(tokens, longest, shortest) for tokens in session.texts()]

    def extend(self, tokens: Tensor, accepted: Sequence[int]) -> None:
        """Add to each row the first accepted[r] + 1 of its tokens [A, T]."""
        for text, chosen, count in zip(self.rows, tokens.tolist(), accepted, strict=True):
            text.extend(chosen[: count + 1])

    def select(self, rows: Tensor) -> None:
        """Keep only these rows, as `Session.state` must."""
        self.rows = [self.rows[row] for row in rows.tolist()]


def check_ngrams(ngram: int, min_ngram: int) -> None:
    """Raise ValueError unless 1 <= min_ngram <= ngram."""
    require_index("ngram", ngram)
    require_index("min_ngram", min_ngram)
    if not 1 <= min_ngram <= ngram:
        raise ValueError(f"min_ngram={min_ngram} must be 1 or more and at most ngram={ngram}, the longest looked up.")
