"""Completions in the file that bigcode-evaluation-harness reads: code written here, tested there.

    python main.py --tasks humaneval --n_samples 20 --allow_code_execution --load_generations_path generations.json

The file is a JSON list with one entry per problem, in the data set's order: the list of its candidates, each a string.
With `load_generations_path` the harness hands these strings to its metric as they are. It neither puts the prompt
before them nor cuts them, so they must be what a task's `postprocess_generation` would have made:
- completion tasks (humaneval, humanevalplus, mbpp, multiple-*): the prompt, then the completion up to the first of the
  task's stop words. This is the default here.
- tasks whose answer stands alone (apps, conala, concode, ...): the completion without the prompt, `with_prompt=False`;
  what else a task does to its text, such as taking what follows "ANSWER:", is left to the caller.
Prompts and stop words are the task's own (`get_prompt`, `stop_words`); HUMANEVAL_STOPS are those of humaneval, whose
prompts are stripped (those of humaneval-unstripped are not).

Knows nothing of data sets, and runs no code that a model wrote. Next: `completions.py`.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from layerskip_moe.analysis.completions import complete
from layerskip_moe.files import replacing
from layerskip_moe.generation import Strategy, check_prompts
from layerskip_moe.nn import MoEDecoder
from layerskip_moe.special_tokens import end_of_text_ids

if TYPE_CHECKING:
    from tokenizers import Tokenizer

HUMANEVAL_STOPS = ("\nclass", "\ndef", "\n#", "\n@", "\nprint", "\nif", "\n```", "<file_sep>")


def write_generations(
    model: MoEDecoder,
    tokenizer: "Tokenizer",
    prompts: Sequence[str],
    path: str | Path,
    *,
    n_samples: int = 1,
    strategy: Strategy | None = None,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop_strings: Sequence[str] = HUMANEVAL_STOPS,
    stop_tokens: Sequence[int] | None = None,
    with_prompt: bool = True,
    batch_size: int = 8,
    progress: bool = True,
) -> list[list[str]]:
    """Write n_samples candidates for each prompt to `path`, and give them back.

    prompts:     one per problem, in the task's order
    strategy, max_new_tokens, temperature, top_k, top_p, seed: as in `generate`. Candidate c of prompt p is the text
                 of row p * n_samples + c, so candidates differ, and batch_size changes none of them.
    stop_strings: the task's stop words, special tokens among them too; a candidate ends before the first of them
    stop_tokens: ids that end a candidate as well; None: the tokenizer's end of text
    with_prompt: whether a candidate begins with its prompt; see above

    The file is written when all is generated, whole or not at all. Raises ValueError for n_samples below 1, for
    several samples of greedy text, which would all be the same, and for what `generate` refuses.
    """
    if isinstance(prompts, str) or isinstance(stop_strings, str):
        raise ValueError("prompts and stop_strings are lists; a single string goes in a list of one.")
    if n_samples < 1 or (n_samples > 1 and temperature == 0):
        raise ValueError(
            f"n_samples={n_samples} at temperature={temperature} cannot be drawn: it is 1, or more at a temperature "
            "above 0."
        )
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be 1 or more.")
    encoded = [tokenizer.encode(prompt).ids for prompt in prompts]
    check_prompts(encoded, model.config, max_new_tokens)
    found = complete(
        model,
        tokenizer,
        [ids for ids in encoded for _ in range(n_samples)],
        strategy,
        stop_strings=stop_strings,
        stop_tokens=end_of_text_ids(tokenizer) if stop_tokens is None else stop_tokens,
        batch_size=batch_size,
        description="completions",
        progress=progress,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
    )
    generations: list[list[str]] = []
    for place, prompt in enumerate(prompts):
        rows = found.tokens[place * n_samples : (place + 1) * n_samples]
        texts = [_cut(_text_after(tokenizer, encoded[place], tokens), stop_strings) for tokens in rows]
        generations.append([prompt + text if with_prompt else text for text in texts])
    with replacing(Path(path)) as beside:
        beside.write_text(json.dumps(generations), encoding="utf-8")
    return generations


def _text_after(tokenizer: "Tokenizer", prompt: list[int], tokens: list[int]) -> str:
    """The text of new tokens behind their prompt. Alone they may lack a leading space, which SentencePiece takes for
    the mark of a text's beginning: after `return` that is a syntax error."""
    return tokenizer.decode([*prompt, *tokens])[len(tokenizer.decode(prompt)) :]


def _cut(text: str, stop_strings: Sequence[str]) -> str:
    """What comes before the first stop string, as the harness cuts: the one that begins first."""
    places = [text.find(stop) for stop in stop_strings if stop]
    return text[: min((place for place in places if place >= 0), default=len(text))]
