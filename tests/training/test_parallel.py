"""Several processes are one: the same losses, step for step, and the same exported model on 1, 2 and 4 of them."""

import json
import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from layerskip_moe.training.parallel import Ranks, check_batch
from layerskip_moe.training.sharding import check_experts

SCRIPT = Path(__file__).with_name("one_of_many.py")
RUNS = {
    # With 4 samples, 0.7 dropped at the last layer: on 4 processes most keep none of a layer's samples.
    "dropping blocks": dict(recipe=dict(expert_dropout=0.2, router_coherence_weight=0.1)),
    "dropping experts": dict(
        network=dict(tie_embeddings=True),
        recipe=dict(layer_dropout_part="experts", accumulation=2, activation_checkpointing=True, exit_distillation=0.3),
    ),
    "balancing by a bias": dict(
        network=dict(bias_balancing=True, moe_layers="every other", shared_expert_d_ff=8),
        recipe=dict(accumulation=2, keep_best=True, moe_loss_weight=0.0),
    ),
    "routers that remember": dict(network=dict(router_average=0.5, router_hold=2), recipe=dict(max_steps=3)),
}


def start(count, runs, out_dir, **environment):
    """So many processes of one_of_many.py, started."""
    out_dir.mkdir(exist_ok=True)
    (out_dir / "runs.json").write_text(json.dumps(runs))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = os.environ | dict(WORLD_SIZE=str(count), MASTER_ADDR="localhost", MASTER_PORT=str(port))
    shared |= dict(OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join(sys.path)) | environment
    return [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(out_dir / "runs.json"), str(out_dir)],
            env=shared | dict(RANK=str(rank), LOCAL_RANK=str(rank)),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]


def finish(processes):
    for process in processes:
        _, err = process.communicate(timeout=600)
        assert process.returncode == 0, err[-3000:]
        assert "Warning" not in err


def alone(run, out_dir):
    runpy.run_path(str(SCRIPT))["run"](out_dir, **run)


def outcome(folder):
    """Metrics without what is of time, and the exported model."""
    metrics, best_step = json.loads((folder / "result.json").read_text())
    for record in metrics:
        for name in ("seconds", "tokens_per_second"):
            record.pop(name, None)
    return metrics, best_step, load_file(folder / "model" / "model.safetensors")


def assert_same(one, other):
    assert [(r["split"], r["step"]) for r in one[0]] == [(r["split"], r["step"]) for r in other[0]]
    for a, b in zip(one[0], other[0], strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - {"split", "load"}:
            assert a[name] == pytest.approx(b[name], rel=1e-5), name
        assert a.get("load") == b.get("load")
    assert one[1] == other[1]
    torch.testing.assert_close(one[2], other[2], rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """{processes: folder of what came of RUNS}, and of runs that were begun on one number and go on on another."""
    folder = tmp_path_factory.mktemp("runs")
    stopped = {f"begun on {count}": dict(stop_at=3) for count in (1, 2, 4)}
    for name, run in RUNS.items():
        alone(run, folder / "1" / name)
    alone(stopped["begun on 1"], folder / "begun on 1")
    alone({}, folder / "unbroken")
    for count in (2, 4):
        runs = dict(RUNS)
        for experts in {2, count}:
            runs[f"experts by {experts}"] = dict(recipe=dict(expert_parallel=experts, accumulation=2))
        runs[f"../begun on {count}"] = stopped[f"begun on {count}"]
        runs["../begun on 1" if count == 2 else "../begun on 2"] = dict(resume=True)
        finish(start(count, runs, folder / str(count)))
    alone(dict(resume=True), folder / "begun on 4")
    alone(dict(recipe=dict(accumulation=2)), folder / "1" / "experts")
    return folder


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("count", [2, 4])
def test_the_same_losses_step_for_step_and_the_same_model(outcomes, name, count):
    assert_same(outcome(outcomes / str(count) / name), outcome(outcomes / "1" / name))


@pytest.mark.parametrize("count, experts", [(2, 2), (4, 2), (4, 4)])
def test_experts_held_by_several_processes_compute_what_one_does(outcomes, count, experts):
    assert_same(outcome(outcomes / str(count) / f"experts by {experts}"), outcome(outcomes / "1" / "experts"))


@pytest.mark.parametrize("begun, resumed", [(1, 2), (2, 4), (4, 1)])
def test_a_run_goes_on_on_another_number_of_processes(outcomes, begun, resumed):
    assert_same(outcome(outcomes / f"begun on {begun}"), outcome(outcomes / "unbroken"))


@pytest.mark.parametrize("count", [2, 4])
def test_every_process_ends_with_the_same_weights(outcomes, count):
    for name in RUNS:
        first, *others = (torch.load(outcomes / str(count) / name / f"weights-{rank}.pt") for rank in range(count))
        assert all(torch.equal(other[key], first[key]) for other in others for key in first)


def test_only_the_first_process_writes(outcomes):
    files = {path.name for path in (outcomes / "4" / "dropping blocks").iterdir()} - {"tensorboard"}
    weights = {f"weights-{rank}.pt" for rank in range(4)}
    assert files == {"metrics.jsonl", "recipe.json", "checkpoint.pt", "model", "result.json", *weights}
    lines = (outcomes / "4" / "dropping blocks" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 6 + 2  # of steps, and of validations


CPU = torch.device("cpu")


@pytest.mark.parametrize("batch_size, advice", [(6, "give 4"), (2, "give 4"), (13, "give 12")])
def test_a_batch_that_cannot_be_shared_is_refused(batch_size, advice):
    check_batch(8, Ranks(0, 4, CPU))
    with pytest.raises(ValueError, match=f"batch_size={batch_size} is shared by 4 processes.*{advice}"):
        check_batch(batch_size, Ranks(0, 4, CPU))


@pytest.mark.parametrize(
    "ranks, experts, network, sentence",
    [
        (4, 3, {}, "must divide the number of processes, which is 4"),
        (1, 2, {}, "must divide the number of processes, which is 1"),
        (8, 8, {}, "must divide num_experts=4"),
        (2, 2, dict(num_experts=0, top_k=1), "must divide num_experts=0"),
        (32, 2, {}, "of 8 rows cannot be shared evenly by 16 processes"),
    ],
)
def test_experts_that_cannot_be_divided_are_refused(decoder, ranks, experts, network, sentence):
    with pytest.raises(ValueError, match=sentence):
        check_experts(decoder(**network).config, Ranks(0, ranks, CPU), experts)
