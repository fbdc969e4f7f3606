"""Count what the processes of a training step send each other, beside what FSDP and expert parallelism need on paper.

    layerskip-moe bench communication
    layerskip-moe bench communication --processes 4 --expert-parallel 2 --n-layers 4 --d-model 64
    layerskip-moe bench communication --precision bfloat16

The processes run on this machine's CPU; numbers of calls and bytes are the same on GPUs. Calls are added up over all
processes, and so are bytes, of the whole tensor that a call puts together or takes apart.
"""

# Next: `bench/communication.py`, which counts.

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from layerskip_moe.bench.communication import CommunicationSettings, communication, communication_text
from layerskip_moe.cli.flags import fields_of, parse
from layerskip_moe.files import plain, replacing
from layerskip_moe.nn import ModelConfig


@dataclass(frozen=True)
class Options:
    """Where the result goes.

    Attributes:
        out: a JSON file for the result
    """

    out: str | None = None


def run(arguments: list[str]) -> None:
    """`layerskip-moe bench communication`."""
    small = {
        "vocab_size": (Annotated[int, arg(help="V, ids of the tokenizer")], 256),
        "n_layers": (Annotated[int, arg(help="L, layers")], 4),
        "d_model": (Annotated[int, arg(help="D, width")], 64),
        "d_ff": (Annotated[int, arg(help="F, hidden width of an expert")], 64),
    }
    groups = {
        "processes": fields_of(CommunicationSettings),
        "model": fields_of(ModelConfig, without=("rope_scaling",), **small),
        "result": Options,
    }
    flags, network, options = parse("layerskip-moe bench communication", __doc__, groups, arguments)
    settings, config = CommunicationSettings(**vars(flags)), ModelConfig(**vars(network))
    result = {
        "command": shlex.join(["layerskip-moe", "bench", "communication", *arguments]),
        "settings": plain(settings),
        "config": plain(config),
        **communication(config, settings),
    }
    print(communication_text(result))
    if options.out is not None:
        with replacing(Path(options.out)) as beside:
            beside.write_text(json.dumps(plain(result), indent=1, allow_nan=False) + "\n", encoding="utf-8")
