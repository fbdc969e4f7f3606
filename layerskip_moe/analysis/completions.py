"""Completions for the harnesses of the field: `generate` over many prompts, behind a progress bar, with their stops.

Their tasks name special tokens among the stop strings ("</s>", "<file_sep>"). No text shows a special token, so these
are looked for as ids, and the others in the text.
Knows nothing of tasks or files. Next: `lm_eval.py` and `bigcode.py`, which do.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from layerskip_moe.generation import Generation, Strategy, generate
from layerskip_moe.generation.text import unshown_token
from layerskip_moe.nn import MoEDecoder
from layerskip_moe.pretrained.tokenizer import special_roles

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def complete(
    model: MoEDecoder,
    tokenizer: "Tokenizer",
    prompts: Sequence[Sequence[int]],
    strategy: Strategy | None,
    *,
    stop_strings: Iterable[str],
    stop_tokens: Iterable[int],
    batch_size: int,
    description: str,
    progress: bool,
    **settings: Any,
) -> Generation:
    """`generate` with these settings; stop_strings may hold special tokens, and empty strings, which stop nothing."""
    texts, tokens = [], set(stop_tokens)
    for stop in filter(None, stop_strings):
        token = unshown_token(tokenizer, stop)
        if token is None:
            texts.append(stop)
        else:
            tokens.add(token)
    with tqdm(total=len(prompts), desc=description, unit="prompt", disable=not progress) as bar:

        def on_token(row: int, token: int) -> None:
            bar.update(row // batch_size * batch_size - bar.n)  # the batches before this row's are done

        found = generate(
            model,
            prompts,
            strategy,
            stop_strings=texts,
            stop_tokens=tokens,
            tokenizer=tokenizer,
            batch_size=batch_size,
            on_token=on_token,
            **settings,
        )
        bar.update(len(prompts) - bar.n)
    return found


def beginning_of_text(tokenizer: "Tokenizer") -> list[int]:
    """The id that begins a text, by its usual names among the tokenizer's special tokens; empty where there is none."""
    token = tokenizer.token_to_id(special_roles(tokenizer).get("bos_token", ""))
    return [] if token is None else [token]
