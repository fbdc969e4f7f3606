"""Is a continuation text or a loop? A looping model is easy to draft for, so a speed-up needs this beside it.

Knows nothing of models. Next: `bench/decoding.py`, which states it for every strategy.
"""

import math
from collections.abc import Sequence


def distinct_ngrams(continuations: Sequence[Sequence[int]], n: int = 4) -> float:
    """Share of distinct n-grams: different n-grams / all n-grams, both counted over all continuations together.

    continuations: token ids; an n-gram lies within one of them. 1 when none occurs twice, towards 0 for loops;
    nan when every continuation is shorter than n. Like distinct-n of Li et al. (arXiv 1510.03055), which
    divides by tokens instead and so cannot reach 1. It falls with the amount of text, so compare equal amounts.
    """
    if n < 1:
        raise ValueError(f"n={n} is the length of an n-gram and must be at least 1.")
    ngrams = [tuple(tokens[i : i + n]) for tokens in continuations for i in range(len(tokens) - n + 1)]
    return len(set(ngrams)) / len(ngrams) if ngrams else math.nan
