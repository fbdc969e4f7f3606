"""Dealing sequences out by the documents that they are of, so that what is chosen on some holds for others.

Stretches of one document resemble each other: what was fitted to some of them fits the rest better than new text, and
many of them say no more about new documents than a few. n sequences, with the number of each one's document.
Knows nothing of what the sequences are for. Next: `calibrate.py`.
"""

import random
from collections import Counter
from collections.abc import Sequence


def split_documents(documents: Sequence[int], count: int, seed: int) -> tuple[list[int], list[int]]:
    """Indices of `count` sequences or as few less as whole documents give, drawn by `seed`, and of all others: no
    document has sequences in both. Where every document has more than `count`, single sequences are drawn."""
    sizes = Counter(documents)
    numbers, room, drawn = list(sizes), count, set()
    for number in random.Random(seed).sample(numbers, len(numbers)):
        if sizes[number] <= room:
            room -= sizes[number]
            drawn.add(number)
    chosen = {index for index, number in enumerate(documents) if number in drawn}
    if not chosen:
        chosen = set(random.Random(seed).sample(range(len(documents)), count))
    rest = [index for index in range(len(documents)) if index not in chosen]
    return sorted(chosen), rest


def one_of_each(documents: Sequence[int], indices: Sequence[int]) -> list[int]:
    """Of some sequences the first of every document."""
    first: dict[int, int] = {}
    for index in indices:
        first.setdefault(documents[index], index)
    return list(first.values())
