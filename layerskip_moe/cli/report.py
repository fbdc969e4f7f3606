"""Measure a saved model whole, and write it down: report.md, report.json and figures in --out-dir.

    layerskip-moe report --checkpoint runs/main/model --out-dir runs/report
    layerskip-moe report --checkpoint runs/main/model --dataset wikitext-2 --out-dir runs/wikitext

The text is read with the tokenizer that is beside the model. Where the model lies in the folder of its training
run, as train leaves it, the report tells of the training too.
"""

# Next: `study.py`, which measures; `analysis/report.py`, which writes.

import shlex
from dataclasses import dataclass
from pathlib import Path

from layerskip_moe.analysis import write_report
from layerskip_moe.cli.flags import fields_of, parse
from layerskip_moe.cli.options import Precision, Text, load_saved
from layerskip_moe.study import StudyConfig, describe, study


@dataclass(frozen=True)
class Options:
    """Which model, and where its report goes.

    Attributes:
        checkpoint: folder of a model and its tokenizer, such as train's <out-dir>/model, or owner/name on the Hugging
            Face hub
        out_dir: folder of the report, made if need be
        device: cpu, cuda, cuda:1, ...; None: a GPU where there is one
        dtype: what to compute in; None: as the weights are stored
    """

    checkpoint: str
    out_dir: str = "runs/report"
    device: str | None = None
    dtype: Precision | None = None


def run(arguments: list[str]) -> None:
    """`layerskip-moe report`."""
    groups = {"model": Options, "text": Text, "study": fields_of(StudyConfig)}
    options, text, measured = parse("layerskip-moe report", __doc__, groups, arguments)
    config = StudyConfig(**vars(measured))
    model, corpus = load_saved(options.checkpoint, text, options.device, dtype=options.dtype, seed=config.seed)
    report = {
        "command": shlex.join(["layerskip-moe", "report", *arguments]),
        **describe(model, corpus),
        **study(model, corpus, config, progress=True),
    }
    # resolve: of a checkpoint that is given as ".", or by a link, the run is where it really lies.
    print(write_report(options.out_dir, report, run_dir=Path(options.checkpoint).resolve().parent))
