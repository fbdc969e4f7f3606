"""What early exit saves: which layers ran, how often, over which rows. Next: `test_early_exit.py`, what comes out."""

import pytest

from layerskip_moe.generation import EarlyExit, generate

LAYERS = 5
PROMPTS = [[3, 4, 1], [5, 1, 7, 2], [8, 8, 1, 0, 2, 3], [1, 2, 3]]  # so prefill is no run of a single position


@pytest.fixture
def watched(exact_model, monkeypatch):
    """A model, and its calls so far: (layer, positions [B][T]) for each layer of each `run`, and of each `fill`."""
    model, ran, filled = exact_model(n_layers=LAYERS), [], []

    def watch(name, calls):
        method = getattr(model, name)

        def call(hidden, layers, *, positions, **others):
            calls.extend((layer, positions.tolist()) for layer in layers)
            return method(hidden, layers, positions=positions, **others)

        monkeypatch.setattr(model, name, call)

    watch("run", ran)
    watch("fill", filled)
    return model, ran, filled


@pytest.mark.parametrize(
    "strategy", [EarlyExit(0.8), EarlyExit(0.9, "state", min_layer=2)], ids=["softmax_diff", "state"]
)
def test_only_the_rows_that_go_on_cost_anything_below(watched, strategy):
    model, ran, _ = watched
    out = generate(model, PROMPTS, strategy, max_new_tokens=12, temperature=0.7, stop_tokens=[9])
    decoding = [(layer, positions) for layer, positions in ran if len(positions[0]) == 1]
    assert len(ran) - len(decoding) == LAYERS, "the prompts run once, through all layers"
    # The exit of a stop token is not in the output: at most one more for each row.
    stopped = sum(len(row) < 12 for row in out.tokens)
    for layer in range(LAYERS):
        wanted = sum(depth > layer for row in out.layers_run for depth in row)
        rows = sum(len(positions) for ran_layer, positions in decoding if ran_layer == layer)
        assert wanted <= rows <= wanted + stopped
    assert stopped > 0 and out.stats.mean_layers < 0.8 * LAYERS


@pytest.mark.parametrize("cache", ["exact", "propagate"])
def test_every_layer_runs_at_most_once_over_a_position(watched, cache):
    """One row. "exact" runs a layer over every position up to the last that went below; "propagate" runs it only
    over those that did, and fills the others before it."""
    model, ran, filled = watched
    prompt = PROMPTS[1]
    exits = generate(model, [prompt], EarlyExit(0.8, cache=cache), max_new_tokens=14, temperature=0.7).layers_run[0]
    first = len(prompt) - 1
    for layer in range(LAYERS):
        deep = [first + t for t, depth in enumerate(exits) if depth > layer]
        shallow = [position for position in range(first, deep[-1]) if position not in deep] if deep else []
        positions = sorted(p for n, rows in ran if n == layer for p in rows[0] if p >= first)
        copied = sorted(p for n, rows in filled if n == layer for p in rows[0])
        assert positions == (sorted(deep + shallow) if cache == "exact" else deep)
        assert copied == ([] if cache == "exact" else shallow)
    assert len(set(exits)) >= 3 and sum(exits) < 0.8 * LAYERS * 14


@pytest.mark.parametrize(("threshold", "layers"), [(0.0, 2), (1.0, LAYERS)])
@pytest.mark.parametrize("cache", ["exact", "propagate"])
def test_nothing_is_made_that_no_later_token_needs(watched, cache, threshold, layers):
    model, ran, filled = watched
    generate(model, PROMPTS, EarlyExit(threshold, min_layer=2, cache=cache), max_new_tokens=8)
    decoding = [(layer, positions) for layer, positions in ran if len(positions[0]) == 1]
    assert [layer for layer, _ in decoding] == list(range(layers)) * 8
    assert len(ran) == len(decoding) + LAYERS and not filled
    assert all(len(positions) == 4 for _, positions in decoding)


