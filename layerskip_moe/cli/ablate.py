"""Train many variants of one network and recipe, each with several seeds, and tell what each change costs and buys.

    layerskip-moe ablate                                        # all of it, sized for two hours on two cores
    layerskip-moe ablate --no-timing                            # trainings alone: the same without it then times them
    layerskip-moe ablate --variants paper drafting+coherence-0.1 --seeds 0 1
    layerskip-moe ablate --n-layers 4 --d-model 96 --max-steps 100 --out-dir runs/small

Variants, of which several may be joined by +: base, paper, drafting, all-exits, gradual, distilled, coherence-0.1,
coherence-0.5, average-0.5, average-0.7, hold-2, hold-4, every-other, first-half, last-half, expert-dropout, shared,
deep, wide. A run that is finished is not made again, and one that was stopped goes on: give the same command once more.
"""

# Any field of ModelConfig and TrainConfig is the base's, which the variants change. Next: `ablation/variants.py`.

import dataclasses
import shlex
import sys
from dataclasses import dataclass
from typing import Annotated, Any

from tyro.conf import arg

from layerskip_moe.ablation import DecodingConfig, MeasureConfig, ablate, named_variants, usual_variants
from layerskip_moe.cli.flags import fields_of, parse
from layerskip_moe.cli.options import Text, load_text
from layerskip_moe.constants import pick_device
from layerskip_moe.nn import ModelConfig
from layerskip_moe.training import TrainConfig

_VOCAB_SIZE = "ids of the tokenizer, at most; the model has as many as there are"
_DENSE_D_FF = "hidden width of layers without experts; None: top_k times that of an expert"
# A network and a recipe of about a minute on two cores.
_NETWORK: dict[str, tuple[Any, Any]] = {
    "vocab_size": (Annotated[int, arg(help=_VOCAB_SIZE)], 2048),
    "d_model": (int, 192),
    "n_kv_heads": (int | None, 2),
    "d_ff": (int | None, 192),
    "dense_d_ff": (Annotated[int | None, arg(help=_DENSE_D_FF)], None),
}
_RECIPE: dict[str, tuple[Any, Any]] = {
    "max_steps": (int | None, 200),
    "seq_len": (int, 128),
    "batch_size": (int, 8),
    "learning_rate": (float, 3e-3),
    "exit_rotation": (int, 4),
    "validate_every": (int | None, 0),
    "validation_windows": (int, 8),
}


@dataclass(frozen=True)
class Options:
    """Which runs, and where they are kept.

    Attributes:
        out_dir: folder of ablation.json, ablation.md, figures and runs/<variant>/seed<n>
        variants: those to train beside the base; none given: all, and a few combinations
        seeds: of first weights, batches and dropout
        timing: when all are trained, time decoding of each, for which the machine must do nothing else
        device: cpu, cuda, cuda:1, ...; None: a GPU where there is one
    """

    out_dir: str = "runs/ablation"
    variants: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)
    timing: bool = True
    device: str | None = None


def run(arguments: list[str]) -> None:
    """`layerskip-moe ablate`."""
    groups = {
        "ablation": Options,
        "text": Text,
        "model": fields_of(ModelConfig, without=("rope_scaling",), **_NETWORK),
        "training": fields_of(TrainConfig, without=("seed",), **_RECIPE),
        "measures": fields_of(MeasureConfig),
        "decoding": fields_of(DecodingConfig),
    }
    options, text, network, training, measured, timed = parse("layerskip-moe ablate", __doc__, groups, arguments)
    config, recipe = ModelConfig(**vars(network)), TrainConfig(**vars(training))  # refused before any text is read
    if network.dense_d_ff is None:
        config = dataclasses.replace(config, dense_d_ff=config.top_k * config.expert_d_ff)
    measures, decoding = MeasureConfig(**vars(measured)), DecodingConfig(**vars(timed))
    named_variants(options.variants, usual_variants(config))  # likewise
    device = pick_device(options.device)
    corpus = load_text(text, "bpe", vocab_size=config.vocab_size)
    config = dataclasses.replace(config, vocab_size=corpus.vocab_size)
    path = ablate(
        corpus,
        config,
        recipe,
        named_variants(options.variants, usual_variants(config)),
        options.out_dir,
        seeds=options.seeds,
        measures=measures,
        decoding=decoding,
        timing=options.timing,
        device=device,
        command=shlex.join(["layerskip-moe", "ablate", *arguments]),
    )
    if not options.timing:
        print(
            "trained, not timed: give the same command without --no-timing, and leave it the machine", file=sys.stderr
        )
    print(path)
