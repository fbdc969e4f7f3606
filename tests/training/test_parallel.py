"""Several processes are one: the same losses, step for step, and the same exported model on 1, 2 and 4 of them."""

import json
import os
import runpy
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from layerskip_moe.training.sharding import check_sharing

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
# What rounds: the losses of a run on other processes are close, as far as roundings go.
ROUNDED = {
    "in bfloat16": dict(recipe=dict(precision="bfloat16", learning_rate=1e-3)),
    "8-bit states": dict(  # of the embedding and the head, on up to four processes
        network=dict(vocab_size=2048), recipe=dict(optimizer="adamw8bit", learning_rate=0.01)
    ),
}


def start(count, runs, out_dir, **environment):
    """So many processes of one_of_many.py, started."""
    out_dir.mkdir(exist_ok=True)
    (out_dir / "runs.json").write_text(json.dumps(runs))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = os.environ | dict(WORLD_SIZE=str(count), MASTER_ADDR="localhost", MASTER_PORT=str(port))
    # (What breaks down below Python says where it was called.)
    shared |= dict(OMP_NUM_THREADS="1", PYTHONFAULTHANDLER="1", PYTHONPATH=os.pathsep.join(sys.path)) | environment
    return [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(out_dir / "runs.json"), str(out_dir)],
            env=shared | dict(RANK=str(rank), LOCAL_RANK=str(rank)),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]


class BrokenDown(Exception):
    """A signal ended a process."""


def finish(processes):
    for process in processes:
        _, err = process.communicate(timeout=600)
        if process.returncode < 0:
            for other in processes:
                other.kill()
            raise BrokenDown(err[:3000])
        assert process.returncode == 0, err[-3000:]
        assert "Warning" not in err


def made(make, tmp_path_factory, name):
    """The folder that make(folder) has filled; where a signal ended a process, another one, once. Twice in CI, never
    elsewhere, PyTorch 2.13 ended one as it gathered a divided tensor by gloo (`DTensor.full_tensor`), below Python."""
    try:
        return make(tmp_path_factory.mktemp(name))
    except BrokenDown as error:
        warnings.warn(f"a process broke down, and all begin again: {error}", stacklevel=2)
        return make(tmp_path_factory.mktemp(name))


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


