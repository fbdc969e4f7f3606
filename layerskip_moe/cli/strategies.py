"""The names that decoding strategies have in the shell, their flags, and the strategy that these describe.

Knows nothing of prompts. Next: `generate.py`; the strategies themselves are in `generation/`.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from tyro.conf import arg

from layerskip_moe.cli.flags import fields_of
from layerskip_moe.generation import (
    Autoregressive,
    EarlyExit,
    LayerSkipping,
    LookupSpeculative,
    PromptLookup,
    SelfSpeculative,
    SparseSpeculative,
    Speculative,
    Strategy,
)
from layerskip_moe.generation.sparse_speculative import Search
from layerskip_moe.nn import MoEDecoder
from layerskip_moe.pretrained import load_tokenizer
from layerskip_moe.pretrained.quantize import Quantization, quantize

if TYPE_CHECKING:
    from tokenizers import Tokenizer

StrategyName = Literal[
    "autoregressive",
    "self-speculative",
    "lookup-speculative",
    "prompt-lookup",
    "sparse-speculative",
    "speculative",
    "early-exit",
    "layer-skipping",
]

_CONFIDENCE = (
    '"softmax_diff", the two largest probabilities\' difference; "state", the cosine between the states before and '
    "after a layer, from layer 2 on"
)
_EXIT_LAYER = "layers that draft, 1..L; None: a fifth of them"
_EVERY = "leave out every n-th layer, 2 or more; 4 where none of these three is given"


@dataclass(frozen=True)
class _SelfSpeculativeFlags:
    """`SelfSpeculative`, its draft model by how it is made from the model.

    Attributes:
        exit_layer: layers that draft, 1..L; None: as many as pay, measured while decoding
        draft_length: tokens drafted per round, 1 or more; None: 4 where exit_layer is given
        coupling: "shared": the text is plain decoding's; "rejection": only its distribution is
        draft_quantization: int8 or int4: a copy of the model drafts whose weights are quantised so; None: the model
            itself, whose drafting layers need not run again at verification
        int8_drafts: True: drafts are made from int8 copies of the weights, on the model's own cache, by up to all L
            layers; None: where exit_layer is None, a CPU decodes, and the copies take 1 GiB or less
    """

    exit_layer: int | None = None
    draft_length: int | None = None
    coupling: Literal["shared", "rejection"] = "shared"
    draft_quantization: Quantization | None = None
    int8_drafts: bool | None = None


@dataclass(frozen=True)
class _SpeculativeFlags:
    """`Speculative`, its draft model by the folder it is in.

    Attributes:
        draft_checkpoint: folder of the saved model that drafts, with the same tokenizer
        draft_length: tokens drafted per round, 1 or more
        coupling: "shared": the text is plain decoding's; "rejection": only its distribution is
        exit_layer: layers of the draft model that draft; None: all
    """

    draft_checkpoint: str
    draft_length: int = 4
    coupling: Literal["shared", "rejection"] = "shared"
    exit_layer: int | None = None


def strategy_flags(name: str) -> type:
    """The dataclass whose fields are the flags of a strategy: the strategy's own, where a shell can say them.
    Raises ValueError for a name that is not one."""
    match name:
        case "autoregressive":
            return fields_of(Autoregressive)
        case "self-speculative":
            return _SelfSpeculativeFlags
        case "lookup-speculative":
            return fields_of(LookupSpeculative, exit_layer=(Annotated[int | None, arg(help=_EXIT_LAYER)], None))
        case "prompt-lookup":
            return fields_of(PromptLookup)
        case "sparse-speculative":
            return fields_of(SparseSpeculative, draft_layers=(tuple[int, ...] | Search | None, None))
        case "speculative":
            return _SpeculativeFlags
        case "early-exit":
            rules = Literal["softmax_diff", "state"]  # a function cannot be written in a shell
            confidence = (Annotated[rules, arg(help=_CONFIDENCE)], "softmax_diff")
            return fields_of(EarlyExit, threshold=(float | str, 0.9), confidence=confidence)
        case "layer-skipping":
            return fields_of(LayerSkipping, every=(Annotated[int | None, arg(help=_EVERY)], None))
    raise ValueError(f"--strategy {name} is unknown; it is one of {', '.join(get_args(StrategyName))}.")


def make_strategy(name: str, flags: Any, model: MoEDecoder, tokenizer: "Tokenizer") -> Strategy:
    """The strategy that these flags describe; what was left open follows from the model.

    tokenizer: the model's. Raises ValueError for a draft model with another one, and as the strategies do.
    """
    values = dict(vars(flags))
    n_layers = model.config.n_layers
    if name == "lookup-speculative" and values["exit_layer"] is None:
        values["exit_layer"] = max(n_layers // 5, 1)
    match name:
        case "autoregressive":
            return Autoregressive(**values)
        case "self-speculative":
            quantization = values.pop("draft_quantization")
            draft = None if quantization is None else quantize(model, quantization)
            return SelfSpeculative(**values, draft_model=draft)
        case "lookup-speculative":
            return LookupSpeculative(**values)
        case "prompt-lookup":
            return PromptLookup(**values)
        case "sparse-speculative":
            return SparseSpeculative(**values)
        case "speculative":
            folder = values.pop("draft_checkpoint")
            # With other tokens every draft would be wrong, and decoding slow, with nothing to show why.
            if load_tokenizer(folder).get_vocab() != tokenizer.get_vocab():
                raise ValueError(
                    f"the draft model in {folder} has another tokenizer than the model; give one that was trained with "
                    "the model's own, by train --tokenizer <checkpoint>/tokenizer.json."
                )
            return Speculative(MoEDecoder.from_pretrained(folder, device=model.device), **values)
        case "early-exit":
            return EarlyExit(**values)
        case "layer-skipping":
            if not values["layers"] and values["every"] is None and values["random"] is None:
                if n_layers < 2:
                    raise ValueError("layer-skipping needs a model of 2 layers or more, and this one has 1.")
                values["every"] = min(4, n_layers)
            return LayerSkipping(**values)
    raise AssertionError(f"strategy_flags refused {name}")
