"""config.json of a checkpoint: in the words of a family of transformers, or in our own where none has words for it.

    {"model_type": "layerskip_moe", "architectures": ["MoEDecoder"], "dtype": "float32",
     "config": {ModelConfig's fields}, "quantization": "int8"}      (the last where weights are quantised)

Knows nothing of tensors. Next: `families.py`, which knows the families' words; `record.py`, which keeps what they lack.
"""

import dataclasses
from pathlib import Path
from typing import Any

import torch

from layerskip_moe.nn import ModelConfig, MoEDecoder
from layerskip_moe.pretrained.families import read_config, write_config
from layerskip_moe.pretrained.json_file import read_json
from layerskip_moe.pretrained.record import RECORD, read_record
from layerskip_moe.pretrained.weights import pickles, weight_file_names
from layerskip_moe.refusals import shortened

CONFIG = "config.json"
OUR_TYPE = "layerskip_moe"


def config_contents(config: ModelConfig, family: str | None, dtype: torch.dtype) -> dict[str, Any]:
    """What config.json says of a network, in a family's words (one that expresses it exactly), or in ours for None."""
    stored = str(dtype).removeprefix("torch.")
    if family is not None:
        # torch_dtype is the name that transformers 4 knows; 5 takes both.
        return write_config(config, family) | {"dtype": stored, "torch_dtype": stored}
    contents = {"model_type": OUR_TYPE, "architectures": ["MoEDecoder"], "config": dataclasses.asdict(config)}
    return contents | {"dtype": stored}


def fields_left_out(config: ModelConfig, family: str | None) -> dict[str, Any]:
    """The fields of config that would not come back from config.json, such as dropout; the network is the same."""
    if family is None:
        return {}
    back = dataclasses.asdict(read_config(write_config(config, family))[1])
    return {name: value for name, value in dataclasses.asdict(config).items() if value != back[name]}


def read_network(folder: Path) -> tuple[str | None, ModelConfig]:
    """The family (None: our own type) and the network of the checkpoint in folder.

    Raises ValueError, naming the file, where it is not there, or cannot be read or computed exactly.
    """
    _check_is_checkpoint(folder)
    family, config = read_config_file(folder / CONFIG)
    record = read_record(folder)
    if family is not None and record is not None and record["config"]:
        config = _network(dataclasses.asdict(config) | record["config"], folder / RECORD)
    return family, config


def read_config_file(path: Path) -> tuple[str | None, ModelConfig]:
    """The family (None: our own type) and the network that a file such as config.json describes by itself.

    Raises ValueError, naming the file, where it cannot be read or computed exactly; OSError where it is not there.
    """
    contents = read_json(path)
    if contents.get("model_type") == OUR_TYPE:
        return None, _network(contents.get("config"), path)
    try:
        return read_config(contents)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def read_quantization(folder: Path) -> Any:
    """What config.json in folder says of quantised weights; None where it is not of our own type, or says nothing."""
    contents = read_json(folder / CONFIG)
    return contents.get("quantization") if contents.get("model_type") == OUR_TYPE else None


def empty_model(config: ModelConfig) -> MoEDecoder:
    """The network with shapes and names but no memory (on the meta device)."""
    with torch.device("meta"):
        return MoEDecoder(config)


def _check_is_checkpoint(folder: Path) -> None:
    if (folder / CONFIG).is_file():
        return
    if weight_file_names(folder):
        raise ValueError(
            f"{folder} holds weights but no {CONFIG}, as where a save or a copy was interrupted; save or copy the "
            "whole folder again."
        )
    names = pickles(folder)
    found = f"only pickles ({names}), which can run code when read" if names else f"no {CONFIG}"
    inside = f", such as {folder / 'model'}" if (folder / "model" / CONFIG).is_file() else ""
    raise ValueError(f"{folder} holds {found}; give a folder that save_pretrained wrote{inside}.")


def _network(fields: Any, path: Path) -> ModelConfig:
    """The ModelConfig of these fields of path; one that an older save did not know has its default."""
    if not isinstance(fields, dict):
        raise ValueError(f"{path} lacks 'config'; copy it again from where the model was saved.")
    unknown = sorted(set(fields) - {field.name for field in dataclasses.fields(ModelConfig)})
    if unknown:
        raise ValueError(
            f"{path} has fields this layerskip_moe does not know ({shortened(', '.join(unknown))}); "
            "correct them, or install the version that wrote it."
        )
    if "vocab_size" not in fields:
        raise ValueError(f"{path} lacks the network's vocab_size; copy it again from where it was saved.")
    try:
        return ModelConfig(**fields)
    except ValueError as error:
        raise ValueError(f"{path} describes no network: {error}") from None
