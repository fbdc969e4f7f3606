"""The programs that ours is timed beside: which there are, whether they are installed, and what each cannot do.

Weights reach them through files, as users' do. Knows nothing of clocks. Next: `peer_transformers.py`,
`peer_llama_cpp.py`.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch

from layerskip_moe.bench import peer_llama_cpp, peer_transformers
from layerskip_moe.bench.networks import Network, Precision
from layerskip_moe.nn import ModelConfig, MoEDecoder
from layerskip_moe.pretrained import load_tokenizer
from layerskip_moe.pretrained.families import family_of
from layerskip_moe.pretrained.gguf import GGUFType, export_gguf, gguf_obstacles

Peer = Literal["hf", "hf-early-exit", "llama-cpp"]

_PACKAGES: dict[str, tuple[str, ...]] = {
    "hf": ("transformers",),
    "hf-early-exit": ("transformers",),
    "llama-cpp": ("llama_cpp", "gguf"),
}
_GGUF_TYPES: dict[Precision, GGUFType] = {"float32": "float32", "bfloat16": "bfloat16", "int8": "q8_0"}


def check_peers(peers: Sequence[Peer]) -> None:
    """Raise ValueError, with the line that installs them, where packages are missing, and for unknown peers."""
    for peer in peers:
        if peer not in _PACKAGES:
            raise ValueError(f"{peer!r} is no peer; there are {', '.join(_PACKAGES)}.")
        missing = [package.replace("llama_cpp", "llama-cpp-python") for package in _PACKAGES[peer] if not _has(package)]
        if missing:
            raise ValueError(
                f"the peer {peer} needs {' and '.join(missing)}: `pip install {' '.join(missing)}`, or leave it out "
                "of --peers."
            )


def _has(package: str) -> bool:
    return find_spec(package) is not None


def reason_to_skip(peer: str, config: ModelConfig, precision: Precision, device: str) -> str | None:
    """Why this peer cannot do the same work; None where it can."""
    if peer == "llama-cpp":
        if device != "cpu":
            return "llama.cpp is timed on the CPU alone"
        found = gguf_obstacles(config)
        return f"llama.cpp cannot express {'; '.join(found)}" if found else None
    if precision == "int8":
        return "transformers has no int8 weights of its own"
    return None if family_of(config) else "no architecture of transformers is this network"


def load_peer(
    peer: Peer, model: MoEDecoder, network: Network, precision: Precision, positions: int, folder: Path
) -> tuple[Any, dict[str, Any]]:
    """The float32 model in a peer, at a precision and with room for so many positions, through files in folder; and the
    peer's settings, for the record."""
    if peer == "llama-cpp":
        path = export_for_llama_cpp(model, network.model, precision, folder)
        return peer_llama_cpp.load(path, positions, precision), peer_llama_cpp.settings(precision)
    exported = export_for_transformers(model, folder / "hf")
    theirs = peer_transformers.load(exported, getattr(torch, precision), str(model.device))
    return theirs, peer_transformers.settings(theirs)


def export_for_transformers(model: MoEDecoder, folder: Path) -> Path:
    """The model as transformers opens it; without a tokenizer, so that no token ends a text."""
    model.save_pretrained(folder)
    return folder


def export_for_llama_cpp(model: MoEDecoder, checkpoint: str | None, precision: Precision, folder: Path) -> Path:
    """The float32 model as a GGUF file of that precision. checkpoint: where its tokenizer lies; None: one that nobody
    will use."""
    from layerskip_moe.data.source import Document
    from layerskip_moe.data.tokenizer import train_tokenizer

    tokenizer = (
        train_tokenizer("bpe", 258, [Document("train", "aa")], False)
        if checkpoint is None
        else load_tokenizer(checkpoint)
    )
    path = folder / f"{precision}.gguf"
    export_gguf(model, tokenizer, path, dtype=_GGUF_TYPES[precision])
    return path
