"""SentencePiece's tokenizer.model as a `tokenizers` tokenizer: BPE (Llama, Mixtral) and unigram (Kudo 2018).

The ids are SentencePiece's own for any text that begins with no space and in which no special token, user-defined
symbol or name of a byte ("<0x0A>") is spelled. These are recognised wherever they are, as transformers does it; where
`legacy` is true, the space that begins a text returns after each, and is added to one that begins with a space already,
as in SentencePiece. Knows nothing of the files beside it: `tokenizer.py` adds their tokens.
"""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerskip_moe.refusals import shortened

if TYPE_CHECKING:
    from tokenizers import Tokenizer, decoders, models, normalizers

# SentencePiece's numbers for its algorithms and kinds of piece (sentencepiece_model.proto)
_UNIGRAM, _BPE = 1, 2
_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6
_SPACE = "▁"


def read_sentencepiece(path: Path, settings: Mapping[str, Any]) -> "Tokenizer":
    """The tokenizer in a SentencePiece file.

    settings: tokenizer_config.json's fields, of which are read add_bos_token, add_eos_token (default: neither
    is added), bos_token, eos_token (default: the file's) and legacy (default: false, as transformers 5 has it, but
    true where the file removes superfluous spaces). Unless legacy is true, a leading space is put before the text
    alone, where it has none, and not also after each special token in it.

    Raises ValueError if it is not such a file, or of a kind that `tokenizers` cannot compute exactly; ImportError
    if the packages that describe the format are missing.
    """
    proto = _read_proto(path)
    try:
        return _build(proto, path, settings)
    except ValueError:
        raise
    except Exception as error:  # `tokenizers` raises bare Exception, and TypeError for pieces that are no text
        told = str(error).splitlines()[0]
        raise ValueError(f"{path} holds no tokenizer that can be built ({shortened(told)}); copy it again.") from None


def _build(proto: Any, path: Path, settings: Mapping[str, Any]) -> "Tokenizer":
    """The tokenizer that a parsed file describes."""
    from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers, processors

    trainer, cleaning = proto.trainer_spec, proto.normalizer_spec
    if trainer.model_type not in (_UNIGRAM, _BPE):
        raise ValueError(f"{path} is a SentencePiece model of words or characters; only BPE and unigram are read.")
    if trainer.treat_whitespace_as_suffix:
        raise ValueError(
            f"{path} writes spaces after words (treat_whitespace_as_suffix), which cannot be read exactly."
        )

    tokenizer = Tokenizer(_bpe(proto) if trainer.model_type == _BPE else _unigram(proto))
    # Metaspace does not know the beginning of a text again whose leading spaces were removed.
    legacy = settings.get("legacy") or cleaning.remove_extra_whitespaces
    first_only = cleaning.add_dummy_prefix and not legacy
    steps = _cleaning_steps(cleaning)
    if first_only:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme="first", split=False)
    else:
        prefix = [normalizers.Prepend(_SPACE)] if cleaning.add_dummy_prefix else []
        steps += [*prefix, normalizers.Replace(" ", _SPACE)]
    tokenizer.normalizer = normalizers.Sequence(steps) if steps else None
    tokenizer.decoder = _decoder(cleaning.add_dummy_prefix, trainer.byte_fallback)
    for piece in proto.pieces:
        if piece.type in (_UNKNOWN, _CONTROL, _USER_DEFINED):
            special = piece.type != _USER_DEFINED
            tokenizer.add_tokens([AddedToken(piece.piece, normalized=False, special=special)])

    before = [_named(settings, "bos_token", trainer.bos_piece)] if settings.get("add_bos_token") else []
    after = [_named(settings, "eos_token", trainer.eos_piece)] if settings.get("add_eos_token") else []
    ids = {name: tokenizer.token_to_id(name) for name in (*before, *after)}
    if None in ids.values():
        raise ValueError(f"tokenizer_config.json adds {', '.join(ids)} to each text, but {path} has no such token.")
    if ids:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after],
            pair=[*before, "$A", *after, *before, "$B", *after],
            special_tokens=[*ids.items()],
        )
    return tokenizer


def _read_proto(path: Path) -> Any:
    try:
        messages = importlib.import_module("google.protobuf.message")  # which has no types to import
        model = importlib.import_module("sentencepiece.sentencepiece_model_pb2")
    except ImportError as error:
        raise ImportError(
            f"Reading {path} needs the packages sentencepiece and protobuf: pip install sentencepiece protobuf."
        ) from error
    proto = model.ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except messages.DecodeError:
        proto.Clear()
    if not proto.pieces:
        raise ValueError(
            f"{path} is not a whole SentencePiece model; copy it again, or, if it is of another kind, put the "
            "tokenizer.json of the same checkpoint beside it."
        )
    return proto


def _bpe(proto: Any) -> "models.BPE":
    """Merges from scores: SentencePiece joins the pair whose result scores highest, the leftmost first."""
    from tokenizers import models

    ids = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    joinable = {p.piece for p in proto.pieces if p.type not in (_UNKNOWN, _CONTROL, _BYTE)}
    merges = []
    for piece in proto.pieces:
        if piece.piece not in joinable:
            continue
        for cut in range(1, len(piece.piece)):
            left, right = piece.piece[:cut], piece.piece[cut:]
            if left in joinable and right in joinable:
                merges.append((piece.score, left, right))
    merges.sort(key=lambda merge: -merge[0])  # stable: among equals the order of ids, then of cuts
    return models.BPE(
        vocab=ids,
        merges=[(left, right) for _, left, right in merges],
        unk_token=proto.trainer_spec.unk_piece,
        fuse_unk=True,
        byte_fallback=proto.trainer_spec.byte_fallback,
    )


def _unigram(proto: Any) -> "models.Unigram":
    from tokenizers import models

    return models.Unigram(
        vocab=[(piece.piece, piece.score) for piece in proto.pieces],
        unk_id=proto.trainer_spec.unk_id,
        byte_fallback=proto.trainer_spec.byte_fallback,
    )


def _cleaning_steps(cleaning: Any) -> "list[normalizers.Normalizer]":
    """What SentencePiece does to a text first: its table of characters, then superfluous spaces removed."""
    from tokenizers import Regex, normalizers

    steps: list[normalizers.Normalizer] = []
    if cleaning.precompiled_charsmap:
        steps.append(normalizers.Precompiled(cleaning.precompiled_charsmap))
    if cleaning.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    return steps


def _decoder(prefix: bool, byte_fallback: bool) -> "decoders.Decoder":
    from tokenizers import decoders

    steps: list[decoders.Decoder] = [decoders.Replace(_SPACE, " ")]
    if byte_fallback:
        steps.append(decoders.ByteFallback())
    steps.append(decoders.Fuse())
    if prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    return decoders.Sequence(steps)


def _named(settings: Mapping[str, Any], role: str, default: str) -> str:
    value = settings.get(role) or default
    return value if isinstance(value, str) else str(value["content"])
