"""Drawing stretches of documents: prompts that do not overlap, from as many documents as there are.

Knows nothing of tokens. Next: `corpus.py`, whose held-out documents they are drawn from.
"""

from collections.abc import Sequence

import numpy as np


def draw_stretches(lengths: Sequence[int], n: int, length: int, seed: int = 0) -> list[tuple[int, int]] | None:
    """`n` different stretches of `length` tokens, each as (its document, where it begins there); None where documents
    of `lengths` tokens do not hold that many.

    They come from n different documents where that many are long enough, and else from as many as there are: first one
    of each, then a second of each that has another, and so on. A pure function of the arguments.
    """
    stretches = np.asarray(lengths) // length  # [documents]
    if stretches.sum() < n:
        return None
    draws = np.random.default_rng(seed % 2**64)
    documents = draws.permutation(np.flatnonzero(stretches))[:n]
    orders = [draws.permutation(stretches[document]) for document in documents]
    turns = [
        (turn, int(document), int(stretch) * length)
        for document, order in zip(documents, orders, strict=True)
        for turn, stretch in enumerate(order[:n])
    ]
    turns.sort(key=lambda one: one[0])  # stable: the first of each document, then the second of each, ...
    return [(document, begin) for _, document, begin in turns[:n]]
