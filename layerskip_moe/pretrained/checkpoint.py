"""A checkpoint as a whole: a folder that holds a network, or is refused.

    config.json                  of the family of transformers that computes this very network, or of our own type,
                                 as quantised models are
    model.safetensors            the weights, under that family's names; large ones in shards with an index
    tokenizer.json, tokenizer_config.json, generation_config.json      when a tokenizer was given
    layerskip_moe.json           digests of all these, and what they have no room for; see `record.py`
    README.md                    the model card

Other people's checkpoints have no layerskip_moe.json. Nothing is written but beside, in the folder .saving, which then
hands its files over one by one; while it does so there is no config.json, so that nobody opens half of one save and
half of another.

Knows nothing of optimizers (`training/checkpoint.py`). Next: `config_file.py`, `weights.py` and `layouts.py`, which
read and write the parts; `hub.py`, which brings them from afar.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from layerskip_moe.constants import pick_device
from layerskip_moe.files import making_folder
from layerskip_moe.nn import ModelConfig, MoEDecoder
from layerskip_moe.pretrained.config_file import (
    CONFIG,
    config_contents,
    empty_model,
    fields_left_out,
    read_network,
    read_quantization,
)
from layerskip_moe.pretrained.families import family_of
from layerskip_moe.pretrained.hub import local_folder
from layerskip_moe.pretrained.json_file import write_json
from layerskip_moe.pretrained.layouts import Place, ignorable, tensor_places
from layerskip_moe.pretrained.model_card import CARD, has_other_card, model_card
from layerskip_moe.pretrained.quantize import load_quantized, quantization_of, quantize, quantized_state
from layerskip_moe.pretrained.record import RECORD, check_files, check_recipe, read_record, write_record
from layerskip_moe.pretrained.tokenizer import (
    copy_tokenizer_files,
    special_roles,
    write_tokenizer_files,
)
from layerskip_moe.pretrained.weights import (
    WEIGHT_FILES,
    StoredTensor,
    check_counts,
    check_shapes,
    fill_model,
    read_tensor,
    same_values,
    stored_tensors,
    weight_file_names,
    write_tensors,
)
from layerskip_moe.special_tokens import end_of_text_ids

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_SAVING = ".saving"  # one fixed name: what a killed process left behind is removed by the next save


def load_model(
    folder_or_id: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    revision: str | None = None,
    token: str | None = None,
) -> MoEDecoder:
    """The network of a checkpoint, ours or of one of `families.FAMILIES`, in evaluation mode.

    folder_or_id, revision, token: a folder, or an id on the Hugging Face hub; see `hub.local_folder`
    dtype: what to convert the parameters to (default: as stored, bit for bit); buffers, which the router keeps in
        float32 for a reason, and quantised weights stay as stored
    device: where the weights are allocated, once, in that type

    Raises ValueError, saying what was found and what would be right, if there is no checkpoint, it is damaged, its
    network cannot be computed exactly, its matrices are of several types and dtype does not say which, or there is no
    such device.
    """
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype={dtype} cannot be computed in; give torch.float32, torch.bfloat16 or torch.float16.")
    device = pick_device(str(device))
    folder = local_folder(folder_or_id, revision=revision, token=token)
    family, config = read_network(folder)
    check_files(folder, (CONFIG, *WEIGHT_FILES))
    stored, quantization = stored_tensors(folder), read_quantization(folder)
    fused = any(name.endswith("mlp.experts.gate_up_proj") for name in stored)
    check_counts(stored, config, str(folder), stacked=family is None or fused)
    model = empty_model(config)
    if quantization is not None:
        return _load_quantized(folder, model, stored, quantization, device=device, dtype=dtype)
    places = _places(model, family, fused=fused)
    _drop_ignorable(stored, places, config)
    state = model.state_dict()
    expected = {name: tuple(state[place.parameter][place.index].shape) for name, place in places.items()}
    check_shapes({name: tensor.shape for name, tensor in stored.items()}, expected, str(folder))
    fill_model(model, stored, places, device=device, dtype=dtype)
    return model.eval()


def save_model(
    model: MoEDecoder,
    folder: str | Path,
    *,
    tokenizer: "Tokenizer | str | Path | None" = None,
    recipe: Mapping[str, Any] | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write the model into folder (made if need be) so that transformers opens it, where one of its families computes
    the same network, and as our own type where none does, or the model is quantised.

    tokenizer: written beside it; its end of text, by the usual names, becomes generate's in transformers. Or another
        checkpoint, a folder or an id on the hub, whose tokenizer's files are copied as they stand, with its own word
        on where a text ends, and its chat template
    recipe: how the model was trained, plain JSON values, for `read_recipe` and the model card
    max_shard_bytes: larger weights are split into files of at most so many bytes

    An error, a full disk or Ctrl-C while writing leaves an older checkpoint in the folder as it was. While the written
    files are put in place, which takes moments, it leaves a folder that is refused, and what is not in place yet in its
    .saving, until the next save.

    Files of an older save that this one has not go, and so do all weights (model.safetensors, model-0000N-of-...,
    their index), whoever wrote them; anything else stays, a README.md that we did not write too.

    Raises ValueError if folder is a file, if it has folders where files are to be, if the tokenizer has more tokens
    than the model, if the recipe is not plain, or if the model's tensors are not those its config describes (say, after
    a module was exchanged); OSError where the disk is full.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; give a folder to save the model in.")
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes={max_shard_bytes} must be 1 or more.")
    check_recipe(recipe)
    size = 0 if tokenizer is None or isinstance(tokenizer, str | Path) else tokenizer.get_vocab_size()
    if size > model.config.vocab_size:  # published tokenizers, which are copied, may have a token too many
        raise ValueError(
            f"The tokenizer has {size} tokens but the model's vocab_size is "
            f"{model.config.vocab_size}; give the tokenizer that the model was trained with."
        )
    quantization, empty = quantization_of(model), empty_model(model.config)
    family = family_of(model.config)
    facts: dict[str, Any] = {}
    state, expected = model.state_dict(), empty.state_dict()
    if quantization is not None:
        family = None  # none has words for our quantised weights
        (state, facts), (expected, _) = quantized_state(model), quantized_state(quantize(empty, quantization))
    check_shapes(_shapes(state), _shapes(expected), "The model")
    tensors = state
    if family is not None:
        places = tensor_places(model.config, family)
        tensors = {name: state[place.parameter][place.index] for name, place in places.items()}
    contents = config_contents(model.config, family, model.dtype) | facts

    with making_folder(folder):
        beside = folder / _SAVING
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir()
        try:
            write_tensors(beside, tensors, max_shard_bytes)
            if isinstance(tokenizer, str | Path):
                contents |= copy_tokenizer_files(tokenizer, beside)
            elif tokenizer is not None:
                write_tokenizer_files(tokenizer, beside)
                contents |= _write_generation_config(tokenizer, beside)
            write_json(beside / CONFIG, contents)
            write_record(beside, fields_left_out(model.config, family), recipe)
            if not has_other_card(folder):
                (beside / CARD).write_text(model_card(beside), encoding="utf-8")
            _make_ready(beside, folder)
        except BaseException:
            shutil.rmtree(beside, ignore_errors=True)
            raise
        _put_in_place(beside, folder)
        shutil.rmtree(beside, ignore_errors=True)


def read_recipe(
    folder_or_id: str | Path, *, revision: str | None = None, token: str | None = None
) -> dict[str, Any] | None:
    """How the model was trained, as `save_model` was told; None where it was not. Arguments as `load_model`'s."""
    record = read_record(local_folder(folder_or_id, revision=revision, token=token, patterns=("*.json",)))
    return None if record is None else record.get("recipe")


