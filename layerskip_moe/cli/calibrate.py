"""Calibrate early exit: find thresholds whose mean loss is bounded, and write them to a JSON that decodes by them.

    layerskip-moe calibrate --checkpoint runs/main/model --tolerance 0.05 --risk 0.05
    layerskip-moe calibrate --checkpoint runs/main/model --consistency risk --confidence classifier --prompts story.txt
    layerskip-moe generate --checkpoint runs/main/model --prompt "def " --strategy early-exit \\
        --threshold runs/main/early_exit.json

Promised is this: with probability 1 - risk over the draw of the sequences, the mean loss of greedy decoding is at most
the tolerance, for prompts like these and as many new tokens as here. Shape, certificate and probes are of different
documents. A promise about new documents takes as many of them as sequences are needed to certify; with fewer, it is
about sequences drawn like these from the documents at hand.
"""

# Next: `analysis/calibrate.py`, which does it and says what exactly is promised.

import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import arg

from layerskip_moe.analysis.calibrate import NEW_DOCUMENTS, Calibration, calibrate_early_exit, prompts_needed
from layerskip_moe.analysis.consistency import Consistency
from layerskip_moe.analysis.document_split import split_documents
from layerskip_moe.analysis.train_classifier import train_classifier
from layerskip_moe.cli.flags import fields_of, parse
from layerskip_moe.cli.options import Precision, Text, cut_prompts, load_network, load_text
from layerskip_moe.generation import EarlyExit
from layerskip_moe.pretrained import load_tokenizer, stop_tokens

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_CONFIDENCE = (
    '"softmax_diff", the two largest probabilities\' difference; "state", the cosine between the states before and '
    'after a layer, from layer 2 on; "classifier", probes of the states, trained on documents of their own'
)


@dataclass(frozen=True)
class Options:
    """What is promised, of which model, on what.

    Attributes:
        checkpoint: folder of a model and its tokenizer, such as train's <out-dir>/model, or owner/name on the Hugging
            Face hub
        tolerance: the mean loss allowed, above 0 and below 1
        risk: how often the promise may fail, over the draw of the sequences, above 0 and below 1
        consistency: the loss of a sequence. textual: the share of places where early exit's text is not the full
            model's; token: the same, where each token is asked for after the full model's own text; risk: by how much
            more often than the full model it misses the next token of the true text
        prompts: a text that the sequences are cut from: a file (one document; .jsonl and .parquet hold one per line or
            row), or a folder of .txt, .md, .py, .jsonl and .parquet; None: the held-out part of the dataset
        sequences: how many, drawn by the seed from as many documents as there are; a quarter of them chooses the
            thresholds' shape, the others certify
        classifier_sequences: how many more, which train the probes of --confidence classifier
        prompt_length: tokens of each prompt
        max_new_tokens: tokens decoded after it
        exits: at how many layers a token may leave, evenly spaced; None: at every one, which is slower
        steps: scales of the shape to try, from never leaving on down
        batch_size: sequences decoded together
        seed: of the draw of the sequences
        out: the JSON to write, with the probes beside it; None: early_exit.json beside the checkpoint's folder
        device: cpu, cuda, cuda:1, ...; None: a GPU where there is one
        dtype: what to compute in; None: as the weights are stored
    """

    checkpoint: str
    tolerance: float = 0.05
    risk: float = 0.05
    consistency: Consistency = "textual"
    prompts: str | None = None
    sequences: int = 400
    classifier_sequences: int = 100
    prompt_length: int = 32
    max_new_tokens: int = 64
    exits: int | None = None
    steps: int = 12
    batch_size: int = 32
    seed: int = 0
    out: str | None = None
    device: str | None = None
    dtype: Precision | None = None


