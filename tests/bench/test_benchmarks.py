"""The four benchmarks on tiny networks: what they return holds together, and becomes text, JSON and a picture."""

import dataclasses
import json
import os

import pytest

from layerskip_moe.analysis.figures import save_figure
from layerskip_moe.bench import decode, memory, prefill, roofline, scaling, train
from layerskip_moe.bench.decode import DecodeSettings, decode_benchmark
from layerskip_moe.bench.figure import benchmark_figure
from layerskip_moe.bench.memory import MemorySettings, memory_benchmark
from layerskip_moe.bench.networks import Network, load_network
from layerskip_moe.bench.prefill import PrefillSettings, prefill_benchmark
from layerskip_moe.bench.tables import aligned, result_text
from layerskip_moe.bench.train import TrainSettings, train_benchmark, training_flop
from layerskip_moe.files import plain

TINY = dict(n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, num_experts=4, d_ff=32, vocab_size=300, max_seq_len=96)
NETWORK = Network(network="qwen3", **TINY)  # which llama.cpp cannot express


@pytest.fixture
def model():
    return load_network(NETWORK, "cpu")


@pytest.fixture(autouse=True)
def small_roofline(monkeypatch):
    def runs(device, dtype=None):
        return roofline.roofline_runs(device, dtype, read_bytes=2**20, width=64)

    for module in (decode, prefill, scaling, train):
        monkeypatch.setattr(module, "roofline_runs", runs)


def check(result, tmp_path):
    """What all results have in common."""
    assert json.loads(json.dumps(plain(result), allow_nan=False))["benchmark"] == result["benchmark"]
    text = result_text(result)
    for name, group in result["groups"].items():
        assert name in text
        for row in group["rows"]:
            assert row["name"] in text and row["value"]["median"] > 0
            if "ours_over_this" in row:
                ours = group["rows"][0]["value"]["samples"]
                expected = [one / other for one, other in zip(ours, row["value"]["samples"], strict=True)]
                assert row["ours_over_this"]["samples"] == expected
    save_figure(benchmark_figure(result), tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 5000
    return text


def test_decode(model, tmp_path):
    settings = DecodeSettings(
        peers=("hf", "hf-early-exit"), precisions=("float32", "int8"), prompt_tokens=5, new_tokens=8, exit_layer=1,
        draft_length=2, repeats=2,
    )  # fmt: skip
    result = decode_benchmark(model, NETWORK, settings)
    text = check(result, tmp_path)
    group = result["groups"]["float32"]
    names = [row["name"] for row in group["rows"]]
    assert names == ["ours", "ours, 2 drafts of layer 1", "hf", "hf-early-exit", "hf-early-exit, 2 drafts"]
    assert [row["equal"] for row in group["rows"]] == [8] * 5 == [row["tokens"] for row in group["rows"]]
    assert [row["name"] for row in result["groups"]["int8"]["rows"]] == names[:2]
    assert result["skipped"] == [
        {"peer": peer, "precision": "int8", "reason": "transformers has no int8 weights of its own"}
        for peer in ("hf", "hf-early-exit")
    ]
    assert "hf at int8 is left out: transformers has no int8" in text
    floor, read = group["floor"], group["roofline"]["read bandwidth"]
    assert read["peak"] == max(read["samples"])
    bytes_read = floor["weight_bytes"] + floor["cache_bytes"]
    assert floor["tokens_per_second"] == pytest.approx(read["peak"] / bytes_read)
    assert floor["cache_bytes"] == 2 * 2 * (5 + 4.5) * 2 * 8 * 4
    row = group["rows"][2]
    assert row["share_of_floor"] == pytest.approx(row["value"]["median"] / floor["tokens_per_second"])
    assert row["settings"]["class"] == "Qwen3MoeForCausalLM" and row["settings"]["experts"] == "grouped_mm"


def test_work_that_is_not_the_same_is_no_result(model, monkeypatch):
    real = decode.ours.decode
    monkeypatch.setattr(decode.ours, "decode", lambda model, prompt, new, **how: real(model, prompt, new - 1, **how))
    with pytest.raises(AssertionError, match="ours gave 7 tokens"):
        decode_benchmark(model, NETWORK, DecodeSettings((), ("float32",), 5, 8, repeats=1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(peers=("hf-early-exit",)), "give --exit-layer"),
        (dict(new_tokens=1), "new_tokens=1 must be 2 or more"),
        (dict(prompt_tokens=90), "past max_seq_len=96"),
        (dict(exit_layer=3), "exit_layer=3 must be between 1 and n_layers=2"),
        (dict(repeats=0), "repeats=0 must be 1 or more"),
    ],
)
def test_what_cannot_be_decoded_is_refused(model, settings, message):
    defaults = dict(peers=(), precisions=("float32",), prompt_tokens=5, new_tokens=8)
    with pytest.raises(ValueError, match=message):
        decode_benchmark(model, NETWORK, DecodeSettings(**{**defaults, **settings}))


def test_prefill(model, tmp_path):
    settings = PrefillSettings(peers=("hf",), precisions=("float32",), prompt_tokens=16, repeats=3)
    result = prefill_benchmark(model, NETWORK, settings)
    check(result, tmp_path)
    group = result["groups"]["float32"]
    assert [row["name"] for row in group["rows"]] == ["ours", "hf"]
    assert set(group["roofline"]) == {"read bandwidth", "matrix peak"}
    with pytest.raises(ValueError, match="runs a prompt as hf does"):
        prefill_benchmark(model, NETWORK, PrefillSettings(peers=("hf-early-exit",)))


