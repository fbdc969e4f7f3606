"""The most memory that decoding and training take beyond what importing takes, each in a process of its own.

On a CPU: anonymous memory of the process, sampled each millisecond, above what it had after its imports and the same
work on a tiny network. On a GPU: the most that was allocated there. Next: `alone.py` (the processes).
"""

import contextlib
import gc
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from layerskip_moe.bench import ours, peer_transformers
from layerskip_moe.bench.alone import in_fresh_process
from layerskip_moe.bench.decode import OURS
from layerskip_moe.bench.interleave import summary
from layerskip_moe.bench.networks import Precision, at_precision, cache_bytes, random_tokens, weight_bytes
from layerskip_moe.bench.peers import Peer, check_peers, export_for_transformers, reason_to_skip
from layerskip_moe.bench.train import TrainSettings, our_step, recipes, their_step
from layerskip_moe.generation.generate import check_prompts
from layerskip_moe.nn import ModelConfig, MoEDecoder

_STATUS = "/proc/self/status"
_TRAINING = "training step"
_TINY_VOCABULARY = 64  # all tokens are below it


@dataclass(frozen=True)
class MemorySettings:
    """What is done, and by whom.

    Attributes:
        peers: hf (transformers)
        precisions: of decoding: float32, bfloat16, int8; training has float32 weights
        prompt_tokens: of the one prompt
        new_tokens: to decode
        batch_size: B, samples of the training step
        seq_len: T, tokens of each
        compile: of `generate`
    """

    peers: tuple[Peer, ...] = ("hf",)
    precisions: tuple[Precision, ...] = ("float32", "bfloat16")
    prompt_tokens: int = 32
    new_tokens: int = 128
    batch_size: int = 16
    seq_len: int = 128
    compile: bool = True


def memory_benchmark(model: MoEDecoder, seed: int, settings: MemorySettings) -> dict[str, Any]:
    """Memory of decoding at each precision and of a training step.

    Returns as `decode_benchmark`, the groups being "decoding, <precision>" and "training step"; a row has "name",
    "bytes" and "value" (the same in MB), a group "needed": bytes of weights and cache, in training of weights,
    gradients and AdamW's two moments. Raises ValueError for peers that are not installed, a prompt that does not fit
    the model, and where the system does not tell a process's memory.
    """
    check_peers(settings.peers)
    if set(settings.peers) - {"hf"}:
        raise ValueError("memory is compared with hf alone; leave the other peers out.")
    if model.device.type == "cpu" and not os.path.exists(_STATUS):
        raise ValueError(f"memory is read from {_STATUS}, which this system does not have; run it on Linux.")
    prompt = random_tokens(settings.prompt_tokens, model.config.vocab_size, seed=seed)
    check_prompts([prompt], model.config, settings.new_tokens)
    work = [(precision, f"decoding, {precision}") for precision in settings.precisions]
    groups, skipped = {}, []
    with tempfile.TemporaryDirectory() as folder:
        total = (len(work) + 1) * (1 + len(settings.peers))
        with tqdm(total=total, desc="memory", leave=False) as bar:
            for precision, name in [*work, ("float32", _TRAINING)]:
                training = name == _TRAINING
                ready = at_precision(model, precision)
                tiny = at_precision(MoEDecoder(_tiny(model.config)).to(model.device), precision)
                folders = [Path(folder) / precision / size for size in ("tiny", "whole")]
                for network, place in zip((tiny, ready), folders, strict=True):
                    export_for_transformers(network, place)
                rows = []
                for peer in (OURS, *settings.peers):
                    bar.update()
                    reason = None if peer == OURS else reason_to_skip(peer, model.config, precision, str(model.device))
                    if reason is not None:
                        skipped.append({"peer": peer, "precision": name, "reason": reason})
                        continue
                    arguments = {
                        "folders": list(map(str, folders)),
                        "peer": peer,
                        "training": training,
                        "prompt": prompt,
                        "settings": asdict(settings),
                        "device": str(model.device),
                        "threads": torch.get_num_threads(),
                    }
                    taken = in_fresh_process(_peak, arguments)
                    rows.append({"name": peer, "bytes": taken, "value": summary([taken / 1e6])})
                groups[name] = {"rows": rows, "needed": _needed(ready, training, settings)}
    return {"benchmark": "memory", "unit": "MB", "groups": groups, "skipped": skipped}


