"""Our own checkpoints: a folder that holds a network whole, or is refused.

    config.json         {"model_type": "layerskip_moe", "format_version": 1, "dtype": "float32",
                         "config": {ModelConfig's fields}, "sha256": {file name: digest}}
    model.safetensors   the tensors of MoEDecoder.state_dict(), by name; a tied head is stored once
    tokenizer.json      when one was given, as `tokenizers` writes it

Files cannot be exchanged all at one instant, so config.json, the last to be put in place, names the others'
digests: whatever an interruption leaves behind, weights are never read with another save's config or
tokenizer. The digest also catches a copy that broke off, at the price of reading the file twice.

Knows nothing of optimizers (`training/checkpoint.py`) or of other people's layouts. Next: `nn/decoder.py`,
whose save_pretrained and from_pretrained lead here.
"""

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from layerskip_moe.nn import ModelConfig, MoEDecoder

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MODEL_TYPE = "layerskip_moe"
FORMAT_VERSION = 1
CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"
_PICKLES = {".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"}


def save_model(model: MoEDecoder, folder: str | Path, *, tokenizer: "Tokenizer | None" = None) -> None:
    """Write the model, and the tokenizer when given, into folder (made if need be).

    Everything is written beside first, then put in place file by file. An error or a full disk while writing
    leaves an older checkpoint in the folder as it was; being killed between two files leaves one that
    `load_model` refuses. Without a tokenizer an older tokenizer.json stays, but is no longer this model's.

    Raises ValueError if folder is a file, if the tokenizer has more tokens than the model, or if the model's
    tensors are not those its config describes (say, after a module was exchanged).
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; give a folder to save the model in.")
    state = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    _check_tensors({name: tuple(tensor.shape) for name, tensor in state.items()}, _empty(model.config), "The model")
    if tokenizer is not None and tokenizer.get_vocab_size() > model.config.vocab_size:
        raise ValueError(
            f"The tokenizer has {tokenizer.get_vocab_size()} tokens but the model's vocab_size is "
            f"{model.config.vocab_size}; give the tokenizer that the model was trained with."
        )

    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / ".saving"  # one fixed name: what a killed process left behind is removed by the next save
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    try:
        save_file(state, beside / WEIGHTS, metadata={"format": "pt"})
        if tokenizer is not None:
            tokenizer.save(str(beside / TOKENIZER))
        names = sorted(path.name for path in beside.iterdir())
        contents = {
            "model_type": MODEL_TYPE,
            "format_version": FORMAT_VERSION,
            "dtype": str(model.dtype).removeprefix("torch."),
            "config": dataclasses.asdict(model.config),
            "sha256": {name: _sha256(beside / name) for name in names},
        }
        (beside / CONFIG).write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")
        for name in [*names, CONFIG]:
            os.replace(beside / name, folder / name)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def load_model(
    folder: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> MoEDecoder:
    """The model that `save_model` wrote, in evaluation mode.

    dtype: what to convert the parameters to (default: as stored, bit for bit); buffers, which the router
    keeps in float32 for a reason, stay as stored. The weights are allocated once, on the device.

    Raises ValueError, saying what was found and what would be right, if the folder is absent, is not such a
    checkpoint, or is damaged.
    """
    folder = Path(folder)
    contents = _read_config(folder)
    _check_digest(folder, WEIGHTS, contents)
    model = _empty(_network(folder, contents))
    parameters = {name for name, _ in model.named_parameters()}
    state = {}
    try:
        with safe_open(folder / WEIGHTS, "pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            _check_tensors(shapes, model, str(folder / WEIGHTS))
            for name in shapes:
                # A copy, because what is read is the file itself, mapped: it may change, and lies unaligned.
                wanted = dtype if name in parameters else None
                state[name] = file.get_tensor(name).to(device, wanted, copy=True)
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS} is not a whole safetensors file ({error}); copy it again.") from None
    model.load_state_dict(state, assign=True)
    left_empty = [name for name, t in chain(model.named_parameters(), model.named_buffers()) if t.is_meta]
    assert not left_empty, f"not part of the state dict, so never filled: {left_empty}"
    return model.eval()


def load_tokenizer(folder: str | Path) -> "Tokenizer":
    """The tokenizer that was saved with the model in folder. Raises ValueError if there was none."""
    from tokenizers import Tokenizer

    folder = Path(folder)
    contents = _read_config(folder)
    if TOKENIZER not in contents["sha256"]:
        raise ValueError(
            f"The model in {folder} was saved without a tokenizer; save it with tokenizer=... to keep one."
        )
    _check_digest(folder, TOKENIZER, contents)
    return Tokenizer.from_file(str(folder / TOKENIZER))


def _empty(config: ModelConfig) -> MoEDecoder:
    """The network with shapes and names but no memory."""
    with torch.device("meta"):
        return MoEDecoder(config)


def _read_config(folder: Path) -> dict[str, Any]:
    """config.json of a checkpoint of ours, its outer fields checked."""
    path = folder / CONFIG
    if not folder.is_dir():
        found = "is a file" if folder.exists() else "does not exist"
        raise ValueError(f"{folder} {found}; give the folder that save_pretrained wrote.")
    if not path.is_file():
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLES)
        found = f"only pickles ({', '.join(pickles)}), which can run code when read" if pickles else "no config.json"
        inside = f", such as {folder / 'model'}" if (folder / "model" / CONFIG).is_file() else ""
        raise ValueError(f"{folder} holds {found}; give a folder that save_pretrained wrote{inside}.")
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # malformed JSON, or bytes that are no text
        raise ValueError(f"{path} is not JSON ({error}); copy it again from where the model was saved.") from None
    if not isinstance(contents, dict) or contents.get("model_type") != MODEL_TYPE:
        found = repr(contents.get("model_type")) if isinstance(contents, dict) else "none"
        raise ValueError(f"{path} has model_type {found}; only {MODEL_TYPE!r}, as save_pretrained writes it, is read.")
    if contents.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format_version {contents.get('format_version')!r}, but this layerskip_moe reads "
            f"{FORMAT_VERSION}; install the version that wrote it."
        )
    for name in ("config", "sha256"):
        if not isinstance(contents.get(name), dict):
            raise ValueError(f"{path} lacks {name!r}; copy it again from where the model was saved.")
    return contents


def _network(folder: Path, contents: dict[str, Any]) -> ModelConfig:
    """The ModelConfig in config.json; a field that an older save did not know has its default."""
    unknown = sorted(set(contents["config"]) - {field.name for field in dataclasses.fields(ModelConfig)})
    if unknown:
        raise ValueError(
            f"{folder / CONFIG} has fields this layerskip_moe does not know ({', '.join(unknown)}); "
            "correct them, or install the version that wrote it."
        )
    if "vocab_size" not in contents["config"]:
        raise ValueError(f"{folder / CONFIG} lacks the network's vocab_size; copy it again from where it was saved.")
    try:
        return ModelConfig(**contents["config"])
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG} describes no network: {error}") from None


def _check_digest(folder: Path, name: str, contents: dict[str, Any]) -> None:
    path = folder / name
    if not path.is_file():
        raise ValueError(f"{folder} has a {CONFIG} but no {name}; copy the whole folder that save_pretrained wrote.")
    if _sha256(path) != contents["sha256"].get(name):
        raise ValueError(
            f"{path} is not the file that {CONFIG} was written with (its sha256 differs): a save or a copy was "
            "interrupted, or a file exchanged; save or copy the whole folder again."
        )


def _check_tensors(found: Mapping[str, tuple[int, ...]], model: MoEDecoder, what: str) -> None:
    """Refuse shapes by name that are not the model's, all differences in one error."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected]
    misshapen = [
        f"{name} is {list(found[name])} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    lists = (("missing", missing), ("not known", extra), ("of another shape", misshapen))
    problems = [f"{kind}: {_enumerate(names)}" for kind, names in lists if names]
    if problems:
        raise ValueError(f"{what} does not hold the tensors of its config ({'; '.join(problems)}).")


def _enumerate(names: list[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
