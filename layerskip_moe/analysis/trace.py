"""A trace: what every exit layer would say at every position of some texts, and how sure it is, in one file.

On a text that the model wrote itself, drafts are that very text up to the first one that is refused. So how many drafts
a round accepts, whatever drafted them, can be read off, and drafting policies can be compared without decoding again.

L layers, M MoE layers, K experts chosen, T tokens of a text, N of them new, D drafts; state p, one of T - 1, is asked
for token p + 1.
Knows nothing of models or policies. Next: `record_trace.py`, which makes one; `bench/replay.py`, which reads it.
"""

import json
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np

from layerskip_moe.files import plain, replacing
from layerskip_moe.nn import ModelConfig
from layerskip_moe.refusals import require_whole, shortened, shown

Array: TypeAlias = "np.ndarray[Any, Any]"

_VERSION = 6  # of the file
_MOST_BYTES = 2**32  # of its arrays, unpacked
_PER_STATE = ("said", "second", "confidence", "margin", "experts")
_PER_DRAFT = ("int8_right", "int8_margin")
# Kinds of arrays; the others hold whole numbers.
_KINDS = {"confidence": "f", "margin": "f", "int8_right": "b", "int8_margin": "f"}


@dataclass(frozen=True)
class TracedText:
    """One text: a prompt and what the model made of it, or held-out text alone.

    Attributes:
        tokens: [T] the text's token ids
        prompt_length: how many of them were given, 1..T; what follows is the model's own choice, the last layer's
        temperature: at which that was chosen, and everything here is said; 0 is greedy
        seed: of the noise, whose row is 0
        said: [L, T - 1] the token that each layer says, with the temperature and noise of its position: just what it
            would draft there
        second: [L, T - 1] what it would say were that token forbidden
        confidence: [L, T - 1] float32, the probability that the layer gives it
        margin: [L, T - 1] float32, by how much what it says was chosen before `second`, in logits and noise
            (`nn/ragged.py`)
        experts: [M, T - 1, K] the experts chosen, by MoE layer, rising
        int8_right: [L, N, D] bool: of a round at each new token's place, and D drafts made from int8 copies of the
            weights, whether each layer would draft the text, behind drafts that are. False beyond the text's end. D is
            0 where that was not recorded
        int8_margin: [L, N, D] float32, their margins; 0 beyond the text's end
    """

    tokens: Array
    prompt_length: int
    temperature: float
    seed: int
    said: Array
    second: Array
    confidence: Array
    margin: Array
    experts: Array
    int8_right: Array
    int8_margin: Array

    @property
    def is_own(self) -> bool:
        """Whether the model wrote any of it."""
        return self.prompt_length < len(self.tokens)

    @property
    def agreement(self) -> Array:
        """[L, T - 1] bool: where each layer says what the last one says."""
        return self.said == self.said[-1]


@dataclass(frozen=True)
class Trace:
    """Texts of one model.

    Attributes:
        texts: continuations, prompt by prompt within a temperature, and held-out text
        config: the model's
        about: plain values: `checkpoint`, the model's `fingerprint`, `text`, `machine`, `command`, `cost_model`, ...
    """

    texts: list[TracedText]
    config: ModelConfig
    about: dict[str, Any]

    def continuations(self) -> dict[float, list[TracedText]]:
        """What the model wrote itself, by temperature, in the order of recording."""
        found: dict[float, list[TracedText]] = {}
        for text in self.texts:
            if text.is_own:
                found.setdefault(text.temperature, []).append(text)
        return found


def save_trace(trace: Trace, path: str | Path) -> None:
    """Write one .npz: arrays over all texts, one after the other, as small integers, and a header in JSON."""
    config = trace.config
    header = {
        "version": _VERSION,
        "about": trace.about,
        "config": config,
        "texts": [
            {
                "tokens": len(text.tokens),
                "prompt_length": text.prompt_length,
                "temperature": text.temperature,
                "seed": text.seed,
            }
            for text in trace.texts
        ],
    }
    arrays: dict[str, Any] = {"tokens": np.concatenate([text.tokens for text in trace.texts])}
    for name in _PER_STATE:
        arrays[name] = np.concatenate([getattr(text, name) for text in trace.texts], axis=1)
    own = [text for text in trace.texts if text.is_own] or trace.texts[:1]  # (which then have no new tokens)
    for name in _PER_DRAFT:
        arrays[name] = np.concatenate([getattr(text, name) for text in own], axis=1)
    counts = {"tokens": config.vocab_size, "said": config.vocab_size, "second": config.vocab_size}
    for name, count in (counts | {"experts": config.num_experts}).items():
        arrays[name] = arrays[name].astype(np.min_scalar_type(max(count - 1, 0)))
    arrays["header"] = np.frombuffer(json.dumps(plain(header), allow_nan=False).encode(), dtype=np.uint8)
    with replacing(Path(path)) as beside, open(beside, "wb") as file:
        np.savez_compressed(file, **arrays)


