"""Activation checkpointing: the same numbers from less memory, and blocks left as they were."""

import functools

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from layerskip_moe.training import block_calls, train
from layerskip_moe.training.block_calls import calling_blocks


def loss_of(model):
    tokens = torch.arange(64).view(4, 16) % 16
    return model(tokens).logsumexp(-1).mean()


def bytes_kept(model, checkpointing):
    """Of the tensors that a forward pass keeps for the backward pass, each counted once."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with (
        saved_tensors_hooks(keep, lambda tensor: tensor),
        calling_blocks(model, compile=False, checkpointing=checkpointing),
    ):
        loss_of(model)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    return sum(size for place, size in kept.items() if place not in weights)


def test_less_is_kept(decoder):
    model = decoder(n_layers=8)
    assert bytes_kept(model, True) < 0.5 * bytes_kept(model, False)


@pytest.mark.parametrize("compile", [False, True])
def test_a_run_is_the_same_to_the_bit(decoder, text, recipe, tmp_path, monkeypatch, compile):
    """What was traced runs as it is: a compiler would take a minute."""
    traced = functools.cache(functools.partial(torch.compile, dynamic=True, fullgraph=True, backend="eager"))
    monkeypatch.setattr(block_calls, "compiled", traced)
    fields = dict(layer_dropout_max=0.8, layer_dropout_time="uniform", expert_dropout=0.2, compile=compile)
    ends = []
    for checkpointing in (False, True):
        model = decoder(n_layers=2, dropout=0.2)
        config = recipe(**fields, activation_checkpointing=checkpointing)
        train(model, text(), config, tmp_path / str(checkpointing), progress=False)
        ends.append(model.state_dict())
    assert [name for name, tensor in ends[0].items() if not torch.equal(tensor, ends[1][name])] == []


def test_blocks_are_left_as_they_were(decoder):
    model = decoder()
    own = model.blocks[1].forward
    model.blocks[1].forward = own  # somebody's own way to call it
    with pytest.raises(ZeroDivisionError), calling_blocks(model, compile=False, checkpointing=True):
        assert all("forward" in vars(block) for block in model.blocks)
        raise ZeroDivisionError
    assert [block for block in model.blocks if "forward" in vars(block)] == [model.blocks[1]]
    assert model.blocks[1].forward is own
