"""Record what every exit would say, in a file that drafting policies are compared on without decoding again.

    layerskip-moe trace --checkpoint runs/main/model --out runs/trace.npz
    layerskip-moe trace --checkpoint runs/main/model --out story.npz --prompts story.txt --temperatures 0.8
    layerskip-moe bench policies --trace runs/trace.npz

Held-out prompts are continued plainly, greedily and sampled, and held-out text is read as it stands: at each position,
for each layer, the token it says, how sure it is, and where the routers sent it. Where drafts can be made from int8
copies of the weights, what those would draft is recorded, too.
"""

# Next: `analysis/record_trace.py`, which does it; `bench_policies.py`, which reads the file.

import shlex
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from layerskip_moe.analysis.record_trace import record_texts
from layerskip_moe.analysis.trace import Trace, save_trace
from layerskip_moe.bench.contenders import fit_costs
from layerskip_moe.bench.machine import describe_machine
from layerskip_moe.cli.flags import parse
from layerskip_moe.cli.options import Precision, Text, cut_prompts, load_network, load_text
from layerskip_moe.generation.policies.exits import MOST_DRAFTS
from layerskip_moe.nn.fingerprint import model_fingerprint
from layerskip_moe.pretrained import load_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True)
class Options:
    """Which model, on what.

    Attributes:
        checkpoint: folder of a model and its tokenizer, such as train's <out-dir>/model, or owner/name on the Hugging
            Face hub
        out: the .npz to write
        prompts: a text that prompts and held-out texts are cut from: a file (one document; .jsonl and .parquet hold one
            per line or row), or a folder of .txt, .md, .py, .jsonl and .parquet; None: the held-out part of the dataset
        num_prompts: how many prompts are continued, at each temperature
        prompt_length: tokens of each
        max_new_tokens: tokens decoded after it
        temperatures: 0 is greedy
        num_windows: held-out texts that are read as they stand
        window_length: tokens of each, 2 or more
        int8_length: how many drafts from int8 copies are recorded of a round, where `Adaptive` makes copies; 0: none,
            which takes a fraction of the time
        seed: of the draw of the texts, and of sampling
        device: cpu, cuda, cuda:1, ...; None: a GPU where there is one
        dtype: what to compute in; None: as the weights are stored
    """

    checkpoint: str
    out: str
    prompts: str | None = None
    num_prompts: int = 20
    prompt_length: int = 32
    max_new_tokens: int = 128
    temperatures: tuple[float, ...] = (0.0, 0.8)
    num_windows: int = 10
    window_length: int = 128
    int8_length: int = MOST_DRAFTS
    seed: int = 0
    device: str | None = None
    dtype: Precision | None = None


def run(arguments: list[str]) -> None:
    """`layerskip-moe trace`."""
    options, text = parse("layerskip-moe trace", __doc__, {"trace": Options, "text": Text}, arguments)
    for name, least in (("num_prompts", 1), ("prompt_length", 1), ("num_windows", 0), ("window_length", 2)):
        if getattr(options, name) < least:
            raise ValueError(f"{name}={getattr(options, name)} must be {least} or more.")
    tokenizer = load_tokenizer(options.checkpoint)  # before the weights, which take longer
    prompts, held_out = _texts(options, text, tokenizer)
    model = load_network(options.checkpoint, options.device, options.dtype)
    texts = record_texts(
        model,
        prompts,
        held_out,
        max_new_tokens=options.max_new_tokens,
        temperatures=options.temperatures,
        seed=options.seed,
        int8_length=options.int8_length,
    )
    cost_model, int8_cost_model = fit_costs(model)
    about = {
        "command": shlex.join(["layerskip-moe", "trace", *arguments]),
        "checkpoint": options.checkpoint,
        "fingerprint": model_fingerprint(model),
        "text": options.prompts or text.dataset,
        "machine": describe_machine(model.device),
        "cost_model": asdict(cost_model),
        "int8_cost_model": None if int8_cost_model is None else asdict(int8_cost_model),
    }
    save_trace(Trace(texts, model.config, about), options.out)
    print(
        f"{len(prompts)} prompts of {options.prompt_length} tokens, continued by {options.max_new_tokens} at each of "
        f"{len(options.temperatures)} temperatures, and {len(held_out)} texts of {options.window_length} tokens"
    )
    print(options.out)


def _texts(options: Options, text: Text, tokenizer: "Tokenizer") -> tuple[list[list[int]], list[list[int]]]:
    """Prompts, and texts to be read, none of which overlaps another of its kind."""
    wanted = ((options.num_prompts, options.prompt_length), (options.num_windows, options.window_length))
    if options.prompts is None:
        corpus = load_text(text, tokenizer)
        prompts, held_out = (
            corpus.validation_prompts(count, length, seed=options.seed) if count else [] for count, length in wanted
        )
        return prompts, held_out
    prompts, held_out = (
        [tokens for _, tokens in cut_prompts(options.prompts, tokenizer, count, length, seed=options.seed)]
        for count, length in wanted
    )
    return prompts, held_out