def load_trace(path: str | Path) -> Trace:
    """What `save_trace` wrote. Raises ValueError for any other file, one of another version, or a damaged one, and
    OSError where there is none."""
    with open(path, "rb") as file:
        try:
            header, arrays = _read(file)
            version = header["version"]
        except Exception as error:  # numpy, zipfile and zlib raise whatever they stumble over first, MemoryError too
            raise ValueError(f"{path} is not a trace, or is damaged; `layerskip-moe trace` writes one.") from error
    if version != _VERSION:
        raise ValueError(
            f"{path} is a trace of version {shown(version)}, and this library reads version {_VERSION}; record it anew."
        )
    try:
        config = ModelConfig(**header["config"])
        for entry in header["texts"]:
            _check_entry(entry)
        lengths = [(entry["tokens"], entry["prompt_length"]) for entry in header["texts"]]
        about = {**header["about"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({shortened(str(error)).rstrip('.')}); record it anew.") from None
    _check_arrays(path, arrays, config, lengths)
    return Trace(list(_texts(header["texts"], arrays)), config, about)


def _read(file: IO[bytes]) -> tuple[dict[str, Any], dict[str, Array]]:
    """Header and arrays, which those of another version may lack."""
    with zipfile.ZipFile(file) as archive:
        if sum(member.file_size for member in archive.infolist()) > _MOST_BYTES:
            raise ValueError("unpacked it would fill the memory")
    file.seek(0)
    with np.load(file, allow_pickle=False) as archive:
        header = json.loads(archive["header"].tobytes())
        names = ("tokens", *_PER_STATE, *_PER_DRAFT) if header["version"] == _VERSION else ()
        arrays = {name: archive[name] for name in names}
    if not all(isinstance(array, np.ndarray) for array in arrays.values()):  # a member that is no array comes as bytes
        raise ValueError("not all of it are arrays")
    return header, arrays


def _check_entry(entry: Any) -> None:
    """Raise ValueError for what a header does not say of a text."""
    if not isinstance(entry, dict) or entry.keys() != {"tokens", "prompt_length", "temperature", "seed"}:
        raise ValueError("it does not say of each text how long it is, and how it was made")
    if (
        not 1
        <= require_whole("prompt_length", entry["prompt_length"], 1)
        <= require_whole("tokens", entry["tokens"], 1)
    ):
        raise ValueError(f"prompt_length={entry['prompt_length']} is past the end of a text")
    require_whole("seed", entry["seed"], -(2**63))
    temperature = entry["temperature"]
    if not isinstance(temperature, int | float) or not 0 <= temperature <= sys.float_info.max:
        raise ValueError(f"temperature={shown(temperature)} must be 0 or more")


def _check_arrays(
    path: str | Path, arrays: dict[str, Array], config: ModelConfig, lengths: list[tuple[int, int]]
) -> None:
    """Raise ValueError unless the arrays hold texts of these lengths, and prompts, in tokens and experts of this
    network."""
    moe_layers = sum(map(config.is_moe, range(config.n_layers)))
    tokens, given = (sum(some) for some in zip(*lengths, strict=True)) if lengths else (0, 0)
    states, drafts = tokens - len(lengths), arrays["int8_right"].shape[-1:]
    expected: dict[str, tuple[int, ...]] = {
        "tokens": (tokens,),
        "experts": (moe_layers, states, config.top_k if moe_layers else 0),
        **{name: (config.n_layers, states) for name in _PER_STATE[:-1]},
        **{name: (config.n_layers, tokens - given, *drafts) for name in _PER_DRAFT},
    }
    for name, shape in expected.items():
        found = arrays[name]
        if found.shape != shape:
            raise ValueError(f"{path} is damaged: its {name} have shape {found.shape}, not {shape}.")
        if found.dtype.kind not in _KINDS.get(name, "iu"):
            raise ValueError(f"{path} is damaged: its {name} are of type {found.dtype}; record it anew.")
        if name.endswith("margin") and not (found >= 0).all():  # (nor are they what is no number)
            raise ValueError(f"{path} is damaged: its {name}s are not all 0 or more; record it anew.")
        count = config.num_experts if name == "experts" else config.vocab_size
        if name not in _KINDS and found.size and not 0 <= found.min() <= found.max() < count:
            raise ValueError(f"{path} is damaged: its {name} are not all among 0 to {count - 1}; record it anew.")


def _texts(entries: list[dict[str, Any]], arrays: dict[str, Array]) -> Iterator[TracedText]:
    """The arrays cut into texts."""
    token = state = new = 0
    for entry in entries:
        length = entry.pop("tokens")
        end = new + length - entry["prompt_length"]
        parts: dict[str, Any] = {name: arrays[name][:, state : state + length - 1] for name in _PER_STATE}
        parts |= {name: arrays[name][:, new:end] for name in _PER_DRAFT}
        yield TracedText(tokens=arrays["tokens"][token : token + length], **entry, **parts)
        token, state, new = token + length, state + length - 1, end
