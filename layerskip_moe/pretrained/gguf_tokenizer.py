"""The tokenizer inside a GGUF file, where llama.cpp encodes text as `tokenizers` does.

    "gpt2"    byte-level BPE, by its merges; llama.cpp knows splitting rules by name, here told by their text
    "llama"   BPE with a leading space and bytes for unknown characters, as SentencePiece has it, by scores

Other kinds, the byte-level unigram among them, are refused: llama.cpp does not have them. Knows nothing of networks.
Next: `gguf.py`, which calls it; what llama.cpp does is in its src/llama-vocab.cpp.
"""

import json
import re
import warnings
from typing import TYPE_CHECKING, Any

from layerskip_moe.pretrained.tokenizer import special_roles
from layerskip_moe.special_tokens import END_OF_TEXT_NAMES

if TYPE_CHECKING:
    import gguf
    from tokenizers import Tokenizer

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CASELESS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_LINES = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# Splitting rule -> llama.cpp's name for it, and whether it takes a whole word that is a token before any merge.
_SPLITS = {
    _GPT2: ("gpt-2", False),
    _CASELESS + r"\p{N}" + _LINES: ("qwen2", False),
    _CASELESS + r"\p{N}{1,3}" + _LINES: ("llama-bpe", True),
}
_SPACE = "▁"
_PREPEND = {"type": "Prepend", "prepend": _SPACE}
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def add_tokenizer(writer: "gguf.GGUFWriter", tokenizer: "Tokenizer", vocab_size: int) -> None:
    """Give the writer the tokenizer's tokens, their kinds, its rules, and the special tokens.

    vocab_size: V; ids that the tokenizer leaves free below it are marked unused

    Raises ValueError, saying which part, for a tokenizer that llama.cpp would not follow exactly. Warns (UserWarning)
    of two parts that differ on unusual text alone: NFC, and a leading space that is not doubled.
    """
    fields = json.loads(tokenizer.to_str())
    model = fields["model"]
    if model["type"] != "BPE":
        raise ValueError(f"A tokenizer of kind {model['type']} cannot be written for llama.cpp exactly; only BPE can.")
    for part in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(part):
            raise ValueError(f"llama.cpp has no tokenizer like this: its {part} is {model[part]!r} instead of none.")
    for token in fields["added_tokens"]:
        if token["lstrip"] or token["rstrip"] or token["single_word"]:
            raise ValueError(f"llama.cpp finds {token['content']!r} in texts without regard to the spaces around it.")
    tokens = _tokens(tokenizer, vocab_size)
    if model["byte_fallback"]:
        if any(f"<0x{byte:02X}>" not in model["vocab"] for byte in range(256)):
            raise ValueError(
                "llama.cpp needs a token for each of the 256 bytes, <0x00> to <0xFF>; some are missing here."
            )
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_add_space_prefix(_has_space_prefix(fields))
        writer.add_token_scores(_scores(tokens, fields))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_splitting_rule(fields))
        writer.add_token_merges([" ".join(merge) for merge in _merges(model)])
    writer.add_token_list(tokens)
    writer.add_token_types(_kinds(tokens, fields))
    _add_special_tokens(writer, tokenizer)


def _tokens(tokenizer: "Tokenizer", vocab_size: int) -> list[str]:
    """The token of each id 0..V-1."""
    by_id = {i: token for token, i in tokenizer.get_vocab(with_added_tokens=True).items()}
    if max(by_id) >= vocab_size:
        raise ValueError(
            f"The tokenizer has ids up to {max(by_id)} but the model's vocab_size is {vocab_size}; give the tokenizer "
            "that the model was trained with."
        )
    return [by_id.get(i, f"[unused {i}]") for i in range(vocab_size)]


def _kinds(tokens: list[str], fields: dict[str, Any]) -> list[int]:
    """What llama.cpp calls the type of each token."""
    from gguf import TokenType

    added = {token["content"]: token["special"] for token in fields["added_tokens"]}
    known = fields["model"]["vocab"]
    kinds: list[int] = []
    for token in tokens:
        if token == fields["model"]["unk_token"]:
            kinds.append(TokenType.UNKNOWN)
        elif token in added:
            kinds.append(TokenType.CONTROL if added[token] else TokenType.USER_DEFINED)
        elif token not in known:
            kinds.append(TokenType.UNUSED)
        elif fields["model"]["byte_fallback"] and _BYTE.fullmatch(token):
            kinds.append(TokenType.BYTE)
        else:
            kinds.append(TokenType.NORMAL)
    return kinds