def _tiny(config: ModelConfig) -> ModelConfig:
    """A network of the same kind, for imports and whatever is made once."""
    layers = config.moe_layers if isinstance(config.moe_layers, str) else "all"
    sizes: dict[str, Any] = {"d_model": 16, "n_heads": 2, "n_kv_heads": 1, "head_dim": 8, "d_ff": 16, "dense_d_ff": 16}
    return replace(config, n_layers=2, moe_layers=layers, sliding_layers="all", vocab_size=_TINY_VOCABULARY, **sizes)


def _needed(model: MoEDecoder, training: bool, settings: MemorySettings) -> int:
    """Bytes that there is no way around."""
    weights = weight_bytes(model)[0]
    if training:
        return 4 * weights
    return weights + cache_bytes(model, settings.prompt_tokens + settings.new_tokens)


def _peak(
    *,
    folders: list[str],
    peer: str,
    training: bool,
    prompt: list[int],
    settings: dict[str, Any],
    device: str,
    threads: int,
) -> int:
    """In the process: the work on the tiny network, then, watched, on the whole one, loading included; bytes."""
    torch.set_num_threads(threads)
    chosen = MemorySettings(**settings)
    work = _train if training else _decode
    prompt = [token % _TINY_VOCABULARY for token in prompt]
    tiny, whole = folders
    work(tiny, peer, prompt, chosen, device)
    gc.collect()
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats(device)
        work(whole, peer, prompt, chosen, device)
        return torch.cuda.max_memory_allocated(device)
    with _watched() as peak:
        work(whole, peer, prompt, chosen, device)
    return peak()


def _decode(folder: str, peer: str, prompt: list[int], settings: MemorySettings, device: str) -> None:
    """Load and decode; the weights are of the type they are stored in."""
    if peer == OURS:
        model = MoEDecoder.from_pretrained(folder, device=device)
        ours.decode(model, prompt, settings.new_tokens, compile=settings.compile)
    else:
        peer_transformers.decode(peer_transformers.load(Path(folder), "auto", device), prompt, settings.new_tokens)


def _train(folder: str, peer: str, prompt: list[int], settings: MemorySettings, device: str) -> None:
    """Load and train two steps, as AdamW's moments are there from the first one's end on."""
    batch = TrainSettings(batch_size=settings.batch_size, seq_len=settings.seq_len)
    shape = settings.batch_size, settings.seq_len + 1
    tokens = torch.tensor(random_tokens(shape[0] * shape[1], _TINY_VOCABULARY, seed=0), device=device).view(shape)
    if peer == OURS:
        run = our_step(MoEDecoder.from_pretrained(folder, device=device), tokens, recipes(batch)[0], 2)
    else:
        run = their_step(peer_transformers.load(Path(folder), torch.float32, device), tokens, batch)
    for _ in range(2):
        run()


@contextlib.contextmanager
def _watched() -> Iterator[Callable[[], int]]:
    """The most anonymous memory above the present, in bytes, to be asked when the block has ended."""
    before = highest = _anonymous()
    stop = threading.Event()

    def watch() -> None:
        nonlocal highest
        while not stop.is_set():
            highest = max(highest, _anonymous())
            time.sleep(0.001)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield lambda: highest - before
    finally:
        stop.set()
        thread.join()
        highest = max(highest, _anonymous())


def _anonymous() -> int:
    """Bytes of this process that no file backs."""
    with open(_STATUS) as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))
