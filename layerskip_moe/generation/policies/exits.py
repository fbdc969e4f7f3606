"""Which layers are worth drafting by, of a network of so many, and how much at most.

Knows nothing of acceptance or time. Next: `adaptive.py`, which chooses among them.
"""

MOST_DRAFTS = 31  # of a row in a round, made from int8 copies


def candidate_exits(n_layers: int, *, deep: bool = False) -> tuple[int, ...]:
    """Exit layers that are worth trying: 1, 2, 3, 4, 6, 8, 12, 16, ..., up to half of the layers, or (deep) all but the
    last."""
    steps = sorted({2**power for power in range(12)} | {3 * 2**power for power in range(11)})
    most = n_layers - 1 if deep else max(n_layers // 2, 1)
    return tuple(layer for layer in steps if layer <= most and layer < n_layers)


def has_stages(exit_layer: int, proposing: int) -> bool:
    """Whether that exit's int8 drafts of one row are worth making in stages, where so many layers propose (0: none do):
    at least as many then choose."""
    return 0 < 2 * proposing <= exit_layer


def proposing_layers(n_layers: int) -> int:
    """How many layers propose where the whole model drafts in stages: a third of them, which is enough to be mostly
    right, or a few less, as many as a candidate has, of which it is known how sure it must be; none of a model of one
    layer."""
    return max((layer for layer in candidate_exits(n_layers) if layer <= max(n_layers // 3, 1)), default=0)