def _splitting_rule(fields: dict[str, Any]) -> str:
    """llama.cpp's name for how byte-level BPE splits text."""
    if fields["normalizer"] == {"type": "NFC"}:
        warnings.warn(
            "llama.cpp does not compose characters (NFC) as this tokenizer does: text that writes accents as "
            "characters of their own gets other tokens there.",
            stacklevel=4,
        )
    elif fields["normalizer"] is not None:
        raise ValueError(f"llama.cpp has no normalizer, but this tokenizer's is {json.dumps(fields['normalizer'])}.")
    steps = fields["pre_tokenizer"] or {}
    steps = steps.get("pretokenizers", [steps])
    split, byte_level = (steps[0] if len(steps) == 2 else None), steps[-1]
    regex = _GPT2 if split is None and byte_level.get("use_regex") else None
    if split is not None and split.get("type") == "Split" and not byte_level.get("use_regex"):
        isolated = split["behavior"] == "Isolated" and not split["invert"]
        regex = split["pattern"].get("Regex") if isolated else None
    if byte_level.get("type") != "ByteLevel" or byte_level["add_prefix_space"] or regex not in _SPLITS:
        raise ValueError(
            f"llama.cpp does not know how this tokenizer splits text: {json.dumps(fields['pre_tokenizer'])}; known are "
            "the rules of GPT-2, Qwen2 and Llama 3, without a space added in front."
        )
    name, whole_words = _SPLITS[regex]
    if bool(fields["model"].get("ignore_merges")) != whole_words:
        raise ValueError(
            f"llama.cpp's splitting rule {name} goes with ignore_merges={whole_words}, but this tokenizer's is "
            f"{not whole_words}."
        )
    return name


def _has_space_prefix(fields: dict[str, Any]) -> bool:
    """Whether SentencePiece-like BPE puts a space before the text."""
    steps, split = fields["normalizer"] or {}, fields["pre_tokenizer"]
    steps = steps.get("normalizers", [steps] if steps else [])
    if steps in ([_PREPEND, _REPLACE], [_REPLACE]) and split is None:
        return _PREPEND in steps
    metaspace = not steps and split is not None and split["type"] == "Metaspace"
    if metaspace and split["replacement"] == _SPACE and not split["split"]:
        if split["prepend_scheme"] != "never":
            warnings.warn(
                "llama.cpp puts a space before a text even if it begins with one, which this tokenizer (Metaspace) "
                "does not: such a text gets other tokens there.",
                stacklevel=4,
            )
        return bool(split["prepend_scheme"] != "never")
    shown = json.dumps([fields["normalizer"], split], ensure_ascii=False)
    raise ValueError(f"llama.cpp does not know how this tokenizer prepares text (normalizer, pre_tokenizer): {shown}.")


def _merges(model: dict[str, Any]) -> list[tuple[str, str]]:
    """Pairs that are joined, first to last; older files write a pair as one text."""
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    return [(left, right) for left, right in pairs]


def _scores(tokens: list[str], fields: dict[str, Any]) -> list[float]:
    """A score per token, by which llama.cpp joins pairs in the order of the merges: the best result first.

    llama.cpp joins any two tokens whose join is a token, so the merges must be all of these, and those that make
    one token must follow each other.
    """
    model, merges = fields["model"], _merges(fields["model"])
    rank: dict[str, int] = {}
    ranks = [rank.setdefault(left + right, len(rank)) for left, right in merges]
    apart = {token["content"] for token in fields["added_tokens"]} | {model["unk_token"]}
    joinable = {token for token in model["vocab"] if token not in apart and not _BYTE.fullmatch(token)} | set(rank)
    possible = {
        (token[:cut], token[cut:])
        for token in joinable
        for cut in range(1, len(token))
        if token[:cut] in joinable and token[cut:] in joinable
    }
    if ranks != sorted(ranks) or possible != set(merges):
        raise ValueError(
            "llama.cpp joins tokens by scores, as SentencePiece does, and this tokenizer's merges are not such; only "
            "byte-level BPE is joined by merges there."
        )
    return [-float(rank.get(token, len(rank))) for token in tokens]


def _add_special_tokens(writer: "gguf.GGUFWriter", tokenizer: "Tokenizer") -> None:
    """Which tokens begin and end a text, and whether encoding adds them."""
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    whole = tokenizer.encode("a").ids
    start = next(i for i in range(len(whole) - len(plain) + 1) if whole[i : i + len(plain)] == plain)
    before, after = whole[:start], whole[start + len(plain) :]
    if len(before) > 1 or len(after) > 1:
        raise ValueError("llama.cpp adds one token at the most to each end of a text, but this tokenizer adds more.")
    ids = tokenizer.get_vocab(with_added_tokens=True)
    roles = {role: ids[token] for role, token in special_roles(tokenizer).items()}
    end = after[0] if after else roles.get("eos_token")
    if end is None:  # llama.cpp would take some fixed id for it
        raise ValueError(
            f"llama.cpp needs a token that ends a text; add one of {', '.join(END_OF_TEXT_NAMES)} to the tokenizer's "
            "special tokens."
        )
    writer.add_eos_token_id(end)
    writer.add_bos_token_id(before[0] if before else roles.get("bos_token", end))  # as GPT-2, where there is none
    writer.add_add_bos_token(bool(before))
    writer.add_add_eos_token(bool(after))
    if "unk_token" in roles:
        writer.add_unk_token_id(roles["unk_token"])
    if "pad_token" in roles:
        writer.add_pad_token_id(roles["pad_token"])
