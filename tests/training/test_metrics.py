"""metrics.jsonl: what a line says, that only whole lines are taken up again, and TensorBoard beside it."""

import json
import math
import sys
import time

import pytest
import torch

from layerskip_moe.training import Losses, train
from layerskip_moe.training.balance import balance_metrics
from layerskip_moe.training.metrics import MetricsWriter, train_record


def some_losses(**changes):
    load = {1: torch.tensor([6, 2, 0, 8]), 3: torch.tensor([4, 4, 4, 4])}
    losses = Losses(
        total=torch.tensor(2.5, requires_grad=True),
        exits={2: torch.tensor(3.0), 4: torch.tensor(2.0)},
        distillation={},
        balance=torch.tensor(1.25),
        router_z=torch.tensor(0.5),
        load=load,
        active_experts=None,
    )
    return losses._replace(**changes)


def strictly(line):
    """json.loads without Python's own NaN and Infinity, which other readers of JSON refuse."""

    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    return json.loads(line, parse_constant=refuse)


def lines_of(folder):
    return [strictly(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_train_record_holds_what_was_measured():
    seconds = {"forward": 0.25, "backward": 0.5}
    record = train_record(some_losses(), learning_rate=1e-3, gradient_norm=0.7, speed=1000.0, seconds=seconds)
    violations = [balance_metrics(load)["max_violation"] for load in some_losses().load.values()]
    assert violations == [1.0, 0.0]
    assert record == {
        "loss": 2.5,
        "perplexity": math.exp(2.0),  # of the last layer
        "exit_losses": {"2": 3.0, "4": 2.0},
        "balance_loss": 1.25,
        "router_z_loss": 0.5,
        "learning_rate": 1e-3,
        "gradient_norm": 0.7,
        "tokens_per_second": 1000.0,
        "seconds": {"forward": 0.25, "backward": 0.5},
        "load": {"1": [6, 2, 0, 8], "3": [4, 4, 4, 4]},
        "max_violation": 0.5,  # mean over layers
    }
    coherent = train_record(some_losses(router_coherence=torch.tensor(0.25)), 1e-3, 0.7, 1000.0, seconds)
    assert coherent == record | {"router_coherence_loss": 0.25}
    taught = train_record(some_losses(distillation={2: torch.tensor(2.75)}), 1e-3, 0.7, 1000.0, seconds)
    assert taught["distillation"] == {"2": 2.75}


def test_a_record_is_json_whatever_happened():
    idle = some_losses(load={0: torch.zeros(4, dtype=torch.int64)}, exits={4: torch.tensor(1e5)})
    for losses in (idle, idle._replace(load={})):  # no token reached an expert; a dense network
        record = train_record(losses, 1e-3, math.inf, 1.0, {})  # a step that float16's scaler skipped
        assert "max_violation" not in record
        read = strictly(json.dumps(record))
        assert read["gradient_norm"] is None and math.isfinite(read["perplexity"])


def test_records_are_on_disk_at_once_and_only_whole_lines_are_taken_up(tmp_path):
    with MetricsWriter(tmp_path, before_step=0) as writer:
        for step in range(4):
            writer.write("train", step, {"loss": 1.0 + step})
            assert lines_of(tmp_path)[-1] == {"split": "train", "step": step, "loss": 1.0 + step}
    path = tmp_path / "metrics.jsonl"
    whole = path.read_text()
    for cut in ('{"split": "train", "step": 2', '{"split": "train", "step": 2, "exit_losses": {"1": 2.0}'):
        path.write_text(whole + cut)  # killed in the middle of a line
        with MetricsWriter(tmp_path, before_step=3) as writer:
            assert [record["step"] for record in writer.records] == [0, 1, 2]
            writer.write("train", 3, {"loss": 4.0})
        assert path.read_text() == whole
    with MetricsWriter(tmp_path, before_step=0) as writer:  # a new run, not a resumed one
        assert writer.records == []
    assert path.read_text() == "" and [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_runs_file_is_what_it_returned(decoder, text, recipe, tmp_path):
    config = recipe(max_steps=5, log_every=2, validate_every=2, exit_distillation=0.5)
    result = train(decoder(), text(), config, tmp_path, progress=False)
    assert lines_of(tmp_path) == result.metrics
    assert [(record["split"], record["step"]) for record in result.metrics] == [
        ("train", 1), ("validation", 1), ("train", 3), ("validation", 3), ("train", 4), ("validation", 4),
    ]  # fmt: skip
    assert not (tmp_path / "tensorboard").exists()


def test_tensorboard_shows_each_step_once_after_a_resume(decoder, text, recipe, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    class Stopped(Exception):
        pass

    def write_until_the_fourth(self, split, step, record):
        if step == 3:
            raise Stopped
        write(self, split, step, record)

    write = MetricsWriter.write
    config = recipe(max_steps=5, checkpoint_every=2, exit_distillation=0.5)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(MetricsWriter, "write", write_until_the_fourth)
        train(decoder(), text(), config, tmp_path, progress=False)
    time.sleep(1)  # files are read in the order of their names: seconds, and then a count, in which 10 is before 9
    result = train(decoder(), text(), config, tmp_path, resume=True, progress=False)
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    records = [record for record in result.metrics if record["split"] == "train"]
    for tag, expected in {
        "train/loss": [record["loss"] for record in records],
        "train/exit_loss/4": [record["exit_losses"]["4"] for record in records],
        "train/seconds/exit loss": [record["seconds"]["exit loss"] for record in records],
        "validation/perplexity/1": [r["perplexity"][0] for r in result.metrics if r["split"] == "validation"],
    }.items():
        events = board.Scalars(tag)
        assert [event.step for event in events] == list(range(5))
        assert [event.value for event in events] == pytest.approx(expected)
