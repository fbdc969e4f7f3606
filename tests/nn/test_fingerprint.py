"""model_fingerprint: the same for the same model, another for any other."""

import copy

import pytest
import torch

from layerskip_moe.nn import MoEDecoder
from layerskip_moe.nn.fingerprint import model_fingerprint
from layerskip_moe.pretrained import quantize

SIZES = dict(dtype=torch.float32, bias_balancing=True, d_ff=16)


@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
def test_it_is_of_every_tensor_and_survives_the_disk(tiny_model, tmp_path, quantization):
    model = tiny_model(**SIZES)
    model = model if quantization is None else quantize(model, quantization)
    print_ = model_fingerprint(model)
    assert model_fingerprint(copy.deepcopy(model)) == print_
    model.save_pretrained(tmp_path / "model")
    assert model_fingerprint(MoEDecoder.from_pretrained(tmp_path / "model")) == print_
    for name in model.state_dict():
        changed = copy.deepcopy(model)
        tensor = changed.state_dict()[name]
        numbers = tensor.qdata if hasattr(tensor, "qdata") else tensor
        one = tuple(size // 2 for size in numbers.shape)  # within, where no end is
        with torch.no_grad():
            numbers[one] = numbers[one] + (1e-3 if numbers.is_floating_point() else 1)
        assert model_fingerprint(changed) != print_, name


def test_settings_and_types_tell_models_apart(tiny_model):
    model = tiny_model(**SIZES)
    others = [tiny_model(**SIZES, norm_eps=1e-5), copy.deepcopy(model).double(), quantize(model, "int8")]
    assert len({model_fingerprint(one) for one in (model, *others)}) == 4
    assert model_fingerprint(tiny_model(**SIZES, init_std=0.3, max_seq_len=30)) == model_fingerprint(model)


def test_inference_mode_changes_nothing(tiny_model):
    for model in (tiny_model(**SIZES), quantize(tiny_model(**SIZES), "int4")):
        with torch.inference_mode():
            within = model_fingerprint(model)
        assert within == model_fingerprint(model)


def test_what_is_written_between_two_calls_is_seen(tiny_model):
    model = tiny_model(**SIZES)
    before = model_fingerprint(model)
    with torch.no_grad():
        model.blocks[1].attention.output.weight[3, 2] += 1e-3
    assert model_fingerprint(model) != before == model_fingerprint(tiny_model(**SIZES))
    rounded = tiny_model(**SIZES).to(torch.bfloat16).to(torch.float32)
    assert model_fingerprint(rounded) != before


def test_large_tensors_are_looked_at_from_end_to_end(tiny_model):
    model = tiny_model(torch.float32, vocab_size=9000)
    before = model_fingerprint(model)
    assert model.embedding.weight.numel() > 2**16
    for rows in (slice(0, 3), slice(4000, 4003), slice(-3, None)):
        changed = copy.deepcopy(model)
        with torch.no_grad():
            changed.embedding.weight[rows] += 1e-3
        assert model_fingerprint(changed) != before