def _load_quantized(
    folder: Path,
    model: MoEDecoder,
    stored: Mapping[str, StoredTensor],
    quantization: Any,
    *,
    device: torch.device | str,
    dtype: torch.dtype | None,
) -> MoEDecoder:
    """The model, empty so far, in the form that config.json says, with its tensors."""
    try:
        expected, facts = quantized_state(quantize(model, quantization))
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from None
    check_shapes({name: tensor.shape for name, tensor in stored.items()}, _shapes(expected), str(folder))
    plain = {name for name, _ in model.named_parameters()}  # those that are quantised have other names in the files

    def get(name: str) -> torch.Tensor:
        return read_tensor(stored, name, device=device, dtype=dtype if name in plain else None)

    return load_quantized(model, get, facts)


def _shapes(state: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _places(model: MoEDecoder, family: str | None, *, fused: bool = False) -> dict[str, Place]:
    """Where each tensor of a checkpoint belongs; our own type has the names of the state dict."""
    if family is None:
        return {name: Place(name, ()) for name in model.state_dict()}
    return tensor_places(model.config, family, fused=fused)


def _drop_ignorable(stored: dict[str, StoredTensor], places: Mapping[str, Place], config: ModelConfig) -> None:
    """Forget stored tensors that follow from others, as old checkpoints carry some."""
    for name in [name for name in stored if name not in places and ignorable(name, config)]:
        embedding = "model.embed_tokens.weight"
        if name == "lm_head.weight" and embedding in stored and not same_values(stored, name, embedding):
            raise ValueError(
                f"{stored[name].file} holds a head that is not the embedding, though {CONFIG} ties them; set "
                "tie_word_embeddings to false there if the head is meant."
            )
        del stored[name]


def _write_generation_config(tokenizer: "Tokenizer", folder: Path) -> dict[str, Any]:
    """Tell transformers' generate where a text begins and ends, as ours takes it, and return the same for
    config.json."""
    ids: dict[str, Any] = {}
    roles, ends = special_roles(tokenizer), end_of_text_ids(tokenizer)
    if "bos_token" in roles:
        ids["bos_token_id"] = tokenizer.token_to_id(roles["bos_token"])
    if ends:
        ids["eos_token_id"] = ends[0] if len(ends) == 1 else ends
        write_json(folder / "generation_config.json", ids)
    return ids


def _make_ready(beside: Path, folder: Path) -> None:
    """Do what can still fail before an older file is touched: have all on the disk, and find no folder in the way."""
    in_the_way = sorted(path.name for path in beside.iterdir() if (folder / path.name).is_dir())
    if in_the_way:
        raise ValueError(
            f"{folder} has folders called {', '.join(in_the_way)}, where files are to be; move them away, or save "
            "elsewhere."
        )
    for path in beside.iterdir():
        with open(path, "rb+") as file:
            os.fsync(file.fileno())


def _put_in_place(beside: Path, folder: Path) -> None:
    """Hand the files over, the record last, and remove an older save's that are not replaced."""
    names = sorted(path.name for path in beside.iterdir())
    for name in names:
        shutil.copymode(beside / CONFIG, beside / name)  # safetensors lets nobody else read what it wrote
    stale = weight_file_names(folder) | _recorded_files(folder)
    try:
        (folder / CONFIG).unlink(missing_ok=True)  # nobody opens the folder until it is whole again
        for name in [name for name in names if name not in (CONFIG, RECORD)]:
            os.replace(beside / name, folder / name)
        for name in sorted(stale - set(names)):
            (folder / name).unlink(missing_ok=True)
        for name in (CONFIG, RECORD):
            os.replace(beside / name, folder / name)
    except OSError as error:
        raise OSError(
            f"{folder} is not whole ({error}); save again, or find what is not in place yet in {beside}"
        ) from error


def _recorded_files(folder: Path) -> set[str]:
    """What an older save of ours left in folder."""
    try:
        record = read_record(folder)
    except ValueError:  # damaged, or of another version: what it named is not known
        return set()
    names = set() if record is None else {Path(name).name for name in record["sha256"]}
    return {name for name in names if (folder / name).is_file()}
