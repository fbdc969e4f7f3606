"""lm-evaluation-harness (EleutherAI's `lm_eval`, 0.4) over a MoEDecoder: its tasks, scored or generated here.

    from lm_eval import simple_evaluate
    from layerskip_moe.analysis.lm_eval import LayerSkipLM
    from layerskip_moe.pretrained import load_tokenizer, stop_tokens

    model, tokenizer, ends = MoEDecoder.from_pretrained(folder), load_tokenizer(folder), stop_tokens(folder)

    full = LayerSkipLM(model, tokenizer, stop_tokens=ends)
    early = LayerSkipLM(model, tokenizer, stop_tokens=ends, score_exit_layer=8)
    fast = LayerSkipLM(model, tokenizer, stop_tokens=ends, generation_strategy=SelfSpeculative(exit_layer=8))
    simple_evaluate(full, tasks=["hellaswag", "gsm8k"])
    simple_evaluate(early, tasks=["hellaswag"])
    simple_evaluate(fast, tasks=["gsm8k"])

The last two are different questions. `score_exit_layer` asks what the first n layers and the head think of a given
text. `generation_strategy` asks what text comes out; a strategy that speculates has no log-likelihood of its own.
Knows nothing of tasks and metrics, which are the harness's. Next: `log_likelihoods.py` and `completions.py`, which do
the work; `bigcode.py`, for the other harness.
"""

import json
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from layerskip_moe.analysis.completions import beginning_of_text, complete
from layerskip_moe.analysis.log_likelihoods import log_likelihoods
from layerskip_moe.generation import Autoregressive, SelfSpeculative, Speculative, Strategy
from layerskip_moe.generation.autoregressive import check_exit_layer
from layerskip_moe.nn import MoEDecoder
from layerskip_moe.pretrained.quantize import quantization_of
from layerskip_moe.special_tokens import end_of_text_ids

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        f"lm-evaluation-harness is not here ({missing}); install it by: pip install -e '.[lm-eval]'"
    ) from None

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from tokenizers import Tokenizer

_MAX_GEN_TOKS = 256  # of a task that does not say, as in the harness's own HFLM
_SAMPLING = ("top_k", "top_p", "repetition_penalty")

# What the harness scores: (the texts it came from, None for a window; the context's ids; the continuation's ids).
Scored = tuple[tuple[str, str] | None, list[int], list[int]]


