"""Tokenizers on disk: other people's read as they are, ours written so that transformers reads them unchanged.

    tokenizer.json          the whole tokenizer, as `tokenizers` writes it; it stands where there is one
    tokenizer.model         SentencePiece's file (`sentencepiece_file.py`), read where there is no tokenizer.json
    tokenizer_config.json, special_tokens_map.json, added_tokens.json      tokens added to either

Knows nothing of networks or chat templates (which are left to transformers). Next: `sentencepiece_file.py`;
`gguf_tokenizer.py`, which writes tokenizers for llama.cpp.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerskip_moe.files import replacing
from layerskip_moe.pretrained.hub import local_folder
from layerskip_moe.pretrained.json_file import read_json
from layerskip_moe.pretrained.record import check_files
from layerskip_moe.pretrained.sentencepiece_file import read_sentencepiece
from layerskip_moe.refusals import shortened, shown
from layerskip_moe.special_tokens import (
    BEGIN_OF_TEXT_NAMES,
    END_OF_TEXT_NAMES,
    PADDING_NAMES,
    UNKNOWN_NAMES,
    end_of_text_ids,
)

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

TOKENIZER, TOKENIZER_CONFIG, SENTENCEPIECE = "tokenizer.json", "tokenizer_config.json", "tokenizer.model"
TOKENIZER_FILES = (TOKENIZER, SENTENCEPIECE, TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json")

_MOST_BYTES = 2**28  # ten times the largest there are
_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
# With what tells where a text ends, and how a chat is written: all that a save has by a tokenizer.
ALL_TOKENIZER_FILES = (*TOKENIZER_FILES, "generation_config.json", "chat_template.jinja")
_GENERATION_FILES = (*ALL_TOKENIZER_FILES, "config.json")
_MORE_SPECIAL = ("additional_special_tokens", "extra_special_tokens")


def load_tokenizer(folder_or_id: str | Path, *, revision: str | None = None, token: str | None = None) -> "Tokenizer":
    """The tokenizer of a checkpoint, which encodes as transformers' AutoTokenizer does; it neither cuts nor pads.

    A tokenizer.json stands as it is; tokens that the files beside it list are added. Only a SentencePiece
    tokenizer.model, which does not say so itself, gets its beginning and end of text from tokenizer_config.json's
    add_bos_token and add_eos_token; where it says that legacy is true, a text that begins with a space has one more, as
    in SentencePiece.

    folder_or_id: a folder, or a Hugging Face hub id (then revision and token are the hub's)

    Raises ValueError if there is no tokenizer, it is damaged, it is not the one that the model was saved with, or it
    cannot be read exactly; ImportError if a tokenizer.model needs packages that are missing.
    """
    folder = local_folder(folder_or_id, revision=revision, token=token, patterns=("*.json", SENTENCEPIECE))
    check_files(folder, TOKENIZER_FILES)
    config = _token_settings(folder)
    _check_sizes(folder)
    if (folder / TOKENIZER).is_file():
        tokenizer = _read_tokenizer_json(folder / TOKENIZER)
    elif (folder / SENTENCEPIECE).is_file():
        tokenizer = read_sentencepiece(folder / SENTENCEPIECE, config)
    else:
        raise ValueError(
            f"{folder} holds no tokenizer ({TOKENIZER} or {SENTENCEPIECE}); save the model with tokenizer=..., or "
            "copy the tokenizer's files beside it."
        )
    try:
        _add_tokens(tokenizer, folder, config)
    except (AttributeError, KeyError, TypeError, UnicodeError) as error:  # the last of halves of surrogate pairs
        raise ValueError(
            f"{folder} does not list its tokens as transformers does ({error!r}); copy it again."
        ) from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def write_tokenizer_files(tokenizer: "Tokenizer", folder: str | Path) -> None:
    """Write tokenizer.json and tokenizer_config.json, which AutoTokenizer reads as this very tokenizer.

    The class named, PreTrainedTokenizerFast, is the one that transformers 4 and 5 fill from tokenizer.json
    alone, whatever the model's type; the families' own classes build their splitting rules anew. Beginning
    and end of text, unknown and padding are declared where the tokenizer holds such a token as a special one:
    declaring any other would make it special, and text that spells it would be encoded differently.
    """
    folder = Path(folder)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**30,  # transformers' word for "no limit"
        **special_roles(tokenizer),
    }
    splitting = json.loads(tokenizer.to_str())["pre_tokenizer"] or {}
    if "add_prefix_space" in splitting:  # transformers 4 overrides the tokenizer's own with its default
        config["add_prefix_space"] = splitting["add_prefix_space"]
    with replacing(folder / TOKENIZER) as beside:
        # Not by tokenizer.save, whose error on a full disk is no OSError.
        beside.write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    with replacing(folder / TOKENIZER_CONFIG) as beside:
        beside.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def special_roles(tokenizer: "Tokenizer") -> dict[str, str]:
    """bos_token, eos_token, unk_token and pad_token, by their usual names, of the tokenizer's special tokens."""
    special = {added.content for added in tokenizer.get_added_tokens_decoder().values() if added.special}
    names = {
        "bos_token": BEGIN_OF_TEXT_NAMES,
        "eos_token": END_OF_TEXT_NAMES,
        "unk_token": UNKNOWN_NAMES,
        "pad_token": PADDING_NAMES,
    }
    found = {role: next((name for name in known if name in special), None) for role, known in names.items()}
    return {role: name for role, name in found.items() if name is not None}


def stop_tokens(folder_or_id: str | Path) -> list[int]:
    """The ids that end a text of this checkpoint, empty where nothing says which.

    From generation_config.json's eos_token_id, else config.json's, else the token that tokenizer_config.json
    calls eos_token, else the tokenizer's end of text by its usual names.
    """
    folder = local_folder(folder_or_id, patterns=_GENERATION_FILES)
    for name in ("generation_config.json", "config.json"):
        found = _read_if_there(folder / name).get("eos_token_id")
        ids: list[Any] = found if isinstance(found, list) else [found]
        if any(i is not None and type(i) is not int for i in ids):
            raise ValueError(
                f"{folder / name} has eos_token_id={shown(found)}, which is neither an id nor a list of ids."
            )
        if found is not None:
            return ids
    if not has_tokenizer(folder):
        return []
    tokenizer = load_tokenizer(folder)
    declared = _token_settings(folder).get("eos_token")
    if not declared:
        return end_of_text_ids(tokenizer)
    token = tokenizer.token_to_id(_added_token(declared).content)
    return [] if token is None else [token]


def has_tokenizer(folder_or_id: str | Path) -> bool:
    """Whether there is a tokenizer for `load_tokenizer` to read."""
    folder = local_folder(folder_or_id, patterns=TOKENIZER_FILES)
    return any((folder / name).is_file() for name in (TOKENIZER, SENTENCEPIECE))


def copy_tokenizer_files(folder_or_id: str | Path, folder: Path) -> dict[str, Any]:
    """Copy a checkpoint's tokenizer as it stands, its chat template and generation_config.json included, and give the
    ids of special tokens in its config.json. Raises ValueError where there is none, or it cannot be read."""
    load_tokenizer(folder_or_id)
    source = local_folder(folder_or_id, patterns=_GENERATION_FILES)
    for name in ALL_TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    config = _read_if_there(source / "config.json")
    return {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in config}


def _token_settings(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json, with special_tokens_map.json laid over it where it does not list added tokens."""
    config = _read_if_there(folder / TOKENIZER_CONFIG)
    if "added_tokens_decoder" not in config:
        config.update(_read_if_there(folder / "special_tokens_map.json"))
    return config


def _check_sizes(folder: Path) -> None:
    for path in (folder / TOKENIZER, folder / SENTENCEPIECE):
        if path.is_file() and path.stat().st_size > _MOST_BYTES:
            raise ValueError(f"{path} has {path.stat().st_size} bytes, far more than a tokenizer; copy it again.")


def _read_tokenizer_json(path: Path) -> "Tokenizer":
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # `tokenizers` raises bare Exception
        raise ValueError(f"{path} is not a whole tokenizer ({shortened(str(error))}); copy it again.") from None


def _add_tokens(tokenizer: "Tokenizer", folder: Path, config: Mapping[str, Any]) -> None:
    """Add what the files beside the tokenizer list, in the order of the ids, then the special tokens they name."""
    special = [config[role] for role in _ROLES if config.get(role)]
    for name in _MORE_SPECIAL:
        more = config.get(name) or []
        special += more.values() if isinstance(more, dict) else more
    tokens = [_added_token(value, special=True) for value in special]
    named = {token.content for token in tokens}

    listed = config.get("added_tokens_decoder")
    if listed is None:
        listed = {i: token for token, i in _read_if_there(folder / "added_tokens.json").items()}
    for i, value in sorted(listed.items(), key=lambda entry: _token_id(entry[0])):
        added = _added_token(value)
        if added.content in named:
            added.special = True
        tokenizer.add_tokens([added])
        if tokenizer.token_to_id(added.content) != _token_id(i):
            raise ValueError(
                f"The files in {folder} give the token {shown(added.content)} the id {i}, but the tokenizer numbers it "
                f"{tokenizer.token_to_id(added.content)}; take the tokenizer's files from one place."
            )
    added_before = {added.content: added for added in tokenizer.get_added_tokens_decoder().values()}
    for token in tokens:
        known = added_before.get(token.content, token)  # how it treats the spaces around it is said there
        known.special = True
        tokenizer.add_special_tokens([known])


def _token_id(value: object) -> int:
    """An id as the files write it: a number, or its digits. TypeError for anything else."""
    if type(value) is int:
        return value
    if isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) < 20:
        return int(value)
    raise TypeError(f"{shown(value)} is no id")


def _added_token(value: str | Mapping[str, Any], *, special: bool = False) -> "AddedToken":
    """A token as the files write it: its text alone, or its fields."""
    from tokenizers import AddedToken

    if isinstance(value, str):
        return AddedToken(value, special=special, normalized=not special)
    fields = {name: value[name] for name in ("single_word", "lstrip", "rstrip", "normalized") if name in value}
    return AddedToken(value["content"], special=special or bool(value.get("special")), **fields)


def _read_if_there(path: Path) -> dict[str, Any]:
    """The fields of a JSON file, none where there is no such file."""
    return read_json(path) if path.is_file() else {}