def assert_close(one, other):
    """Losses within 2^-9, half a step of bfloat16's numbers."""
    pairs = [(a, b) for a, b in zip(one[0], other[0], strict=True)]
    assert any(a["split"] == "validation" for a, _ in pairs)
    for a, b in pairs:
        for name in a.keys() & {"loss", "exit_losses", "perplexity"}:
            assert a[name] == pytest.approx(b[name], rel=2**-9), name
    for name, tensor in one[2].items():  # and weights by less than Adam moves one in two steps
        torch.testing.assert_close(tensor, other[2][name], rtol=0, atol=0.02)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """What came of RUNS in one process, and of others that the tests compare with."""
    folder = tmp_path_factory.mktemp("one")
    for name, run in (RUNS | ROUNDED).items():
        alone(run, folder / name)
    alone(dict(recipe=dict(accumulation=2)), folder / "experts")
    alone({}, folder / "unbroken")
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What came of RUNS in two processes, and of runs that one process began and two ended, or the other way."""
    return made(by_two, tmp_path_factory, "two")


def by_two(folder):
    alone(dict(stop_at=3), folder / "resumed")
    rounded = ROUNDED["8-bit states"]
    alone(rounded | dict(stop_at=3), folder / "8-bit resumed")
    others = {"experts by 2": by(2), "resumed": dict(resume=True), "other weights": dict(seeds=[0, 1])}
    others |= {"8-bit resumed": rounded | dict(resume=True), "8-bit back": rounded | dict(stop_at=3)}
    others["compiled"] = dict(recipe=dict(RUNS["dropping blocks"]["recipe"], compile=True))
    others["nan"] = dict(
        broken="blocks.2.mlp.experts",
        recipe=dict(layer_dropout_max=0.0, max_skipped_steps=2, activation_checkpointing=True),
    )
    finish(start(2, RUNS | ROUNDED | others, folder))
    alone(rounded | dict(resume=True), folder / "8-bit back")
    return folder


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """The same of four; two processes began what they ended. And of a run that four began and one ended."""
    return made(by_four, tmp_path_factory, "four")


def by_four(folder):
    rounded = ROUNDED["8-bit states"]
    finish(start(2, {"resumed": dict(stop_at=3), "8-bit resumed": rounded | dict(stop_at=3)}, folder))
    others = {"experts by 2": by(2), "experts by 4": by(4), "resumed": dict(resume=True), "back": dict(stop_at=3)}
    others["8-bit resumed"] = rounded | dict(resume=True)
    finish(start(4, RUNS | ROUNDED | others, folder))
    alone(dict(resume=True), folder / "back")
    return folder


def by(count):
    return dict(recipe=dict(expert_parallel=count, accumulation=2))


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_have_the_losses_of_one_step_for_step_and_its_model(one, two, name):
    assert_same(outcome(two / name), outcome(one / name))


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_so_have_four(one, four, name):
    assert_same(outcome(four / name), outcome(one / name))


@pytest.mark.parametrize("name", ROUNDED)
def test_what_is_rounded_is_close(one, two, name):
    assert_close(outcome(two / name), outcome(one / name))


@pytest.mark.slow
@pytest.mark.parametrize("name", ROUNDED)
def test_and_on_four(one, four, name):
    assert_close(outcome(four / name), outcome(one / name))


@pytest.mark.parametrize("name", ["8-bit resumed", "8-bit back"])
def test_8_bit_states_of_one_process_go_on_on_two_and_back(one, two, name):
    assert_close(outcome(two / name), outcome(one / "8-bit states"))


@pytest.mark.slow
def test_8_bit_states_of_two_go_on_on_four(one, four):
    assert_close(outcome(four / "8-bit resumed"), outcome(one / "8-bit states"))


def test_compiled_blocks_of_two_processes_compute_what_one_does(one, two):
    assert_same(outcome(two / "compiled"), outcome(one / "dropping blocks"))


def test_experts_held_by_two_processes_compute_what_one_does(one, two):
    assert_same(outcome(two / "experts by 2"), outcome(one / "experts"))


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_so_do_experts_held_by_two_and_four_of_four(one, four, count):
    assert_same(outcome(four / f"experts by {count}"), outcome(one / "experts"))


def test_two_processes_go_on_where_one_stopped(one, two):
    assert_same(outcome(two / "resumed"), outcome(one / "unbroken"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resumed", "back"])
def test_four_go_on_where_two_stopped_and_one_where_four_did(one, four, name):
    assert_same(outcome(four / name), outcome(one / "unbroken"))


def test_every_process_ends_with_the_same_weights(two):
    for name in RUNS:
        first, other = (torch.load(two / name / f"weights-{rank}.pt") for rank in range(2))
        assert all(torch.equal(other[key], first[key]) for key in first)


def test_only_the_first_process_writes(two):
    folder = two / "dropping blocks"
    files = {path.name for path in folder.iterdir()} - {"tensorboard"}
    assert files == {
        "metrics.jsonl", "recipe.json", "checkpoints", ".lock", "model", "result.json", "weights-0.pt", "weights-1.pt"
    }  # fmt: skip
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 6 + 2  # of steps, and of validations


def test_processes_with_other_weights_do_not_train_together(two):
    said = {(two / "other weights" / f"said-{rank}.txt").read_text() for rank in range(2)}
    assert len(said) == 1 and said.pop().startswith("processes [1] were given another text, model or TrainConfig than")
    assert not (two / "other weights" / "checkpoints").exists()


def test_what_is_not_finite_in_one_process_is_named_by_all(two):
    said = {(two / "nan" / f"said-{rank}.txt").read_text() for rank in range(2)}
    assert len(said) == 1 and "at step 0, and 1 more in a row; it began in the output of layer 2 (blocks." in said.pop()


@pytest.mark.parametrize("batch_size, advice", [(6, "give 4"), (2, "give 4"), (13, "give 12")])
def test_a_batch_that_cannot_be_shared_is_refused(decoder, recipe, batch_size, advice):
    check_sharing(decoder().config, recipe(batch_size=8), 4)
    with pytest.raises(ValueError, match=f"batch_size={batch_size} is shared by 4 processes.*{advice}"):
        check_sharing(decoder().config, recipe(batch_size=batch_size), 4)


@pytest.mark.parametrize(
    "processes, experts, network, sentence",
    [
        (4, 3, {}, "must divide the number of processes, which is 4"),
        (1, 2, {}, "must divide the number of processes, which is 1"),
        (8, 8, {}, "must divide num_experts=4"),
        (2, 2, dict(num_experts=0, top_k=1), "must divide num_experts=0"),
        (32, 2, {}, "of 8 rows cannot be shared evenly by 16 processes"),
    ],
)
def test_experts_that_cannot_be_divided_are_refused(decoder, recipe, processes, experts, network, sentence):
    with pytest.raises(ValueError, match=sentence):
        check_sharing(decoder(**network).config, recipe(batch_size=32, expert_parallel=experts), processes)


def test_blocks_whose_experts_are_elsewhere_are_not_compiled(decoder, recipe):
    check_sharing(decoder().config, recipe(compile=True), 2)
    with pytest.raises(ValueError, match="compile=True cannot compile blocks over expert_parallel=2"):
        check_sharing(decoder().config, recipe(compile=True, expert_parallel=2), 2)


def test_a_process_that_broke_down_begins_again_once(tmp_path_factory):
    folders = []

    def make(folder):
        folders.append(folder)
        broken = "import os; os.abort()" if len(folders) < 2 else "pass"
        finish([subprocess.Popen([sys.executable, "-c", broken], stderr=subprocess.PIPE, text=True)])
        return folder

    with pytest.warns(UserWarning, match="begin again"):
        assert made(make, tmp_path_factory, "broken") == folders[1] != folders[0]
    with pytest.raises(AssertionError):  # what fails by itself does not
        made(
            lambda _: finish([subprocess.Popen([sys.executable, "-c", "1 / 0"], stderr=subprocess.PIPE, text=True)]),
            tmp_path_factory,
            "wrong",
        )