def test_train(model, tmp_path):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    settings = TrainSettings(batch_size=2, seq_len=8, precision="float32", repeats=2)
    result = train_benchmark(model, NETWORK, settings)
    check(result, tmp_path)
    group = result["groups"]["float32"]
    assert [row["name"] for row in group["rows"]] == ["ours", "ours, recipe", "hf"]
    ours, recipe, hf = group["rows"]
    assert ours["losses"] == pytest.approx(hf["losses"], rel=1e-2) and recipe["losses"] != ours["losses"]
    peak = group["roofline"]["matrix peak"]["peak"]
    assert hf["share_of_peak"] == pytest.approx(hf["value"]["median"] * group["flop"] / 16 / peak)
    assert all((tensor == before[name]).all() for name, tensor in model.state_dict().items())
    pytest.importorskip("llama_cpp")
    with pytest.raises(ValueError, match="only hf trains"):
        train_benchmark(model, NETWORK, TrainSettings(peers=("llama-cpp",)))


def test_training_flop_by_hand(model):
    attention = 32 * (32 + 2 * 16) + 32 * 32
    norms = 2 * 32 + 2 * 8
    active = 2 * (attention + norms) + 3 * 32 * 64 + (4 * 32 + 2 * 3 * 32 * 32) + 32 + 300 * 32
    assert training_flop(model, 2, 8) == 6 * (active + 2 * 4 * 8 * 8) * 16


def test_scaling(model):
    told = {
        "expert_rows": scaling.expert_rows(model, 3, seed=0),
        "expert_count": scaling.expert_count(model, 2, seed=0, counts=(4, 8), new_tokens=4, compile=False),
        "late_position": scaling.late_position(model, 2, seed=0, positions=(5, 60), new_tokens=4, compile=False),
    }
    rows = told["expert_rows"]["rows"]
    assert told["expert_rows"]["layers"] == 1 and [row["rows"] for row in rows] == list(range(1, 9))
    assert rows[0]["union"] == 1.0 and set(rows[0]["over_one_row"]["samples"]) == {1.0}
    assert all(1.0 <= row["union"] <= min(row["rows"], 4 / 2) for row in rows)
    late = told["late_position"]
    assert late["bytes"][1] - late["bytes"][0] == 2 * 2 * 55 * 2 * 8 * 4
    text = result_text({"benchmark": "decode", "groups": {}, "skipped": [], "scaling": told})
    assert "with 8 experts" in text and "at position 60" in text
    assert "skipped" in scaling.scaling(load_network(Network(**TINY), "cpu"), 1, seed=0, compile=False)["late_position"]


HERE = "measured through /proc, which is not here"
MEMORY = MemorySettings(
    peers=("hf",), precisions=("float32", "int8"), prompt_tokens=4, new_tokens=4, batch_size=1, seq_len=4, compile=False
)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason=HERE)
def test_memory(model, tmp_path, monkeypatch):
    """All but the amounts, which mean something only in processes of their own."""
    asked = []

    def in_this_process(function, arguments):
        asked.append((arguments["peer"], arguments["training"], [path.split("/")[-2] for path in arguments["folders"]]))
        return function(**json.loads(json.dumps(arguments))) or 1

    monkeypatch.setattr(memory, "in_fresh_process", in_this_process)
    result = memory_benchmark(model, 0, MEMORY)
    check(result, tmp_path)
    assert asked == [
        ("ours", False, ["float32"] * 2), ("hf", False, ["float32"] * 2), ("ours", False, ["int8"] * 2),
        ("ours", True, ["float32"] * 2), ("hf", True, ["float32"] * 2),
    ]  # fmt: skip
    assert list(result["groups"]) == ["decoding, float32", "decoding, int8", "training step"]
    parameters = 4 * sum(p.numel() for p in model.parameters())
    assert result["groups"]["training step"]["needed"] == 4 * parameters
    assert result["groups"]["decoding, float32"]["needed"] == parameters + 2 * 2 * 8 * 2 * 8 * 4
    (left_out,) = result["skipped"]
    assert (left_out["peer"], left_out["precision"]) == ("hf", "decoding, int8")


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason=HERE)
def test_memory_is_little_more_than_what_is_needed():
    wide = load_network(Network(n_layers=2, d_model=256, n_heads=4, n_kv_heads=2, d_ff=1024, vocab_size=300), "cpu")
    result = memory_benchmark(wide, 0, dataclasses.replace(MEMORY, peers=(), precisions=("float32",)))
    for group in result["groups"].values():
        assert 0.9 < group["rows"][0]["bytes"] / group["needed"] < 1.5


def test_memory_that_cannot_be_measured_is_refused(model, monkeypatch):
    pytest.importorskip("llama_cpp")
    with pytest.raises(ValueError, match="compared with hf alone"):
        memory_benchmark(model, 0, MemorySettings(peers=("llama-cpp",)))
    monkeypatch.setattr(memory, "_STATUS", "/nowhere/status")
    with pytest.raises(ValueError, match="run it on Linux"):
        memory_benchmark(model, 0, MEMORY)


def test_aligned():
    assert aligned([["", "a"], ["long", "1234"], ["x", "5"]]) == "         a\nlong  1234\nx        5"
