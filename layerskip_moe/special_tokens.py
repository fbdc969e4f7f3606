"""The tokens that begin and end a text: what tokenizers call them, the most specific names first.

Knows nothing of models. Every room that meets one looks here, so that all agree.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END_OF_TEXT_NAMES = ("<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "</s>", "<eos>", "<|im_end|>")
BEGIN_OF_TEXT_NAMES = ("<|begin_of_text|>", "<s>", "<bos>")
UNKNOWN_NAMES = ("<unk>",)
PADDING_NAMES = ("<|pad|>", "<pad>", "<|padding|>")


def end_of_text_ids(tokenizer: "Tokenizer") -> list[int]:
    """The ids of the tokens that end a text, by their usual names; several where a chat's turn has an end of its own,
    and none where the tokenizer knows none of the names. The first is what ends a document."""
    ids = (tokenizer.token_to_id(name) for name in END_OF_TEXT_NAMES)
    return [token for token in ids if token is not None]
