"""Layer skipping: fixed layers against the smaller network, random ones against a loop over one row. In float64."""

import dataclasses
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from layerskip_moe.generation import Autoregressive, LayerSkipping, generate
from layerskip_moe.nn import KVCache, MoEDecoder

LAYERS = 6
PROMPTS = [[3], [5, 1, 7, 2], [8, 8, 1, 0, 2, 3], [1, 2]]
MODELS = {
    "experts in every other layer": dict(moe_layers="every other"),
    "experts in some": dict(moe_layers=(0, 3, 4), tie_embeddings=True),
    "routers that look back": dict(router_average=0.6, router_hold=3),
    "dense": dict(num_experts=0),
}


def without(model, layers):
    """A network of the other blocks alone."""
    kept = [layer for layer in range(LAYERS) if layer not in layers]
    config = model.config
    moe_layers = tuple(new for new, old in enumerate(kept) if config.is_moe(old))
    experts = dict(moe_layers=moe_layers) if moe_layers else dict(moe_layers="all", num_experts=0)
    smaller = MoEDecoder(dataclasses.replace(config, n_layers=len(kept), **experts)).to(model.dtype)
    weights = {name: value for name, value in model.state_dict().items() if not name.startswith("blocks.")}
    for new, old in enumerate(kept):
        block = model.blocks[old].state_dict()
        weights |= {f"blocks.{new}.{name}": value for name, value in block.items()}
    smaller.load_state_dict(weights)
    return smaller


@pytest.mark.parametrize("name", ["experts in every other layer", "experts in some"])
@pytest.mark.parametrize(
    ("strategy", "layers"),
    [
        (LayerSkipping((2, 4)), (2, 4)),
        (LayerSkipping((5, 0, 0)), (0, 5)),
        (LayerSkipping([3]), (3,)),
        (LayerSkipping((0, 1, 2, 4, 5)), (0, 1, 2, 4, 5)),
        (LayerSkipping(every=2), (1, 3, 5)),
        (LayerSkipping(every=3), (2, 5)),
        (LayerSkipping(every=4), (3,)),
        (LayerSkipping(every=6), (5,)),
    ],
    ids=str,
)
def test_fixed_layers_give_the_smaller_network_s_text(exact_model, name, strategy, layers):
    model = exact_model(n_layers=LAYERS, **MODELS[name])
    arguments = dict(max_new_tokens=12, temperature=0.8, stop_tokens=[9])
    expected = generate(without(model, layers), PROMPTS, Autoregressive(), **arguments)
    out = generate(model, PROMPTS, strategy, **arguments)
    assert out.tokens == expected.tokens
    assert out.layers_run == [[LAYERS - len(layers)] * len(row) for row in out.tokens]


def layers_of_each_position(model, monkeypatch, prompt, strategy, **arguments):
    """Decode one prompt; (its Generation, position -> layers that ran there, as one tuple)."""
    ran = {}
    run = model.run

    def watched(hidden, layers, *, positions, **others):
        for position in positions.flatten().tolist():
            ran[position] = ran.get(position, ()) + tuple(layers)
        return run(hidden, layers, positions=positions, **others)

    with monkeypatch.context() as patch:
        patch.setattr(model, "run", watched)
        out = generate(model, [prompt], strategy, **arguments)
    return out, ran


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("name", ["experts in some", "routers that look back", "dense"])
@torch.no_grad()
def test_random_layers_against_a_loop_over_one_row(exact_model, monkeypatch, name, count):
    """A layer that is left out gets the keys and values of the state that passes it by."""
    model = exact_model(n_layers=LAYERS, **MODELS[name])
    for prompt in PROMPTS[:3]:
        out, ran = layers_of_each_position(model, monkeypatch, prompt, LayerSkipping(random=count), max_new_tokens=12)
        assert all(ran[position] == tuple(range(LAYERS)) for position in range(len(prompt) - 1)), "prompts in full"
        cache = KVCache(model.config, 1, 20, dtype=model.dtype)
        if len(prompt) > 1:
            before = torch.tensor([prompt[:-1]])
            positions = torch.arange(len(prompt) - 1)[None]
            model.run(model.embed(before), range(LAYERS), positions=positions, cache=cache)
        text = list(prompt)
        for _ in range(12):
            position = torch.tensor([[len(text) - 1]])
            hidden = model.embed(torch.tensor([text[-1:]]))
            for layer in range(LAYERS):
                if layer in ran[len(text) - 1]:
                    hidden = model.run(hidden, [layer], positions=position, cache=cache).hidden
                else:
                    model.fill(hidden, [layer], positions=position, cache=cache)
            text.append(int(model.unembed(hidden).argmax()))
        assert out.tokens == [text[len(prompt) :]]


