"""Tensors in safetensors files: which file holds which, copying them into a model, writing them in shards.

    model.safetensors                               all tensors; or, and then it comes second,
    model-00001-of-0000N.safetensors, ...           some each, with
    model.safetensors.index.json                    {"metadata": {...}, "weight_map": {tensor: file}}

Files are mapped into memory and each tensor copied straight into its place, so that a model's memory is all that
loading needs. Pickles, which can run code, are never opened.
Knows nothing of configs; what a tensor is called and where it belongs is `layouts.py`'s. Next: `checkpoint.py`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from layerskip_moe.nn import ModelConfig, MoEDecoder
from layerskip_moe.pretrained.json_file import read_json, write_json
from layerskip_moe.pretrained.layouts import Place
from layerskip_moe.refusals import shortened, shown

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
WEIGHT_FILES = ("model*.safetensors", INDEX)  # as patterns
_NAMED = 3  # of many tensors, in a sentence
HOW_TO_CONVERT = (
    "merge what torch.load(file, weights_only=True) gives for each and write it with safetensors.torch.save_file to "
    f"{WEIGHTS}, or open the model once with transformers and save it again"
)
_SHARDS = "model-?????-of-?????.safetensors"
_PICKLES = {".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"}
_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class StoredTensor(NamedTuple):
    """One tensor of a file, known by the file's header alone."""

    file: Path
    shape: tuple[int, ...]
    dtype: str  # in safetensors' words: "F32", "BF16", ...


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a folder's weights, by name; only headers are read.

    Raises ValueError where there are none, only pickles, a damaged index, a missing or damaged shard, or two shards
    with a tensor of the same name.
    """
    stored: dict[str, StoredTensor] = {}
    for path in _weight_files(folder):
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118
                    if name in stored:
                        raise ValueError(
                            f"{path} and {stored[name].file.name} both hold {shortened(name)}; remove the stray one."
                        )
                    view = file.get_slice(name)
                    stored[name] = StoredTensor(path, tuple(view.get_shape()), view.get_dtype())
        except SafetensorError as error:
            told = shortened(str(error))
            raise ValueError(f"{path} is not a whole safetensors file ({told}); copy it again.") from None
    return stored


def pickles(folder: Path) -> str:
    """The names of a folder's pickle files, "" where there are none."""
    return ", ".join(sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES))


def weight_file_names(folder: Path) -> set[str]:
    """The files in folder that hold weights or say which do, by their names alone."""
    paths = [*folder.glob(_SHARDS), folder / WEIGHTS, folder / INDEX]
    return {path.name for path in paths if path.is_file()}


def check_counts(stored: Mapping[str, StoredTensor], config: ModelConfig, what: str, *, stacked: bool) -> None:
    """Raise ValueError where a network has far more tensors than are stored, before they are listed or it is built,
    which for what a damaged config.json may say takes forever. A few too many `check_shapes` lists by their names.

    stacked: all experts of a layer are one tensor
    """
    experts = 0 if stacked else sum(map(config.is_moe, range(config.n_layers))) * config.num_experts
    least = config.n_layers + experts
    if least > len(stored) + 1000:
        raise ValueError(
            f"{what} holds {len(stored)} tensors, but its config tells of {config.n_layers} layers and "
            f"{config.num_experts} experts, which are more than {least}; copy the whole folder of the checkpoint."
        )


def check_shapes(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], what: str) -> None:
    """Raise one ValueError that tells of tensors missing, not known, and of another shape, the first few of each by
    name."""
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


def fill_model(
    model: MoEDecoder,
    stored: Mapping[str, StoredTensor],
    places: Mapping[str, Place],
    *,
    device: torch.device | str,
    dtype: torch.dtype | None,
) -> None:
    """Give a model on the meta device its memory on `device`, and copy every tensor into its place there.

    stored, places: of the same names and shapes, which together are the model's whole state dict
    dtype: of the parameters; None: as stored, and where parts of one parameter differ, what holds both. Buffers,
        which the router keeps in float32 for a reason, are always as stored.

    Raises ValueError for a tensor stored as other than floating point numbers of 16 bits or more, and, without a
    dtype, where the model would hold parameters of several types that no product takes together.
    """
    parameters = {name for name, _ in model.named_parameters()}
    types: dict[str, torch.dtype] = {}
    for name, place in places.items():
        kind, whole = _float_type(name, stored[name]), place.parameter
        if dtype is not None and whole in parameters:
            kind = dtype
        types[whole] = torch.promote_types(types.get(whole, kind), kind)
    # Routers and norms convert what they are given to their own type and back; no other parameter does.
    alike = {name for name in parameters if not name.endswith(("router.weight", "norm.weight"))}
    if len({types[name] for name in alike}) > 1:
        _refuse_several_types({name: stored[name] for name, place in places.items() if place.parameter in alike})
    state = {
        name: torch.empty(tensor.shape, dtype=types[name], device=device) for name, tensor in model.state_dict().items()
    }
    by_file: dict[Path, list[str]] = {}
    for name in places:
        by_file.setdefault(stored[name].file, []).append(name)
    for path, names in tqdm(by_file.items(), desc="loading", unit="file", delay=2):
        with safe_open(path, "pt") as file:
            for name in names:
                place = places[name]
                # A copy, because what is read is the file itself, mapped: it may change, and lies unaligned.
                copied = state[place.parameter][place.index].copy_(file.get_tensor(name))
                _check_finite(copied, name, path)
    model.load_state_dict(state, assign=True)


