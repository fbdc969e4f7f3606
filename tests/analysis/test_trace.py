"""Traces: what is recorded is what drafting would say, to the last bit; and the file gives it back."""

import json
from dataclasses import fields

import numpy as np
import pytest
import torch

from layerskip_moe.analysis.record_trace import record_texts
from layerskip_moe.analysis.trace import Trace, TracedText, load_trace, save_trace
from layerskip_moe.generation import Sampling, generate
from layerskip_moe.generation.sampling import gumbel_noise, log_probabilities
from layerskip_moe.nn.kernels import has_kernels

PROMPTS = [[3, 1, 4, 1, 5], [9]]


@pytest.fixture
def model(decoder):
    return decoder(dtype=torch.float32, moe_layers=(0, 2))


def test_continuations_are_plain_decoding_s(model):
    texts = record_texts(model, PROMPTS, max_new_tokens=9, temperatures=(0.0, 0.7), seed=4, progress=False)
    assert [(text.temperature, text.seed) for text in texts] == [(0.0, 4), (0.0, 5), (0.7, 4), (0.7, 5)]
    for text, prompt in zip(texts, PROMPTS * 2, strict=True):
        out = generate(model, [prompt], max_new_tokens=9, temperature=text.temperature, seed=text.seed)
        assert text.tokens.tolist() == [*prompt, *out.tokens[0]]
        assert text.prompt_length == len(prompt) and text.is_own
        assert text.said[-1, len(prompt) - 1 :].tolist() == out.tokens[0]
    assert model.training, "as it was found"


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_every_layer_is_asked_at_every_position(model, temperature):
    """Against one pass over the finished text, layer by layer, with each position's noise."""
    [text] = record_texts(model, PROMPTS[:1], max_new_tokens=8, temperatures=[temperature], seed=2, progress=False)
    tokens = torch.from_numpy(text.tokens)[None, :-1]
    length, layers = tokens.shape[1], range(model.config.n_layers)
    positions = torch.arange(length)[None]
    sampling, rows = Sampling(temperature, seed=2), torch.tensor([0])
    with torch.no_grad():
        output = model.eval().run(model.embed(tokens), layers, positions=positions, collect=layers)
        logits = torch.stack([model.unembed(output.collected[layer])[0] for layer in layers])
    if temperature:
        logs = log_probabilities(logits, sampling)
        scores = logs + gumbel_noise(2, rows, positions + 1, model.config.vocab_size)[0]
    else:
        logs = logits.log_softmax(-1)
        scores = logs
    chosen = scores.argmax(-1, keepdim=True)
    assert text.said.tolist() == chosen[..., 0].tolist()
    assert text.confidence == pytest.approx(logs.exp().gather(-1, chosen)[..., 0].numpy(), abs=1e-4)
    assert text.second.tolist() == scores.topk(2).indices[..., 1].tolist()
    largest = scores.topk(2).values * (temperature or 1)
    assert text.margin == pytest.approx((largest[..., 0] - largest[..., 1]).numpy(), abs=1e-3)
    assert text.agreement.tolist() == (chosen[..., 0] == chosen[-1, :, 0]).tolist()
    assert text.experts.shape == (2, length, 2)
    for index, layer in enumerate((0, 2)):
        assert np.sort(text.experts[index]).tolist() == output.chosen[layer].sort(-1).values.tolist()


def test_int8_drafts_are_told_of_where_there_are_copies(model):
    """What they are is `tests/bench/test_replay.py`'s to compare, with real rounds."""
    how = {"max_new_tokens": 5, "temperatures": [0.6], "progress": False}
    [text] = record_texts(model, PROMPTS[:1], int8_length=3, **how)
    drafts = 3 if has_kernels() else 0
    assert text.int8_right.shape == text.int8_margin.shape == (3, 5, drafts)
    assert not text.int8_right[:, 3:, 2:].any() and not text.int8_margin[:, 4:, 1:].any(), "beyond the text's end"
    assert (text.int8_margin[:, :3] > 0).all()
    for none in ({"int8_length": 0}, {"compile": False}):
        [text] = record_texts(model, PROMPTS[:1], **how, **none)
        assert text.int8_right.shape == (3, 5, 0)


def test_held_out_text_is_read_as_it_stands(model, tokens):
    given = tokens(20).tolist()
    text = record_texts(model, PROMPTS, [given], max_new_tokens=1, progress=False)[-1]
    assert text.tokens.tolist() == given and not text.is_own and text.temperature == 0
    with torch.no_grad():
        said = model.eval()(torch.tensor([given[:-1]]))[0].topk(2).indices
    assert text.said[-1].tolist() == said[:, 0].tolist()
    assert text.second[-1].tolist() == said[:, 1].tolist()


