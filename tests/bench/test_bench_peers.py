"""Peers do the same work: transformers in earnest, llama.cpp where it is installed."""

import itertools

import pytest
import torch

from layerskip_moe.bench import ours, peer_llama_cpp, peer_transformers, peers
from layerskip_moe.bench.networks import Network, load_network, random_tokens, reference_config
from layerskip_moe.bench.ours import Decoded
from layerskip_moe.bench.train import TrainSettings, our_step, recipes, their_step
from layerskip_moe.generation import SelfSpeculative

TINY = dict(n_layers=3, d_model=32, n_heads=4, n_kv_heads=2, num_experts=4, d_ff=32, vocab_size=300, max_seq_len=96)
PROMPT = random_tokens(7, 300, seed=1)


@pytest.fixture(params=["mixtral", "qwen3"])
def model(request):
    return load_network(Network(network=request.param, **TINY), "cpu")


@pytest.fixture
def theirs(model, tmp_path):
    return peer_transformers.load(peers.export_for_transformers(model, tmp_path), torch.float32, "cpu")


def test_tokens_of_the_first_arrival_are_not_counted():
    decoded = Decoded([1, 2, 3, 4, 5, 6], [(10.0, 2), (10.5, 3), (12.0, 6)])
    assert decoded.tokens_per_second == 2.0


def test_decoding_is_greedy_text_of_the_length_asked_for(model, theirs):
    plain = ours.decode(model, PROMPT, 20)
    assert len(plain.tokens) == 20 and [count for _, count in plain.arrivals] == list(range(1, 21))
    their = peer_transformers.decode(theirs, PROMPT, 20)
    assert their.tokens == plain.tokens and [count for _, count in their.arrivals] == list(range(1, 21))


def test_speculation_arrives_in_rounds(model, theirs):
    plain = ours.decode(model, PROMPT, 20)
    drafted = ours.decode(model, PROMPT, 20, SelfSpeculative(exit_layer=3, draft_length=4))
    assert drafted.tokens == plain.tokens and [count for _, count in drafted.arrivals] == [5, 10, 15, 20]
    theirs_drafted = peer_transformers.decode(
        theirs, PROMPT, 20, assistant_early_exit=2, num_assistant_tokens=4, num_assistant_tokens_schedule="constant"
    )
    assert theirs_drafted.tokens == plain.tokens
    steps = [count for _, count in theirs_drafted.arrivals]
    assert steps[-1] == 20 and all(1 <= after - before <= 5 for before, after in itertools.pairwise(steps))
    assert len(peer_transformers.decode(theirs, PROMPT, 20).arrivals) == 20  # and drafts no more


def test_a_token_of_theirs_ends_no_text(theirs):
    """Families have an end of text by default, which random weights choose as soon as any other."""
    decoded = peer_transformers.decode(theirs, PROMPT, 40)
    assert len(decoded.tokens) == 40 and theirs.config.eos_token_id is None


def test_a_training_step_is_the_same_work(model, theirs):
    settings = TrainSettings(batch_size=2, seq_len=8, precision="float32")
    tokens = torch.tensor(random_tokens(18, 300, seed=2)).view(2, 9)
    before = model.head_weight.detach().clone()
    our, their = our_step(model, tokens, recipes(settings)[0], 3), their_step(theirs, tokens, settings)
    losses = [(our()[1], their()[1]) for _ in range(3)]
    assert losses[0][0] == pytest.approx(losses[0][1], rel=1e-5)
    assert losses[2][0] == pytest.approx(losses[2][1], rel=1e-2) and losses[2][0] < losses[0][0] - 0.1
    assert not torch.equal(model.head_weight, before) and model.head_weight.grad is None
    assert not model.training  # its own mode is back


def test_seconds_of_a_prompt_are_positive(model, theirs):
    assert ours.prefill_seconds(model, PROMPT) > 0 and peer_transformers.prefill_seconds(theirs, PROMPT) > 0


def test_what_cannot_be_compared_has_a_reason():
    mixtral, qwen3 = (reference_config(Network(network=name)) for name in ("mixtral", "qwen3"))
    assert peers.reason_to_skip("llama-cpp", mixtral, "int8", "cpu") is None
    assert "moe_layers='every other'" in peers.reason_to_skip("llama-cpp", qwen3, "float32", "cpu")
    assert "CPU alone" in peers.reason_to_skip("llama-cpp", mixtral, "float32", "cuda")
    assert peers.reason_to_skip("hf", qwen3, "bfloat16", "cuda") is None
    assert "no int8" in peers.reason_to_skip("hf-early-exit", mixtral, "int8", "cpu")


def test_a_missing_package_is_told_with_what_installs_it(monkeypatch):
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    peers.check_peers([])
    with pytest.raises(ValueError, match="llama-cpp needs llama-cpp-python and gguf: `pip install llama-cpp-python"):
        peers.check_peers(["llama-cpp"])
    with pytest.raises(ValueError, match="'gpt' is no peer"):
        peers.check_peers(["gpt"])


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
def test_llama_cpp_decodes_the_same_weights(tmp_path, precision):
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (it compiles for minutes)")
    model = load_network(Network(**TINY), "cpu")
    theirs = peer_llama_cpp.load(peers.export_for_llama_cpp(model, None, precision, tmp_path), 64, precision)
    first, again = (peer_llama_cpp.decode(theirs, PROMPT, 20) for _ in range(2))
    assert first.tokens == again.tokens and len(first.arrivals) == 20
    if precision == "float32":
        assert first.tokens == ours.decode(model, PROMPT, 20).tokens
    assert peer_llama_cpp.prefill_seconds(theirs, PROMPT) > 0
    theirs.close()
