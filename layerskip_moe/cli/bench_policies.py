"""Compare drafting policies on a trace: the same rounds for all of them, and seconds by a cost model.

    layerskip-moe trace --checkpoint runs/main/model --out runs/trace.npz
    layerskip-moe bench policies --trace runs/trace.npz --out runs/policies
    layerskip-moe bench policies --trace runs/trace.npz --checkpoint runs/main/model --check

Beside them stand the best fixed pair of exit layer and draft length, and oracles that know the future. Without a
checkpoint nothing is timed, and the same command prints the same numbers again.
"""

# Next: `bench/policies.py`, which compares; `bench/policy_tables.py`, which says what the columns mean.

import json
import shlex
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from layerskip_moe.analysis.figures import policy_map, save_figure
from layerskip_moe.analysis.trace import Trace, load_trace
from layerskip_moe.bench.contenders import fit_costs
from layerskip_moe.bench.machine import describe_machine
from layerskip_moe.bench.policies import compare_policies
from layerskip_moe.bench.policies_check import check_policies
from layerskip_moe.bench.policy_tables import policies_markdown, policies_text
from layerskip_moe.cli.flags import parse
from layerskip_moe.cli.options import Precision, load_network
from layerskip_moe.files import plain, replacing
from layerskip_moe.generation.cost_model import CostModel
from layerskip_moe.nn import MoEDecoder
from layerskip_moe.nn.fingerprint import model_fingerprint


@dataclass(frozen=True)
class Options:
    """Which trace, and what is done with it.

    Attributes:
        trace: a file that `layerskip-moe trace` wrote
        checkpoint: the trace's model: the cost model is fitted anew, on this machine; None: the trace's own, of the
            machine that it was recorded on
        check: decode the trace's prompts for real, with every policy; takes a checkpoint
        max_draft_length: of the fixed pairs, which are tried at every exit layer; int8 ones as far as they are recorded
        resamples: of the prompts, for the 95% intervals
        seed: of these
        out: folder for policies.json, policies.md and policies.png
        device: cpu, cuda, cuda:1, ...; None: a GPU where there is one
        dtype: what to compute in, as for the trace; None: as the weights are stored
    """

    trace: str
    checkpoint: str | None = None
    check: bool = False
    max_draft_length: int = 10
    resamples: int = 10_000
    seed: int = 0
    out: str | None = None
    device: str | None = None
    dtype: Precision | None = None


def run(arguments: list[str]) -> None:
    """`layerskip-moe bench policies`."""
    (options,) = parse("layerskip-moe bench policies", __doc__, {"policies": Options}, arguments)
    if options.check and options.checkpoint is None:
        raise ValueError("--check decodes for real, which takes the trace's model; give --checkpoint.")
    trace = load_trace(options.trace)
    if not trace.continuations():
        raise ValueError(f"{options.trace} holds no continuations, on which policies are compared; record some.")
    model = None if options.checkpoint is None else _model(options, trace)
    cost, int8_cost = _recorded_costs(options, trace) if model is None else fit_costs(model)
    result: dict[str, Any] = {
        "command": shlex.join(["layerskip-moe", "bench", "policies", *arguments]),
        "machine": trace.about["machine"] if model is None else describe_machine(model.device),
        "trace": trace.about,
        "cost_model": asdict(cost),
        "int8_cost_model": None if int8_cost is None else asdict(int8_cost),
        "comparisons": [],
    }
    for texts in trace.continuations().values():
        compared = compare_policies(
            texts,
            trace.config,
            cost,
            int8_cost=int8_cost,
            max_draft_length=options.max_draft_length,
            resamples=options.resamples,
            seed=options.seed,
        )
        report = compared.as_report()
        if options.check:
            assert model is not None, "it was asked for"
            report["check"] = [asdict(row) for row in check_policies(model, texts, compared.runs)]
        result["comparisons"].append(report)
    result = plain(result)
    print(policies_text(result))
    if options.out is not None:
        _write(Path(options.out), result)


def _recorded_costs(options: Options, trace: Trace) -> tuple[CostModel, CostModel | None]:
    """What recording measured; ValueError where the trace does not tell."""
    names = {field.name for field in fields(CostModel)}
    told, int8_told = (trace.about.get(name) for name in ("cost_model", "int8_cost_model"))
    known = [isinstance(one, dict) and one.keys() == names for one in (told, int8_told)]
    if not isinstance(trace.about.get("machine"), dict) or not known[0] or not (known[1] or int8_told is None):
        raise ValueError(
            f"{options.trace} does not tell what its model's rounds cost, and on which machine; give --checkpoint, to "
            "measure it."
        )
    return CostModel(**told or {}), None if int8_told is None else CostModel(**int8_told)


def _model(options: Options, trace: Trace) -> MoEDecoder:
    """The checkpoint's model; ValueError where it is not the trace's."""
    assert options.checkpoint is not None
    model = load_network(options.checkpoint, options.device, options.dtype)
    if model_fingerprint(model) != trace.about["fingerprint"]:
        raise ValueError(
            f"{options.trace} was recorded with another model, of {trace.about['checkpoint']}, or in another --dtype; "
            f"give that one, or record a trace of {options.checkpoint}."
        )
    return model


def _write(folder: Path, result: dict[str, Any]) -> None:
    """policies.json, policies.md and policies.png, each in one piece."""
    result["figures"] = {}
    if len(result["comparisons"][0]["exit_layers"]) > 1:
        result["figures"] = {"policies": "policies.png"}
        save_figure(policy_map(result["comparisons"]), folder / "policies.png")
    told = {
        "policies.json": json.dumps(result, indent=1, allow_nan=False) + "\n",
        "policies.md": policies_markdown(result),
    }
    for name, text in told.items():
        with replacing(folder / name) as beside:
            beside.write_text(text, encoding="utf-8")
