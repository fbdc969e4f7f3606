"""What tokenizers call the tokens that begin and end a text, the most specific names first.

Knows nothing of tokenizers. Every room that meets one looks here, so that they agree.
"""

END_OF_TEXT_NAMES = ("<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "</s>", "<eos>", "<|im_end|>")
BEGIN_OF_TEXT_NAMES = ("<|begin_of_text|>", "<s>", "<bos>")
UNKNOWN_NAMES = ("<unk>",)
PADDING_NAMES = ("<|pad|>", "<pad>", "<|padding|>")
