"""The names that decoding strategies have in the shell, their flags, and the strategy that these describe.

Knows nothing of prompts. Next: `generate.py`; the strategies themselves are in `generation/`.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

from tyro.conf import arg

from layerskip_moe.cli.flags import fields_of
from layerskip_moe.generation import Autoregressive, EarlyExit, LayerSkipping, SelfSpeculative, Speculative, Strategy
from layerskip_moe.nn import MoEDecoder

StrategyName = Literal["autoregressive", "self-speculative", "speculative", "early-exit", "layer-skipping"]

_EXIT_LAYER = "layers that draft, 1..L; None: a fifth of them"
_EVERY = "leave out every n-th layer, 2 or more; 4 where none of these three is given"


@dataclass(frozen=True)
class _SpeculativeFlags:
    """`Speculative`, its draft model by the folder it is in.

    Attributes:
        draft_checkpoint: folder of the saved model that drafts, with the same tokenizer
        draft_length: tokens drafted per round, 1 or more
        coupling: "shared": the text is plain decoding's; "rejection": only its distribution is
    """

    draft_checkpoint: str
    draft_length: int = 4
    coupling: Literal["shared", "rejection"] = "shared"


def strategy_flags(name: str) -> type:
    """The dataclass whose fields are the flags of a strategy: the strategy's own, where a shell can say them.
    Raises ValueError for a name that is not one."""
    match name:
        case "autoregressive":
            return fields_of(Autoregressive)
        case "self-speculative":
            return fields_of(SelfSpeculative, exit_layer=(Annotated[int | None, arg(help=_EXIT_LAYER)], None))
        case "speculative":
            return _SpeculativeFlags
        case "early-exit":
            rules = Literal["softmax_diff", "state"]  # a function cannot be written in a shell
            return fields_of(EarlyExit, threshold=(float | str, 0.9), confidence=(rules, "softmax_diff"))
        case "layer-skipping":
            return fields_of(LayerSkipping, every=(Annotated[int | None, arg(help=_EVERY)], None))
    raise ValueError(f"--strategy {name} is unknown; it is one of {', '.join(get_args(StrategyName))}.")


def make_strategy(name: str, flags: Any, model: MoEDecoder) -> Strategy:
    """The strategy that these flags describe; what was left open follows from the model."""
    values = dict(vars(flags))
    n_layers = model.config.n_layers
    match name:
        case "autoregressive":
            return Autoregressive(**values)
        case "self-speculative":
            if values["exit_layer"] is None:
                values["exit_layer"] = max(n_layers // 5, 1)
            return SelfSpeculative(**values)
        case "speculative":
            draft = MoEDecoder.from_pretrained(values.pop("draft_checkpoint"), device=model.device)
            return Speculative(draft, **values)
        case "early-exit":
            return EarlyExit(**values)
        case "layer-skipping":
            if not values["layers"] and values["every"] is None and values["random"] is None:
                values["every"] = min(4, n_layers)
            return LayerSkipping(**values)
    raise AssertionError(f"strategy_flags refused {name}")