@pytest.mark.parametrize("count", [1, 2, 4])
def test_which_layers_are_left_out_belongs_to_the_place(exact_model, monkeypatch, count):
    """To seed and position (and row, below), not to the text; the first and the last layer always run."""
    model, strategy = exact_model(n_layers=LAYERS, num_experts=0), LayerSkipping(random=count)

    def layers_run(prompt, seed):
        return layers_of_each_position(model, monkeypatch, prompt, strategy, max_new_tokens=19, seed=seed)[1]

    ran = layers_run([3], 0)
    assert layers_run([7], 0) == ran
    assert all(len(layers) == len(set(layers)) == LAYERS - count for layers in ran.values())
    assert all(layers[0] == 0 and layers[-1] == LAYERS - 1 for layers in ran.values())
    if count < LAYERS - 2:
        assert layers_run([3], 1) != ran
        assert any(one != other for one, other in pairwise(ran[position] for position in range(19)))


@pytest.mark.parametrize("count", [1, 3])
def test_every_middle_layer_is_left_out_as_often(tiny_model, monkeypatch, count):
    """Chi-square at a fixed seed: a right implementation would fail one seed in 10,000."""
    model = tiny_model(n_layers=LAYERS, num_experts=0, max_seq_len=120)
    _, ran = layers_of_each_position(model, monkeypatch, [3], LayerSkipping(random=count), max_new_tokens=119)
    skipped = [layer for layers in ran.values() for layer in range(LAYERS) if layer not in layers]
    assert len(skipped) == 119 * count and chisquare(np.bincount(skipped)[1:]).pvalue > 1e-4


def test_random_rows_draw_for_themselves_and_do_not_see_their_batch(exact_model):
    model, strategy = exact_model(n_layers=LAYERS), LayerSkipping(random=2)
    arguments = dict(max_new_tokens=12, temperature=0.7, seed=5, stop_tokens=[9])
    together = generate(model, PROMPTS, strategy, **arguments)
    for batch_size in (1, 3):
        assert generate(model, PROMPTS, strategy, batch_size=batch_size, **arguments).tokens == together.tokens
    assert together.layers_run == [[4] * len(row) for row in together.tokens]
    assert len({len(row) for row in together.tokens}) > 1, "rows were to leave at different times"
    alike = generate(model, [[3]] * 6, strategy, max_new_tokens=12).tokens
    assert len({tuple(row) for row in alike}) > 3, "greedy rows of one prompt differ by their layers alone"


@pytest.mark.parametrize(
    "arguments",
    [{}, dict(layers=()), dict(layers=(1,), every=2), dict(every=2, random=1), dict(layers=(1,), every=2, random=1)],
    ids=str,
)
def test_one_way_must_be_chosen(arguments):
    with pytest.raises(ValueError, match="LayerSkipping takes one of layers, every and random"):
        LayerSkipping(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(layers=3), r"layers=3 is one index; give a list, such as \[3\]"),
        (dict(every=1), "every=1 must be 2 or more"),
        (dict(every=0), "every=0 must be 2 or more"),
        (dict(random=0), "random=0 must be 1 or more"),
        (dict(random=-1), "random=-1 must be 1 or more"),
        (dict(layers=(1, 6)), r"layers=\[1, 6\] names 6, but layers are 0 to 5"),
        (dict(layers=(-1,)), r"layers=\[-1\] names -1, but layers are 0 to 5"),
        (dict(layers=tuple(range(6))), "leaves out all 6 layers; keep at least one"),
        (dict(every=7), "every=7 leaves out no layer: the model has 6"),
        (dict(random=5), "random=5 is too many: the first and last of 6 layers always run, so at most 4"),
    ],
    ids=str,
)
def test_layer_skipping_refuses(tiny_model, monkeypatch, arguments, message):
    model = tiny_model(n_layers=LAYERS)
    monkeypatch.setattr(model, "run", lambda *_, **__: pytest.fail("the model ran"))
    with pytest.raises(ValueError, match=message) as refused:
        generate(model, [[1]], LayerSkipping(**arguments), max_new_tokens=4)
    assert str(refused.value).endswith(".")