class LayerSkipLM(TemplateLM):
    """A MoEDecoder as the harness's model; greedy results equal those of its HFLM on the same weights.

    That is so in float32, and with the stop_tokens that the checkpoint declares. In bfloat16 and float16 the two round
    differently: log-likelihoods are taken in float32 from the model's logits, which HFLM does not do by default. Texts
    beyond max_length lose their beginning, as in HFLM, with a warning. Sampled text follows `generate`'s noise, not
    torch's. A `Tokenizer` has no chat template: apply_chat_template=True fails with NotImplementedError.

    Attributes:
        model: run in eval mode, and left in the mode it was in
        tokenizer: the model's own; texts are encoded with the special tokens that it adds, such as a beginning of text
        score_exit_layer: whose log-likelihood is told, n in 1..L: that of the first n layers and the head; None: the
            full model's
        generation_strategy: what text is generated through; None: Autoregressive()
        batch_size: texts run together, which changes no result beyond rounding
        max_length: positions used at most; None: the model's max_seq_len. Rolling windows are this long.
        stop_tokens: ids that end a generated text, the first of them the harness's `eot_token_id`;
            `pretrained.stop_tokens` gives a checkpoint's. None: the tokenizer's, by their usual names and in their
            order, in which a chat model's own is not the first.
        prefix_token_id: what a text without context is scored after; None: the tokenizer's beginning of text, else the
            first of stop_tokens
        seed: of tasks that sample

    Raises ValueError where the model has no such exit layer or cannot be decoded by the strategy, for a max_length
    beyond the model's, and where the tokenizer has no end of text and stop_tokens is not given. A task that asks for
    the log-likelihood of a strategy that has none, or for text where only score_exit_layer is given, is refused with
    a ValueError too.
    """

    def __init__(
        self,
        model: MoEDecoder,
        tokenizer: "Tokenizer",
        *,
        score_exit_layer: int | None = None,
        generation_strategy: Strategy | None = None,
        batch_size: int = 8,
        max_length: int | None = None,
        stop_tokens: Sequence[int] | None = None,
        prefix_token_id: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if score_exit_layer is not None:
            check_exit_layer(score_exit_layer, model.config)
        if isinstance(generation_strategy, str | type):
            raise ValueError(
                f"generation_strategy={generation_strategy!r} is not a strategy; give an object, such as "
                "SelfSpeculative(exit_layer=2)."
            )
        if generation_strategy is not None:
            generation_strategy.check(model.config)
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be 1 or more.")
        longest = model.config.max_seq_len
        if max_length is not None and not 1 <= max_length <= longest:
            raise ValueError(f"max_length={max_length} must be between 1 and the model's max_seq_len={longest}.")
        stops = end_of_text_ids(tokenizer) if stop_tokens is None else list(stop_tokens)
        if not stops:
            raise ValueError("the tokenizer has no end of text by a usual name; give its id, as stop_tokens=[id].")
        if prefix_token_id is None:
            prefix_token_id = [*beginning_of_text(tokenizer), *stops][0]
        self.model, self.tokenizer = model, tokenizer
        self.score_exit_layer, self.generation_strategy = score_exit_layer, generation_strategy
        self.batch_size, self.max_length = batch_size, max_length or longest
        self.stop_tokens, self.seed = stops, seed
        self._prefix = prefix_token_id

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text."""
        return self.stop_tokens[0]

    @property
    def prefix_token_id(self) -> int:
        """What a text without context is scored after."""
        return self._prefix

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes beside its results: which model was asked, and which of the two questions."""
        strategy = self.generation_strategy
        settings = {} if strategy is None else vars(strategy)
        told = {name: _about(value) if isinstance(value, MoEDecoder) else value for name, value in settings.items()}
        if told.get("policy") is not None:
            told["policy"] = type(told["policy"]).__name__
        return {
            **{f"model_{name}": value for name, value in _about(self.model).items()},
            "score_exit_layer": self.score_exit_layer,
            "generation_strategy": strategy and {"name": type(strategy).__name__, **told},
        }

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids of a text, with the special tokens that the tokenizer adds, unless the text begins with its
        prefix token already, or as add_special_tokens says. ValueError for ids that the model does not have."""
        if add_special_tokens is None:
            prefix = self.tokenizer.decode([self.prefix_token_id], skip_special_tokens=False)
            add_special_tokens = not string.startswith(prefix)
        ids: list[int] = self.tokenizer.encode(string, add_special_tokens=add_special_tokens).ids
        vocab_size = self.model.config.vocab_size
        if max(ids, default=0) >= vocab_size:
            raise ValueError(
                f"The tokenizer gives token id {max(ids)}, beyond the model's vocabulary of {vocab_size}; use the "
                "tokenizer that the model was trained with."
            )
        return ids

    def loglikelihood_rolling(self, requests: list["Instance"], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in nats, each token predicted once from up to max_length before it."""
        windows: list[Scored] = []
        owners: list[int] = []  # which text each window is of
        for owner, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (log_likelihood, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[owner] += log_likelihood
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(
        self, requests: list[Scored], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether greedy decoding would say it) of every continuation after its context."""
        exit_layer = self._scored_layer()
        for texts, _context, continuation in requests:
            if not 1 <= len(continuation) <= self.max_length:
                raise ValueError(
                    f"the continuation of {texts} has {len(continuation)} tokens; between 1 and "
                    f"max_length={self.max_length} can be scored."
                )
        pairs = [(context or [self.prefix_token_id], continuation) for _, context, continuation in requests]
        _warn_of_cuts([len(context) + len(continuation) - 1 for context, continuation in pairs], self.max_length)
        answers = [(0.0, True)] * len(requests)
        found = log_likelihoods(
            self.model, pairs, exit_layer=exit_layer, batch_size=self.batch_size, max_length=self.max_length
        )
        for index, log_likelihood, greedy in tqdm(
            found, total=len(pairs), desc="log-likelihoods", unit="text", disable=disable_tqdm
        ):
            answers[index] = (log_likelihood, greedy)
            if requests[index][0] is not None:
                self.cache_hook.add_partial("loglikelihood", requests[index][0], answers[index])
        return answers

    def generate_until(self, requests: list["Instance"], disable_tqdm: bool = False) -> list[str]:
        """The text that the generation strategy gives after each context, up to the first of the task's stops.

        The task's generation_kwargs: until, max_gen_toks (256) and its other names, do_sample, temperature, top_k (0:
        all), top_p, repetition_penalty; what is not said is off. As in HFLM, top_k and top_p change no greedy text, and
        length_penalty no text of one beam. Raises ValueError for any other.
        """
        if self.score_exit_layer is not None and self.generation_strategy is None:
            raise ValueError(
                f"score_exit_layer={self.score_exit_layer} says how text is scored, not how it is generated; give "
                "generation_strategy= as well, such as Autoregressive(exit_layer=...)."
            )
        groups: dict[str, list[int]] = {}  # requests that are generated alike
        for index, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(index)
        texts = [""] * len(requests)
        for group in groups.values():
            contexts = [requests[index].args[0] for index in group]
            found = self._complete(contexts, requests[group[0]].args[1], disable_tqdm)
            for index, text in zip(group, found, strict=True):
                texts[index] = text
                self.cache_hook.add_partial("generate_until", requests[index].args, text)
        return texts

    def _complete(self, contexts: list[str], gen_kwargs: dict[str, Any], disable_tqdm: bool) -> list[str]:
        """The texts after some contexts, all by the same generation_kwargs."""
        settings: dict[str, Any] = {**normalize_gen_kwargs(gen_kwargs, _MAX_GEN_TOKS)}
        until, max_gen_toks = settings.pop("until"), settings.pop("max_gen_toks")
        temperature = settings.pop("temperature", 0.0)
        if settings.pop("do_sample") and temperature == 0:
            raise ValueError("do_sample=True needs a temperature above 0 in the task's generation_kwargs.")
        sampling = {name: settings.pop(name) for name in _SAMPLING if name in settings}
        if temperature == 0:  # nothing is drawn, and tasks write any value here
            sampling = {name: value for name, value in sampling.items() if name not in ("top_k", "top_p")}
        elif sampling.get("top_k") == 0:  # transformers' word for all
            del sampling["top_k"]
        if settings.get("num_beams", 1) == 1:
            settings = {name: value for name, value in settings.items() if name not in ("num_beams", "length_penalty")}
        if settings:
            raise ValueError(
                f"generation_kwargs has {', '.join(settings)}, which cannot be honoured; it may have until, "
                f"max_gen_toks, do_sample, temperature, {', '.join(_SAMPLING)}."
            )
        room = self.max_length - max_gen_toks
        if room < 1:
            raise ValueError(
                f"max_gen_toks={max_gen_toks} leaves no room for a prompt in max_length={self.max_length}; ask for "
                "less in the task's generation_kwargs."
            )
        prompts = [self.tok_encode(context) or [self.prefix_token_id] for context in contexts]
        _warn_of_cuts([len(prompt) for prompt in prompts], room)
        order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
        found = complete(
            self.model,
            self.tokenizer,
            [prompts[index][-room:] for index in order],
            self.generation_strategy,
            stop_strings=until,
            stop_tokens=self.stop_tokens,
            batch_size=self.batch_size,
            description="generating",
            progress=not disable_tqdm,
            max_new_tokens=max_gen_toks,
            temperature=temperature,
            seed=self.seed,
            **sampling,
        )
        assert found.text is not None
        return [text for _, text in sorted(zip(order, found.text, strict=True))]

    def _scored_layer(self) -> int:
        """Whose log-likelihood is asked for, 1..L; ValueError where that is not clear."""
        n_layers = self.model.config.n_layers
        match self.generation_strategy:
            case None | Autoregressive(exit_layer=None) | SelfSpeculative() | Speculative():
                return self.score_exit_layer or n_layers  # the text is the full model's: so is its log-likelihood
        if self.score_exit_layer is None:
            raise ValueError(
                f"{self.generation_strategy} writes text that is not the full model's, so it is not clear whose "
                f"log-likelihood is meant; say so by score_exit_layer= (the full model's: {n_layers})."
            )
        return self.score_exit_layer


def _about(model: MoEDecoder) -> dict[str, Any]:
    """What results tell of a model."""
    return {
        "num_parameters": model.parameter_counts()[0],
        "dtype": str(model.dtype),
        "quantization": quantization_of(model),
    }


def _warn_of_cuts(lengths: list[int], room: int) -> None:
    n_cut = sum(length > room for length in lengths)
    if n_cut:
        message = f"{n_cut} of {len(lengths)} texts are longer than {room} tokens and lose their beginning."
        warnings.warn(message, stacklevel=3)