def test_layers_before_the_first_exit_run_together(watched):
    """One call for them all, and one for each layer after: the head is asked no more often than may decide."""
    model, _, _ = watched
    asked = []
    model.norm.register_forward_hook(lambda _, inputs, output: asked.append(len(output)))
    try:
        generate(model, [PROMPTS[0]], EarlyExit(0.999999, min_layer=3), max_new_tokens=6)
        assert 6 <= len(asked) <= 6 * (LAYERS - 2)
        asked.clear()
        generate(model, [PROMPTS[0]], EarlyExit(1.0, min_layer=3), max_new_tokens=6)
        assert len(asked) == 6
    finally:
        model.norm._forward_hooks.clear()


@pytest.mark.parametrize("cache", ["exact", "propagate"])
def test_no_row_pays_for_what_another_makes_up_for(watched, cache):
    """A batch whose rows have unequally much to make up for: over all of it a layer still runs, or is filled, at most
    once for each row's position, and never for padding."""
    model, ran, filled = watched
    out = generate(model, PROMPTS, EarlyExit(0.8, cache=cache), max_new_tokens=14, temperature=0.7)
    firsts = [len(prompt) - 1 for prompt in PROMPTS]
    for layer in range(LAYERS):
        deep, shallow = 0, 0
        for first, exits in zip(firsts, out.layers_run, strict=True):
            below = [first + t for t, depth in enumerate(exits) if depth > layer]
            deep += len(below)
            shallow += below[-1] + 1 - first - len(below) if below else 0
        prompts = max(firsts) * len(PROMPTS)  # the prefill is padded
        positions = sum(len(rows) * len(rows[0]) for n, rows in ran if n == layer) - prompts
        copied = sum(len(rows) * len(rows[0]) for n, rows in filled if n == layer)
        assert (positions, copied) == ((deep + shallow, 0) if cache == "exact" else (deep, shallow))
    assert len({tuple(exits) for exits in out.layers_run}) == len(PROMPTS)


@pytest.mark.parametrize("confidence", ["softmax_diff", "state", lambda h, p, z: z.softmax(-1).amax(-1)])
@pytest.mark.parametrize("cache", ["exact", "propagate"])
def test_layers_between_two_exits_run_together_and_change_nothing(watched, monkeypatch, cache, confidence):
    """A threshold of 1 is not asked, one that nothing reaches is: the same text, from runs of several layers."""
    model, _, _ = watched
    spans, run = [], model.run
    monkeypatch.setattr(
        model, "run", lambda hidden, layers, **how: spans.append(tuple(layers)) or run(hidden, layers, **how)
    )
    level = 0.9 if confidence == "state" else 0.6
    how = dict(max_new_tokens=14, temperature=0.7, stop_tokens=[9])
    apart = generate(model, PROMPTS, EarlyExit([1.0, level, 1.0, 1.0], confidence, cache=cache), **how)
    assert set(spans[1:]) == {(0, 1), (2, 3, 4)}
    never = 1 - 1e-12
    asked = generate(model, PROMPTS, EarlyExit([never, level, never, never], confidence, cache=cache), **how)
    assert (apart.tokens, apart.layers_run) == (asked.tokens, asked.layers_run)
    assert {depth for row in apart.layers_run for depth in row} == {2, LAYERS}


def test_a_layer_that_is_never_left_is_not_asked(watched):
    """Layers before the first exit run together, and the head is asked after layers 3 and 5 alone."""
    model, _, _ = watched
    asked = []
    model.norm.register_forward_hook(lambda _, inputs, output: asked.append(len(output)))
    try:
        generate(model, [PROMPTS[0]], EarlyExit([1.0, 1.0, 0.999999, 1.0]), max_new_tokens=6)
        assert 6 < len(asked) <= 12
        asked.clear()
        generate(model, [PROMPTS[0]], EarlyExit([1.0] * 4), max_new_tokens=6)
        assert len(asked) == 6
    finally:
        model.norm._forward_hooks.clear()