def run(arguments: list[str]) -> None:
    """`layerskip-moe calibrate`."""
    rules = Literal["softmax_diff", "state", "classifier"]
    confidence = (Annotated[rules, arg(help=_CONFIDENCE)], "softmax_diff")
    exits = fields_of(EarlyExit, without=("threshold",), confidence=confidence)
    groups = {"calibration": Options, "text": Text, "exits": exits}
    options, text, flags = parse("layerskip-moe calibrate", __doc__, groups, arguments)
    trains = flags.confidence == "classifier"
    named = "softmax_diff" if trains else flags.confidence
    strategy = EarlyExit(**{**vars(flags), "threshold": 1.0, "confidence": named})  # refused before anything is loaded
    needed = prompts_needed(options.tolerance, options.risk)
    if options.sequences < needed:
        raise ValueError(
            f"--sequences {options.sequences} are too few to certify anything: --tolerance {options.tolerance} at "
            f"--risk {options.risk} takes at least {needed}, a quarter of them for the shape, even without any loss."
        )
    tokenizer = load_tokenizer(options.checkpoint)
    more = options.classifier_sequences if trains else 0
    documents, sequences = _sequences(options, text, tokenizer, options.sequences + more)
    n_documents, told = len(set(documents)), {}
    model = load_network(options.checkpoint, options.device, options.dtype)
    if trains:
        probes, others = split_documents(documents, more, options.seed)
        classifier = train_classifier(model, [sequences[i] for i in probes], batch_size=options.batch_size)
        strategy = replace(strategy, confidence=classifier)
        told = {"classifier_sequences": len(probes), "classifier_documents": len({documents[i] for i in probes})}
        documents, sequences = [documents[i] for i in others], [sequences[i] for i in others]
    found = calibrate_early_exit(
        model,
        [tokens[: options.prompt_length] for tokens in sequences],
        strategy,
        references=[tokens[options.prompt_length :] for tokens in sequences],
        documents=documents,
        consistency=options.consistency,
        tolerance=options.tolerance,
        risk=options.risk,
        max_new_tokens=options.max_new_tokens,
        exits=options.exits,
        stop_tokens=stop_tokens(options.checkpoint),
        steps=options.steps,
        batch_size=options.batch_size,
        seed=options.seed,
    )
    out = _out(options)
    found.save(
        out,
        confidence=flags.confidence,
        checkpoint=options.checkpoint,
        text=options.prompts or text.dataset,
        text_documents=n_documents,
        **told,
        command=shlex.join(["layerskip-moe", "calibrate", *arguments]),
    )
    print(_told(found, model.config.n_layers, n_documents, told))
    print(out)


def _sequences(options: Options, text: Text, tokenizer: "Tokenizer", count: int) -> tuple[list[int], list[list[int]]]:
    """`count` stretches of held-out text, none overlapping another, each a prompt and what truly follows it; and
    before them the number of each one's document."""
    length = options.prompt_length + options.max_new_tokens
    if options.prompts is None:
        corpus = load_text(text, tokenizer)
        try:
            drawn = corpus.validation_stretches(count, length, seed=options.seed)
        except ValueError as error:
            raise ValueError(f"{_needed(options)} sequences, and {count} were asked for. {error}") from None
        return [document for document, _ in drawn], [tokens for _, tokens in drawn]
    fewer = f"fewer --sequences, of which {_needed(options)}, or shorter ones"
    drawn = cut_prompts(options.prompts, tokenizer, count, length, seed=options.seed, fewer=fewer)
    return [document for document, _ in drawn], [tokens for _, tokens in drawn]


def _needed(options: Options) -> str:
    least = prompts_needed(options.tolerance, options.risk)
    return f"--tolerance {options.tolerance} at --risk {options.risk} takes at least {least}"


def _out(options: Options) -> Path:
    """Where the JSON goes."""
    if options.out is not None:
        return Path(options.out)
    folder = Path(options.checkpoint).resolve()  # of ".", or of a link, the run is where it really lies
    return (folder.parent if folder.is_dir() else Path()) / "early_exit.json"


def _told(found: Calibration, n_layers: int, n_documents: int, probes: dict[str, int]) -> str:
    """n_documents: those that the sequences were drawn from; probes: what trained the classifier, if there is one."""
    loss = {"textual": "text that differs", "token": "tokens that differ", "risk": "more errors than the full model"}
    if found.scale == 1:
        first = "certified: nothing but the full model, so no layer is left early; try a larger --tolerance"
    else:
        first = f"certified: lambda {found.scale:.3g}"
    parts = f"shape: {found.shape_sequences} of {found.shape_documents}"
    if probes:
        parts += f"; probes: {probes['classifier_sequences']} of {probes['classifier_documents']}"
    lines = [
        first,
        f"promise: at most {found.tolerance:.3g} of {loss[found.consistency]} on average, at risk {found.risk:.3g}, "
        f"over {found.max_new_tokens} new tokens, greedy, for {found.holds_for}",
        f"on {found.sequences} sequences of {found.documents} of {n_documents} documents ({parts}): "
        f"{found.mean_loss:.4f}, p-value {found.p_value:.4f}, agreement with the full model {found.agreement:.1%}, "
        f"mean exit layer {found.mean_layers:.2f} of {n_layers}",
    ]
    if found.holds_for != NEW_DOCUMENTS:
        least = prompts_needed(found.tolerance, found.risk)
        lines.append(
            f"sequences share documents, and are not independent; for a promise about new documents give {least} "
            f"documents or more{', and some for the probes' if probes else ''}, by --dataset or a folder as --prompts"
        )
    return "\n".join(lines)
