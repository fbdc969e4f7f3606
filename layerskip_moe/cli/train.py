"""Train a decoder by the LayerSkip recipe, and save it to <out-dir>/model with its tokenizer.

    layerskip-moe train --n-layers 4 --max-steps 100
    layerskip-moe train --dataset my_notes/ --vocab-size 2048 --out-dir runs/notes
    layerskip-moe train --out-dir runs/notes --resume
    torchrun --standalone --nproc_per_node=8 -m layerskip_moe train --batch-size 64      # on eight GPUs

Ctrl-C finishes the step at hand and saves. A run that is resumed must be given the settings it was begun with.
"""

# The fields of ModelConfig and TrainConfig are flags side by side, by their own names: no name is in both.
# Next: `training/loop.py`; `generate.py`, for what was trained.

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from layerskip_moe.cli.flags import fields_of, parse
from layerskip_moe.cli.options import Text, load_text
from layerskip_moe.constants import pick_device
from layerskip_moe.nn import ModelConfig, MoEDecoder
from layerskip_moe.training import TrainConfig, check_new_run, finish_run, train
from layerskip_moe.training.parallel import join

_VOCAB_SIZE = "ids of the tokenizer, at most; the model has as many as there are"
_SEED = "of the first weights, the share of the text, batches and dropout"


@dataclass(frozen=True)
class Options:
    """Where a run is kept.

    Attributes:
        out_dir: folder of the run: metrics.jsonl, checkpoints/ and, at the end, model/; a finished run there is
            replaced, a stopped one only resumed
        resume: go on from the newest whole one of <out-dir>/checkpoints
        tokenizer: bpe or unigram, trained on the text; or the path of a tokenizer.json
        device: cpu, cuda, cuda:1, ...; None: a GPU where there is one
    """

    out_dir: str = "runs/train"
    resume: bool = False
    tokenizer: str = "bpe"
    device: str | None = None


def run(arguments: list[str]) -> None:
    """`layerskip-moe train`."""
    groups = {
        "run": Options,
        "text": Text,
        "model": fields_of(
            ModelConfig, without=("rope_scaling",), vocab_size=(Annotated[int, arg(help=_VOCAB_SIZE)], 4096)
        ),
        "training": fields_of(TrainConfig, seed=(Annotated[int, arg(help=_SEED)], 0)),
    }
    options, text, network, recipe = parse("layerskip-moe train", __doc__, groups, arguments)
    config, recipe = ModelConfig(**vars(network)), TrainConfig(**vars(recipe))  # refused before any text is read
    device = pick_device(options.device)
    if not options.resume:
        check_new_run(options.out_dir)  # which `train` asks for too, after the text is read
    ranks = join(device)  # the processes of a torchrun; else this one alone
    with ranks.one_per_machine_first():
        corpus = load_text(text, options.tokenizer, vocab_size=config.vocab_size, seed=recipe.seed)
    config = dataclasses.replace(config, vocab_size=corpus.vocab_size)

    # Several processes divide it: whole, it need not fit their GPUs.
    model = MoEDecoder(config, seed=recipe.seed).to(device if ranks.size == 1 else "cpu")
    result = train(model, corpus, recipe, options.out_dir, resume=options.resume, finish=False)
    if not ranks.is_first:
        return
    folder = Path(options.out_dir) / "model"
    model.save_pretrained(folder, tokenizer=corpus.tokenizer, recipe={"corpus": corpus.name, **result.recipe})
    finish_run(options.out_dir)
    held_out = f", held-out perplexity {result.validation[-1]:.1f}" if result.validation else ""
    skipped = f", {result.skipped_steps} of them skipped," if result.skipped_steps else ""
    print(f"{result.steps} steps{skipped} in {result.seconds:.0f} s{held_out}; the model is in {folder}")
