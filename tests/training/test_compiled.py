"""Training with compiled blocks: the numbers of the uncompiled run, a few graphs whatever the dropout draws, and a
resume that leaves no trace."""

import functools

import pytest
import torch
from torch._dynamo.utils import counters

from layerskip_moe.training import block_calls, losses, train
from layerskip_moe.training import run as run_module
from layerskip_moe.training.optimizer import compiles

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def graphs():
    return counters["stats"]["unique_graphs"]


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    counters.clear()


@pytest.fixture
def traced(monkeypatch):
    """Blocks are traced and guarded as ever, but what was traced runs as it is: a compiler would take a minute."""
    compiled = functools.cache(functools.partial(torch.compile, dynamic=True, fullgraph=True, backend="eager"))
    monkeypatch.setattr(block_calls, "compiled", compiled)


def dropping(recipe, **fields):
    return recipe(
        **{"layer_dropout_max": 0.8, "layer_dropout_time": "uniform", "batch_size": 3, "seq_len": 4, **fields}
    )


def end_of(model, corpus, config, folder):
    result = train(model, corpus, config, folder, progress=False)
    return [record["loss"] for record in result.metrics if record["split"] == "train"], model.state_dict()


def assert_close(one, other):
    assert one[0] == pytest.approx(other[0], rel=1e-4)
    torch.testing.assert_close(one[1], other[1], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("network", [{}, dict(router_average=0.6, router_hold=3)], ids=str)
def test_compiled_and_not_are_one_run_and_no_draw_of_layer_dropout_compiles_anew(
    traced, decoder, text, recipe, tmp_path, monkeypatch, network
):
    def counting(*arguments, **others):
        keep = layer_keep(*arguments, **others)
        kept.update(keep.sum(1).tolist())
        return keep

    kept, runs, layer_keep = set(), {}, losses.layer_keep
    monkeypatch.setattr(losses, "layer_keep", counting)
    for compile in (True, False):
        model, config = (
            decoder(n_layers=2, **network),
            dropping(recipe, compile=compile, max_steps=16, validate_every=0),
        )
        runs[compile] = end_of(model, text(validation=0), config, tmp_path / str(compile))
        assert not model.compiled
    assert_close(runs[True], runs[False])
    assert kept == {0, 1, 2, 3}  # no sample of a layer, one, some, all
    assert 0 < graphs() <= 3  # graphs: for all samples, for some, and for a single one


def test_compiled_in_bfloat16_on_a_cpu_which_the_compiler_cannot_ask_what_it_multiplies(
    traced, decoder, text, recipe, tmp_path
):
    config = dict(precision="bfloat16", max_steps=2)
    one, other = (
        end_of(decoder(n_layers=1), text(), recipe(**config, compile=compile), tmp_path / str(compile))
        for compile in (True, False)
    )
    assert graphs() > 0
    assert_close(one, other)


def test_what_is_compiled_unless_it_is_said(monkeypatch):
    assert not compiles(None, CPU) and not compiles(None, torch.device("mps"))
    assert compiles(True, CPU) and not compiles(False, GPU)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (8, 0))
    for found in (None, object()):
        monkeypatch.setattr("importlib.util.find_spec", lambda name, found=found: found)
        assert compiles(None, GPU) is (found is not None)


@pytest.mark.slow  # the compiler itself, twice or thrice
def test_a_compiled_run_resumes_bit_for_bit(decoder, text, recipe, tmp_path, monkeypatch):
    class Stopped(Exception):
        pass

    def stopping(*arguments, step, **others):
        if step == 4:
            raise Stopped
        return training_losses(*arguments, step=step, **others)

    training_losses = run_module.training_losses
    config = dropping(recipe, compile=True, max_steps=6, checkpoint_every=3)
    size = dict(n_layers=2, moe_layers=(1,), dense_d_ff=8)
    unbroken = end_of(decoder(**size), text(), config, tmp_path / "unbroken")
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(run_module, "training_losses", stopping)
        train(decoder(**size), text(), config, tmp_path / "broken", progress=False)
    model, made = decoder(**size, seed=1), graphs()
    train(model, text(), config, tmp_path / "broken", resume=True, progress=False)
    for name, tensor in unbroken[1].items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert graphs() == made <= 6  # for all samples, some and a single one, with experts and without
    eager = dropping(recipe, compile=False, max_steps=6)
    assert_close(unbroken, end_of(decoder(**size), text(), eager, tmp_path / "eager"))
