"""Continue a prompt; the text streams to standard output as it comes.

    layerskip-moe generate --checkpoint runs/main/model --prompt "def "
    layerskip-moe generate --checkpoint runs/main/model --prompt "def " --strategy early-exit --threshold 0.9
    layerskip-moe generate --checkpoint runs/main/model --prompt - --strategy self-speculative --json < story.txt

Every strategy has options of its own: `--strategy NAME --help` lists them. A prompt that begins with -- is written
--prompt="--...".
"""

# Next: `strategies.py`, `streaming.py`; `generation/generate.py` does the work.

import dataclasses
import os
import sys
from dataclasses import dataclass
from typing import Any, Literal

from layerskip_moe.cli.flags import fields_of, parse, value_of
from layerskip_moe.cli.options import Precision, json_line, load_network
from layerskip_moe.cli.strategies import StrategyName, make_strategy, strategy_flags
from layerskip_moe.cli.streaming import RoundByRound
from layerskip_moe.generation import Generation, GenerationStats, Sampling, generate
from layerskip_moe.generation.exit_classifier import ExitClassifier
from layerskip_moe.generation.text import TextStream
from layerskip_moe.pretrained import load_tokenizer, stop_tokens

GREEN, PLAIN = "\x1b[32m", "\x1b[0m"


@dataclass(frozen=True)
class Options:
    """What is continued, and how it is shown.

    Attributes:
        checkpoint: folder of a model and its tokenizer, such as train's <out-dir>/model, or owner/name on the Hugging
            Face hub
        prompt: the text to continue; - reads all of standard input, to its last line break
        strategy: how to decode; each has options of its own
        max_new_tokens: tokens to add, at most
        stop_strings: the text ends before the first of these
        stop_tokens: ids, and the text ends before the first of these; None: the checkpoint's end of text. Special
            tokens, which no text shows, can be stopped at only so
        device: cpu, cuda, cuda:1, ...; None: a GPU where there is one
        dtype: what to compute in; None: as the weights are stored
        color: drafts that were accepted in green; auto: where standard output is a terminal and NO_COLOR is not set
        json: print nothing but one JSON object, with text, tokens, layers run per token, and statistics
    """

    checkpoint: str
    prompt: str
    strategy: StrategyName = "autoregressive"
    max_new_tokens: int = 128
    stop_strings: tuple[str, ...] = ()
    stop_tokens: tuple[int, ...] | None = None
    device: str | None = None
    dtype: Precision | None = None
    color: Literal["auto", "always", "never"] = "auto"
    json: bool = False


def run(arguments: list[str]) -> None:
    """`layerskip-moe generate`."""
    name = value_of("--strategy", arguments) or "autoregressive"
    groups = {"text": Options, "sampling": fields_of(Sampling), "decoding": strategy_flags(name)}
    options, sampling, flags = parse(f"layerskip-moe generate --strategy {name}", __doc__, groups, arguments)
    Sampling(**vars(sampling))  # refused before anything is loaded
    prompt = _read(options.prompt)
    tokenizer = load_tokenizer(options.checkpoint)  # before the weights, which take longer
    model = load_network(options.checkpoint, options.device, options.dtype)
    strategy = make_strategy(name, flags, model, tokenizer)

    text = TextStream(tokenizer, options.stop_strings)
    colored = _is_colored(options.color)

    def show(token: int, accepted: bool) -> None:
        piece = text.push(token)
        print(f"{GREEN}{piece}{PLAIN}" if colored and accepted and piece else piece, end="", flush=True)

    settings: dict[str, Any] = vars(sampling) | {
        "max_new_tokens": options.max_new_tokens,
        "stop_strings": options.stop_strings,
        "stop_tokens": stop_tokens(options.checkpoint) if options.stop_tokens is None else options.stop_tokens,
        "tokenizer": tokenizer,
    }
    if options.json:
        out = generate(model, [prompt], strategy, **settings)
        described = {"name": name} | {field: getattr(strategy, field, value) for field, value in vars(flags).items()}
        if isinstance(described.get("confidence"), ExitClassifier):  # a calibration's; its probes are no JSON
            described["confidence"] = "classifier"
        print(json_line(_told(prompt, out, described)))
        return
    rounds = RoundByRound(strategy, show)
    out = generate(model, [prompt], rounds, on_token=rounds.on_token, **settings)
    print(text.finish())
    print(_summary(out.stats, model.config.n_layers), file=sys.stderr)


def _read(prompt: str) -> str:
    try:
        text = sys.stdin.read() if prompt == "-" else prompt
        text.encode()  # bytes that are no text come through as lone surrogates
    except UnicodeError:
        raise ValueError("the prompt is not text in UTF-8; convert it first.") from None
    return text


def _is_colored(color: str) -> bool:
    return color == "always" or (color == "auto" and sys.stdout.isatty() and not os.environ.get("NO_COLOR"))


def _told(prompt: str, out: Generation, strategy: dict[str, Any]) -> dict[str, Any]:
    """layers_run: for each token, how many layers ran to choose it, which is its exit layer under early exit."""
    assert out.text is not None
    rates = ("drafted", "accepted", "acceptance_rate", "tokens_per_round", "mean_layers", "tokens_per_second")
    return {
        "prompt": prompt,
        "text": out.text[0],
        "tokens": out.tokens[0],
        "layers_run": out.layers_run[0],
        "strategy": strategy,
        "stats": dataclasses.asdict(out.stats) | {name: getattr(out.stats, name) for name in rates},
    }


def _summary(stats: GenerationStats, n_layers: int) -> str:
    drafts = f", {stats.acceptance_rate:.0%} of {stats.drafted} drafts accepted" if stats.drafted else ""
    layers = f"{stats.mean_layers:.1f} of {n_layers} layers per token"
    return f"{stats.generated} tokens, {stats.tokens_per_second:.1f} tokens/s, {layers}{drafts}"