def read_tensor(
    stored: Mapping[str, StoredTensor], name: str, *, device: torch.device | str, dtype: torch.dtype | None = None
) -> Tensor:
    """A copy of one tensor, on `device`, in `dtype` (default: as stored). ValueError where it is not finite."""
    with safe_open(stored[name].file, "pt") as file:
        tensor = file.get_tensor(name).to(device, dtype, copy=True)
    _check_finite(tensor, name, stored[name].file)
    return tensor


def same_values(stored: Mapping[str, StoredTensor], name: str, other: str) -> bool:
    """Whether two stored tensors hold the same numbers."""
    with safe_open(stored[name].file, "pt") as first, safe_open(stored[other].file, "pt") as second:
        return torch.equal(first.get_tensor(name), second.get_tensor(other))


def write_tensors(folder: Path, tensors: Mapping[str, Tensor], max_shard_bytes: int) -> None:
    """Write tensors to folder, in one file, or in shards of at most max_shard_bytes and an index.

    A tensor larger than that has a shard of its own. Memory beyond the tensors' own is one shard at most. Raises
    OSError where the disk is full.
    """
    shards = _split(tensors, max_shard_bytes)
    files = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    if len(shards) == 1:
        files = [WEIGHTS]
    for file, names in tqdm(list(zip(files, shards, strict=True)), desc="saving", unit="file", delay=2):
        shard = {name: tensors[name].detach().cpu().contiguous() for name in names}
        try:
            save_file(shard, folder / file, metadata={"format": "pt"})
        except SafetensorError as error:  # which is no OSError, although a full disk is behind it
            raise OSError(f"{folder / file} could not be written ({error})") from None
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
            "weight_map": {name: file for file, names in zip(files, shards, strict=True) for name in names},
        }
        write_json(folder / INDEX, index)


def _split(tensors: Mapping[str, Tensor], max_shard_bytes: int) -> list[list[str]]:
    """Names in their order, cut before each tensor that does not fit any more."""
    shards: list[list[str]] = [[]]
    room = max_shard_bytes
    for name, tensor in tensors.items():
        if tensor.nbytes > room and shards[-1]:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= tensor.nbytes
    return shards


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        return _indexed_files(folder / INDEX)
    if shards := sorted(weight_file_names(folder)):
        raise ValueError(f"{folder} holds {_enumerate(shards)} but no {INDEX}; copy that file too.")
    if names := pickles(folder):
        raise ValueError(
            f"{folder} holds its weights only as pickles ({names}), which can run code when read and so are not; "
            f"{HOW_TO_CONVERT}."
        )
    raise ValueError(f"{folder} holds no {WEIGHTS} and no {INDEX}; copy the whole folder of the checkpoint.")


def _indexed_files(index: Path) -> list[Path]:
    """The shards that an index names, each of which is there."""
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
        raise ValueError(f"{index} has no weight_map of tensors to files; copy it again.")
    files = []
    for name in sorted(set(shards.values())):
        if name != Path(name).name or "\\" in name or "\0" in name or not name.endswith(".safetensors"):
            raise ValueError(f"{index} names the file {shown(name)}, which is not a safetensors file of this folder.")
        if not (index.parent / name).is_file():
            raise ValueError(
                f"{index} names {shortened(name)}, which is not there; copy the whole folder of the checkpoint."
            )
        files.append(index.parent / name)
    return files


def _float_type(name: str, tensor: StoredTensor) -> torch.dtype:
    if tensor.dtype not in _TYPES:
        raise ValueError(
            f"{tensor.file} stores {shortened(name)} as {tensor.dtype}, a quantised form that cannot be computed with "
            f"exactly; only {', '.join(_TYPES)} are read."
        )
    return _TYPES[tensor.dtype]


def _refuse_several_types(stored: Mapping[str, StoredTensor]) -> NoReturn:
    by_type: dict[str, list[str]] = {}
    for name, tensor in stored.items():
        by_type.setdefault(tensor.dtype, []).append(name)
    found = "; ".join(f"{kind}: {_enumerate(names)}" for kind, names in by_type.items())
    common = _TYPES[max(by_type, key=lambda kind: len(by_type[kind]))]
    raise ValueError(
        f"{next(iter(stored.values())).file.parent} stores weights in several types ({found}), which cannot be "
        f"computed with together; give dtype=, say {common}, to convert them all."
    )


def _check_finite(tensor: Tensor, name: str, file: Path) -> None:
    """Raise ValueError for NaN and infinities: by the ends, which takes one pass and no memory."""
    if not tensor.is_floating_point() or not tensor.numel():
        return
    if not torch.stack(tensor.aminmax()).isfinite().all():
        kind = str(tensor.dtype).removeprefix("torch.")
        raise ValueError(
            f"{file} holds {shortened(name)} with numbers that are NaN or infinite in {kind}, so that whatever it "
            "computes would be; give a dtype that holds them, or a checkpoint from before the training diverged."
        )


def _enumerate(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(map(shortened, names[:_NAMED])) + more
