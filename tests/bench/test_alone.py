"""Fresh processes: what goes in and out, and the first token measured in three of them."""

import json

import pytest

from layerskip_moe.bench import alone
from layerskip_moe.bench import first_token as first_token_module
from layerskip_moe.bench.first_token import first_token
from layerskip_moe.bench.networks import Network, load_network
from layerskip_moe.bench.tables import result_text


def test_a_function_of_a_module_is_called_there():
    asked = {"function": {"name": "x"}, "arguments": {"skipkeys": True}}
    # json.dumps gives a string, which comes back as one.
    answer = alone.in_fresh_process(json.dumps, {"obj": asked, "sort_keys": True})
    assert json.loads(answer) == asked


def test_an_error_there_is_told():
    with pytest.raises(RuntimeError, match=r"(?s)loads failed in a process of its own:.*JSONDecodeError"):
        alone.in_fresh_process(json.loads, {"s": "{"})


SIZES = dict(n_layers=2, d_model=16, n_heads=2, n_kv_heads=1, num_experts=4, d_ff=16, vocab_size=40, max_seq_len=16)


def test_first_token_in_three_processes(monkeypatch):
    calls = []

    def in_this_process(function, arguments, environment):
        calls.append((arguments["compile"], environment))
        return function(**json.loads(json.dumps(arguments)))

    monkeypatch.setattr(first_token_module, "in_fresh_process", in_this_process)
    model = load_network(Network(**SIZES), "cpu")
    told = first_token(model, ("float32", "int8"), 4, seed=0)
    assert list(told) == ["float32", "int8"]
    assert list(told["float32"]) == ["empty caches", "a new process", "compile=False"]
    assert all(case["seconds"] > 0 and case["second_call"] > 0 for cases in told.values() for case in cases.values())
    text = result_text({"benchmark": "decode", "groups": {}, "skipped": [], "first_token": told})
    assert "seconds to the first token" in text and "int8" in text
    assert [compile for compile, _ in calls] == [True, True, False] * 2
    # The second process finds the first one's caches, another precision its own.
    caches = [environment["TORCHINDUCTOR_CACHE_DIR"] for _, environment in calls]
    assert caches[0] == caches[1] != caches[3] and "LAYERSKIP_MOE_CACHE" in calls[0][1]


@pytest.mark.slow
def test_first_token_in_earnest():
    told = first_token(load_network(Network(**SIZES), "cpu"), ("float32",), 4, seed=0)
    assert all(case["seconds"] > 0 for case in told["float32"].values())
