"""Time this library beside others: the same work on the same weights, in the same run, beside what the machine allows.

    layerskip-moe bench decode --peers hf,llama-cpp
    layerskip-moe bench prefill --network qwen3 --peers hf --precisions float32,bfloat16
    layerskip-moe bench train --out train.json --plot train.png
    layerskip-moe bench memory --model runs/main/model
    layerskip-moe bench speculation --checkpoint runs/main/model
    layerskip-moe bench policies --trace runs/trace.npz
    layerskip-moe bench communication --processes 4 --expert-parallel 2

`layerskip-moe bench decode --help` lists that one's options. The peers are packages of their own: `pip install
'layerskip-moe[bench]'` brings them all.
"""

# Next: `bench/decode.py` and its neighbours, which measure; `bench/tables.py`, which tells; `bench_policies.py`.

import difflib
import json
import shlex
import typing
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from layerskip_moe.analysis.figures import save_figure
from layerskip_moe.bench.decode import DecodeSettings, decode_benchmark
from layerskip_moe.bench.figure import benchmark_figure
from layerskip_moe.bench.first_token import first_token
from layerskip_moe.bench.machine import describe_machine
from layerskip_moe.bench.memory import MemorySettings, memory_benchmark
from layerskip_moe.bench.networks import Network, describe_network, load_network
from layerskip_moe.bench.prefill import PrefillSettings, prefill_benchmark
from layerskip_moe.bench.scaling import scaling
from layerskip_moe.bench.tables import result_text
from layerskip_moe.bench.train import TrainSettings, train_benchmark
from layerskip_moe.cli import bench_communication, bench_policies, bench_speculation
from layerskip_moe.cli.flags import fields_of, parse
from layerskip_moe.constants import pick_device
from layerskip_moe.files import plain, replacing
from layerskip_moe.nn import MoEDecoder

SETTINGS: dict[str, type] = {
    "decode": DecodeSettings,
    "prefill": PrefillSettings,
    "train": TrainSettings,
    "memory": MemorySettings,
}
# Of a trained model, its trace, or several processes, not of a network: commands with options of their own.
_OF_ITS_OWN = {
    "speculation": bench_speculation.run,
    "policies": bench_policies.run,
    "communication": bench_communication.run,
}
_PEER_PACKAGES = ("transformers", "llama-cpp-python")


@dataclass(frozen=True)
class Options:
    """Where it runs, and where the result goes.

    Attributes:
        out: a JSON file for the result: every sample, the machine, versions, this command
        plot: a picture of it (.png, .svg or .pdf)
        device: cpu, cuda, cuda:1, ...; None: a GPU where there is one
        threads: of torch and of the peers; None: as many as torch takes
    """

    out: str | None = None
    plot: str | None = None
    device: str | None = None
    threads: int | None = None


def run(arguments: list[str]) -> None:
    """`layerskip-moe bench`."""
    name = arguments[0] if arguments else ""
    if name in ("--help", "-h"):
        print(__doc__.strip())
        return
    if name in _OF_ITS_OWN:
        _OF_ITS_OWN[name](arguments[1:])
        return
    if name not in SETTINGS:
        known = [*SETTINGS, *_OF_ITS_OWN]
        close = difflib.get_close_matches(name, known, n=1)
        advice = f"did you mean {close[0]}?" if close else f"give one of {', '.join(known)}, or --help."
        raise ValueError(
            f"{name!r} is nothing to measure; {advice}" if name else f"there is nothing to measure; {advice}"
        )
    groups = {"benchmark": _flags(SETTINGS[name]), "network": Network, "run": Options}
    flags, network, options = parse(f"layerskip-moe bench {name}", __doc__, groups, arguments[1:])
    settings = SETTINGS[name](**_values(SETTINGS[name], vars(flags)))
    device = pick_device(options.device)
    if options.threads is not None:
        if options.threads < 1:
            raise ValueError(f"threads={options.threads} must be 1 or more.")
        torch.set_num_threads(options.threads)
    model = load_network(network, device)
    result = {
        "command": shlex.join(["layerskip-moe", "bench", *arguments]),
        "machine": describe_machine(device, also=_PEER_PACKAGES),
        "network": describe_network(network, model),
        "settings": plain(settings),
        **_measure(name, model, network, settings),
    }
    print(result_text(result))
    if options.out is not None:
        with replacing(Path(options.out)) as beside:
            beside.write_text(json.dumps(plain(result), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    if options.plot is not None:
        save_figure(benchmark_figure(result), options.plot)


def _measure(name: str, model: MoEDecoder, network: Network, settings: Any) -> dict[str, Any]:
    if name == "prefill":
        return prefill_benchmark(model, network, settings)
    if name == "train":
        return train_benchmark(model, network, settings)
    if name == "memory":
        return memory_benchmark(model, network.seed, settings)
    result = decode_benchmark(model, network, settings)
    if settings.scaling:
        result["scaling"] = scaling(model, settings.repeats, seed=network.seed, compile=settings.compile)
    if settings.first_token:
        result["first_token"] = first_token(model, settings.precisions, settings.prompt_tokens, seed=network.seed)
    return result


def _flags(kind: type) -> type:
    """The dataclass with its lists as words between commas, as `hf,llama-cpp` is."""
    lists: dict[str, Any] = {
        field.name: (str, ",".join(field.default)) for field in fields(kind) if isinstance(field.default, tuple)
    }
    return fields_of(kind, **lists)


def _values(kind: type, flags: dict[str, Any]) -> dict[str, Any]:
    """The flags' values with those words as tuples; ValueError for a word that does not exist."""
    values = dict(flags)
    for name, hint in typing.get_type_hints(kind).items():
        if typing.get_origin(hint) is not tuple:
            continue
        words = tuple(word.strip() for word in flags[name].split(",") if word.strip())
        known = typing.get_args(typing.get_args(hint)[0])
        for word in words:
            if word not in known:
                raise ValueError(f"--{name} {flags[name]} does not fit: it is any of {', '.join(known)}, with commas.")
        values[name] = words
    return values
