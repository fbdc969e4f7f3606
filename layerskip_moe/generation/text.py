"""TextStream: tokens in, text out as far as it is certain, and the place where a stop string ends it.

A token may hold part of a character, and a stop string may begin in one token and end in another. So text is
given out in whole characters, and what may be the beginning of a stop string is held back until it is known.
Knows nothing of rounds or drafts. Next: `session.py`, which asks it after every token.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_REPLACEMENT = "\ufffd"  # what decoders write for bytes that are no character, or not yet


def unshown_token(tokenizer: "Tokenizer", name: str) -> int | None:
    """The id of the special token of this name, which no text shows, so that only its id can be looked for; None
    where there is no such token."""
    token = tokenizer.token_to_id(name)
    return token if token is not None and not tokenizer.decode([token]) else None


class TextStream:
    """The text of one continuation, token by token.

    text:    all of it so far, in whole characters; once stopped, all before the stop string
    stopped: whether a stop string was met. Among several it is the one whose last character came first; of those
             that a single token completes, the one that begins first.
    """

    def __init__(self, tokenizer: "Tokenizer", stop_strings: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop_strings = tokenizer, stop_strings
        self._longest = max(map(len, stop_strings), default=1)
        self._tokens: list[int] = []
        # tokens[:_settled] end with a whole character: their text is _settled_text. What follows is decoded behind
        # tokens[_context:_settled], whose text is _known, because a decoder may treat the first token otherwise.
        self._context = self._settled = 0
        self._known = self._settled_text = ""
        self._given = 0  # characters of the text that were given out
        self.text, self.stopped = "", False

    def push(self, token: int) -> str:
        """One more token; the text that became certain by it, which may be empty."""
        assert not self.stopped, "nothing follows a stop string"
        self._tokens.append(token)
        searched = max(0, len(self.text) - self._longest + 1)
        self._decode()
        found = [at for stop in self._stop_strings if (at := self.text.find(stop, searched)) >= 0]
        if found:
            self.stopped = True
            self.text = self.text[: min(found)]
        return self._give(len(self.text) - self._held())

    def finish(self) -> str:
        """What was held back, when no more tokens follow: the beginning of a stop string that never came, and the
        replacement characters for bytes that are no character."""
        if not self.stopped:
            self.text = self._settled_text + self._told()[len(self._known) :]
        return self._give(len(self.text))

    def _decode(self) -> None:
        """Take over into `text` what the tokens so far say in whole characters, also where the last of them goes on
        with part of another (the library's own DecodeStream holds all of such a token back)."""
        told = self._told()
        self.text = self._settled_text + told.rstrip(_REPLACEMENT)[len(self._known) :]
        if len(told) > len(self._known) and not told.endswith(_REPLACEMENT):
            self._context, self._settled = self._settled, len(self._tokens)
            self._known, self._settled_text = self._told(), self.text

    def _told(self) -> str:
        """The text from `_context` on. What lies beyond `_known` in it is new, told apart by length: a decoder that
        falls back on bytes may call a newline invalid once an invalid byte follows, but what was given out stands."""
        return self._tokenizer.decode(self._tokens[self._context :])

    def _held(self) -> int:
        """How many characters at the end may be the beginning of a stop string."""
        if self.stopped:
            return 0
        lengths = range(min(self._longest - 1, len(self.text)), 0, -1)
        return next((n for n in lengths if any(stop.startswith(self.text[-n:]) for stop in self._stop_strings)), 0)

    def _give(self, end: int) -> str:
        new = self.text[self._given : end]
        self._given = max(self._given, end)
        return new
