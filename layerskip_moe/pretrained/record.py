"""layerskip_moe.json, which a save of ours leaves beside what everybody reads.

    {"format_version": 2,
     "sha256": {name: digest of every other file of the save but README.md},
     "config": {those fields of ModelConfig that config.json does not carry, such as dropout},
     "recipe": {how the model was trained, plain values} or null}

Files cannot be exchanged all at one instant, so the digests tell whether those in a folder are of one save. They also
catch a copy that broke off, at the price of reading each file twice. A folder without this file loads all the same.
Knows nothing of configs, tensors or tokenizers. Next: `checkpoint.py`, which writes it and has it checked.
"""

import json
from collections.abc import Collection, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from layerskip_moe.files import sha256
from layerskip_moe.pretrained.json_file import read_json, write_json
from layerskip_moe.refusals import shown

RECORD = "layerskip_moe.json"
FORMAT_VERSION = 2


def write_record(folder: Path, config: Mapping[str, Any], recipe: Mapping[str, Any] | None) -> None:
    """Write the record of the files that are in folder. ValueError for a recipe of other than plain JSON values."""
    contents = {
        "format_version": FORMAT_VERSION,
        "sha256": {path.name: sha256(path) for path in sorted(folder.iterdir())},
        "config": config,
        "recipe": None if recipe is None else dict(recipe),
    }
    write_json(folder / RECORD, contents)


def check_recipe(recipe: Mapping[str, Any] | None) -> None:
    """Raise ValueError for a recipe that JSON would not give back as it is."""
    try:
        same = recipe is None or json.loads(json.dumps(recipe, allow_nan=False)) == recipe
    except (TypeError, ValueError) as error:
        raise ValueError(f"recipe must be a dict of plain JSON values ({error}).") from None
    if not same:
        raise ValueError("recipe must be a dict of plain JSON values: texts as keys, lists instead of tuples.")


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record in folder, its outer fields checked; None where there is none."""
    path = folder / RECORD
    if not path.is_file():
        return None
    record = read_json(path)
    if record.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format_version {shown(record.get('format_version'))}, but this layerskip_moe reads "
            f"{FORMAT_VERSION}; install the version that wrote it."
        )
    for name in ("sha256", "config"):
        if not isinstance(record.get(name), dict):
            raise ValueError(f"{path} lacks {name!r}; copy it again from where the model was saved.")
    return record


def check_files(folder: Path, patterns: Collection[str]) -> None:
    """Raise ValueError where a file that matches one of the patterns is not the one that folder's record names."""
    record = read_record(folder)
    if record is None:
        return
    digests = {name: digest for name, digest in record["sha256"].items() if any(fnmatch(name, p) for p in patterns)}
    for name, digest in digests.items():
        path = folder / name
        if not path.is_file():
            found = f"{folder} has a {RECORD} but no {name}"
        elif sha256(path) != digest:
            found = f"{path} is not the file that {RECORD} was written with (its sha256 differs)"
        else:
            continue
        raise ValueError(
            f"{found}: a save or a copy was interrupted, or a file exchanged; save or copy the whole folder again, or, "
            f"if it was changed on purpose, delete {RECORD} to load the files as they are."
        )