def test_a_dense_model_has_no_experts(decoder):
    [text] = record_texts(
        decoder(num_experts=0), [[1, 2]], max_new_tokens=3, temperatures=[0.0], compile=False, progress=False
    )
    assert text.experts.shape == (0, 4, 0)
    assert text.said.shape == (3, 4)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"prompts": PROMPTS, "temperatures": (0.0, 0.0)}, "temperatures=\\[0.0, 0.0\\] must differ"),
        ({"prompts": PROMPTS, "temperatures": (-1.0,)}, "temperature=-1.0 must be 0"),
        ({"prompts": [[]]}, "prompt 0 is empty"),
        ({"prompts": PROMPTS, "max_new_tokens": 0}, "max_new_tokens=0 must be 1 or more"),
        ({"prompts": PROMPTS, "held_out": [[1]]}, "a held-out text has 1 tokens; it takes 2 at least"),
        ({"prompts": PROMPTS, "held_out": [[1] * 33]}, "max_seq_len=32 at most"),
        ({"prompts": PROMPTS, "held_out": [[1, 17]]}, "holds token id 17, but the vocabulary has ids 0 to 16"),
        ({"prompts": PROMPTS, "int8_length": 64}, "int8_length=64 must be 0 to 63"),
        ({"prompts": [], "held_out": [[1, 2]]}, "there are no prompts"),
    ],
)
def test_what_cannot_be_recorded(model, arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        record_texts(model, **{"max_new_tokens": 2, "progress": False, **arguments})


@pytest.fixture
def trace(model):
    texts = record_texts(model, PROMPTS, [[5, 6, 7]], max_new_tokens=4, temperatures=(0.0, 0.5), progress=False)
    return Trace(texts, model.config, {"checkpoint": "here", "cost_model": {"step": 1.5}})


def test_a_file_gives_back_the_trace(trace, tmp_path):
    path = tmp_path / "new" / "trace.npz"
    save_trace(trace, path)
    again = load_trace(path)
    assert again.config == trace.config and again.about == trace.about
    assert len(again.texts) == 5 and [len(texts) for texts in again.continuations().values()] == [2, 2]
    for one, other in zip(again.texts, trace.texts, strict=True):
        assert (one.prompt_length, one.temperature, one.seed) == (other.prompt_length, other.temperature, other.seed)
        for name in (field.name for field in fields(TracedText)):
            if one.is_own or not name.startswith("int8"):  # (of none the shape is the others')
                assert np.array_equal(getattr(one, name), getattr(other, name)), name
    assert again.texts[0].said.dtype == again.texts[0].experts.dtype == np.uint8
    assert [file.name for file in path.parent.iterdir()] == ["trace.npz"]


def test_files_that_are_no_trace(trace, tmp_path):
    path = tmp_path / "trace.npz"
    with pytest.raises(FileNotFoundError):
        load_trace(path)
    path.write_text("a story")
    with pytest.raises(ValueError, match=r"trace\.npz is not a trace, or is damaged; `layerskip-moe trace` writes one"):
        load_trace(path)
    np.savez(path, tokens=np.zeros(3))
    with pytest.raises(ValueError, match="is not a trace"):
        load_trace(path)
    save_trace(trace, path)
    whole = path.read_bytes()
    for kept in (len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:kept])
        with pytest.raises(ValueError, match="is not a trace, or is damaged"):
            load_trace(path)
    path.write_bytes(whole)
    with np.load(path) as file:
        arrays = dict(file)
    np.savez(path, **{**arrays, "said": arrays["said"][:, 1:]})
    with pytest.raises(ValueError, match="is damaged: its said have shape"):
        load_trace(path)
    for name, wrong, reason in (
        ("int8_right", arrays["int8_right"].astype(np.uint8), "its int8_right are of type uint8"),
        ("int8_right", arrays["int8_right"][:, 1:], "its int8_right have shape"),
        ("int8_margin", -1 - arrays["int8_margin"], "its int8_margins are not all 0 or more"),
        ("int8_margin", arrays["int8_margin"][..., :-1], "its int8_margin have shape"),
    ):
        np.savez(path, **{**arrays, name: wrong})
        with pytest.raises(ValueError, match=f"is damaged: {reason}"):
            load_trace(path)
    header = json.loads(arrays["header"].tobytes())
    words = json.dumps({**header, "version": 7}).encode()
    np.savez(path, header=np.frombuffer(words, dtype=np.uint8))  # whose arrays are others
    with pytest.raises(ValueError, match="of version 7, and this library reads version 6; record it anew"):
        load_trace(path)
