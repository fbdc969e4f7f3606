"""Checkpoint folders: whole or not at all, found out when damaged, harmless to read, and old ones gone only in time."""

import errno
import json
import os
import pickle
import random
import re
import resource
import shutil
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from layerskip_moe.training import checkpoint as files
from layerskip_moe.training import has_checkpoint, tensor_files, train
from layerskip_moe.training.checkpoint import newest_checkpoint, remove_checkpoints, save_checkpoint
from layerskip_moe.training.tensor_files import list_tensors, read_tensors, write_tensors


def tensors_of(step):
    return {
        "a.x": torch.full((3, 5), float(step)),
        "a.none": torch.empty(0, 4),
        "b.count": torch.tensor(step),
        "b.on": torch.tensor([True, False]),
        "b.codes": torch.arange(256, dtype=torch.uint8),
        "b.half": torch.tensor([0.5, -torch.inf], dtype=torch.bfloat16),
        "b.wide": torch.tensor([torch.nan, 1 / 3], dtype=torch.float64),
    }


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype and one[name].shape == other[name].shape, name
        assert torch.equal(one[name].view(-1).view(torch.uint8), other[name].view(-1).view(torch.uint8)), name


def names_in(out_dir):
    return sorted(path.name for path in (out_dir / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A folder with two checkpoints, of steps 4 and 8; tests copy it."""
    folder = tmp_path_factory.mktemp("run")
    for step in (4, 8):
        save_checkpoint(folder, {"step": step, "note": "é", "best": None}, tensors_of(step))
    return folder


@pytest.fixture
def copied(two, tmp_path):
    return shutil.copytree(two, tmp_path / "run")


def test_what_is_saved_is_loaded(tmp_path, saved):
    facts = {
        "step": 3,
        "best": None,
        "loss": 0.1 + 0.2,
        "big": 2**70,
        "note": "ü",
        "list": [1, [2.5, "x"]],
        "yes": True,
    }
    path = save_checkpoint(tmp_path, facts, tensors_of(3))
    assert path == tmp_path / "checkpoints" / "step-00000003"
    told, tensors = saved(tmp_path)
    assert {name: told[name] for name in facts} == facts
    assert_equal(tensors, tensors_of(3))
    assert names_in(tmp_path) == ["step-00000003"]
    for file in path.iterdir():
        assert file.name == "state.json" or file.suffix == ".safetensors"  # and no pickle


def test_a_file_is_what_torch_and_safetensors_write(tmp_path):
    """Safetensors reads it as it was, and torch's own writer tells its reader the same."""
    path = tmp_path / "tensors-00000.safetensors"
    digest = write_tensors(path, tensors_of(3))
    assert digest == files.sha256(path)
    assert_equal(load_file(path), tensors_of(3))
    theirs = dcp.HuggingFaceStorageWriter(str(tmp_path / "theirs"), save_distributed=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(tensors_of(3), storage_writer=theirs, no_dist=True)
    [other] = (tmp_path / "theirs").iterdir()
    with safe_open(path, "pt") as one, safe_open(other, "pt") as two:
        told, wanted = one.metadata(), two.metadata()
        assert json.loads(told.pop("DCP_SHARDING_INFO")) == json.loads(wanted.pop("DCP_SHARDING_INFO"))
        assert told == wanted
    assert list_tensors(tmp_path) == list_tensors(tmp_path / "theirs")


def test_parts_of_several_processes_are_one_tensor(tmp_path):
    whole = torch.arange(24.0).view(6, 4)
    for rank, rows in enumerate((slice(0, 4), slice(4, 6))):
        about = {"DCP_SHARDING_INFO": json.dumps({"w": {"saved_offsets": [rows.start, 0]}})}
        save_file({"w": whole[rows].clone()}, tmp_path / f"tensors-{rank:05}.safetensors", metadata=about)
    assert list_tensors(tmp_path) == {"w": ((6, 4), torch.float32)}
    into = {"w": torch.empty(6, 4)}
    read_tensors(tmp_path, into)
    assert torch.equal(into["w"], whole)


def test_the_newest_two_are_kept(tmp_path):
    for step in (1, 2, 3, 10, 99_999_999, 100_000_000):
        save_checkpoint(tmp_path, {"step": step}, tensors_of(1))
        assert newest_checkpoint(tmp_path).facts["step"] == step
    assert names_in(tmp_path) == ["step-100000000", "step-99999999"]
    remove_checkpoints(tmp_path)
    assert list(tmp_path.iterdir()) == [] and not has_checkpoint(tmp_path)
    remove_checkpoints(tmp_path)  # nothing to do


def test_they_are_removed_with_the_newest_last(copied, monkeypatch):
    def killed(path, **_):
        if path.exists():
            raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        remove_checkpoints(copied)
    assert newest_checkpoint(copied).facts["step"] == 8
    assert names_in(copied) == [".step-00000004.gone", "step-00000008"]


def test_what_is_cut_short_is_not_one_of_the_two(copied):
    (copied / "checkpoints" / "step-00000008" / "state.json").write_text("")
    save_checkpoint(copied, {"step": 12}, tensors_of(12))
    assert names_in(copied) == ["step-00000004", "step-00000012"]


def test_a_damaged_one_of_the_same_step_is_replaced(copied, saved):
    (copied / "checkpoints" / "step-00000008" / "state.json").write_text("{}")
    with pytest.warns(UserWarning, match=r"step-00000008 is damaged \(state.json cannot be read\) and passed over"):
        assert newest_checkpoint(copied).facts["step"] == 4
    save_checkpoint(copied, {"step": 8}, tensors_of(7))
    assert_equal(saved(copied)[1], tensors_of(7))
    assert names_in(copied) == ["step-00000004", "step-00000008"]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_damaged_byte_gets_in(two, saved, tmp_path, data):
    """Any byte of any file changed, any file cut or lengthened: the checkpoint before it is taken, whole."""
    folder = tmp_path / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(two, folder)
    newest = folder / "checkpoints" / "step-00000008"
    file = data.draw(st.sampled_from(sorted(newest.iterdir())))
    whole = file.read_bytes()
    how = data.draw(st.sampled_from(["flip", "cut", "lengthen", "remove"]))
    at = data.draw(st.integers(0, len(whole) - 1))
    if how == "flip":
        changed = bytes([whole[at] ^ data.draw(st.integers(1, 255))])
        file.write_bytes(whole[:at] + changed + whole[at + 1 :])
    elif how == "cut":
        file.write_bytes(whole[:at])
    elif how == "lengthen":
        file.write_bytes(whole + data.draw(st.binary(min_size=1, max_size=9).filter(lambda more: more.strip())))
    else:
        file.unlink()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        facts, tensors = saved(folder)
    assert facts["step"] in (4, 8)
    assert_equal(tensors, tensors_of(facts["step"]))
    if facts["step"] == 4:
        assert [str(newest) in str(warning.message) for warning in told] == [True]
    else:  # white space of state.json says nothing
        assert file.name == "state.json" and json.loads(file.read_text()) == json.loads(whole)


def test_where_none_is_whole_all_are_named(copied):
    for path in (copied / "checkpoints").iterdir():
        next(path.glob("*.safetensors")).unlink()
    with warnings.catch_warnings(), pytest.raises(ValueError, match=r"no checkpoint .* is whole.*08: .*04: .*remove"):
        warnings.simplefilter("ignore")
        newest_checkpoint(copied)


class Harmful:
    """Unpickled, it would make a folder."""

    def __reduce__(self):
        return os.mkdir, ("harm",)


def sealed(path, **changes):
    """Write changes to a state.json under the digest that belongs to them, as an enemy would."""
    values = json.loads(path.read_text())
    values.pop("sha256")
    values |= changes
    path.write_text(json.dumps(values | {"sha256": files._digest(values)}))


@pytest.mark.parametrize(
    "other",
    ["pickle", "torch", "deep", "list", "huge", "outside", "format", "step", "no files", "header", "folder", "extra"],
)
def test_what_is_no_checkpoint_is_passed_over_and_not_executed(copied, monkeypatch, other):
    monkeypatch.chdir(copied)
    newest = copied / "checkpoints" / "step-00000008"
    state, shard = newest / "state.json", next(newest.glob("*.safetensors"))
    if other == "pickle":
        state.write_bytes(pickle.dumps(Harmful()))
    elif other == "torch":
        torch.save({"a": Harmful()}, shard)
        sealed(state, files={shard.name: {"bytes": shard.stat().st_size, "sha256": files.sha256(shard)}})
    elif other == "deep":
        state.write_text("[" * 100_000)
    elif other == "list":
        state.write_text("[1, 2]")
    elif other == "huge":
        with open(state, "rb+") as file:
            file.truncate(2**40)
    elif other == "outside":
        shard.rename(copied / shard.name)
        sealed(state, files={f"../../{shard.name}": json.loads(state.read_text())["files"][shard.name]})
    elif other == "format":
        sealed(state, format=2)
    elif other == "step":
        sealed(state, step=80)
    elif other == "no files":
        sealed(state, files=3)
    elif other == "header":  # of a terabyte
        shard.write_bytes((2**40).to_bytes(8, "little") + shard.read_bytes()[8:])
        sealed(state, files={shard.name: {"bytes": shard.stat().st_size, "sha256": files.sha256(shard)}})
    elif other == "folder":
        shard.unlink()
        shard.mkdir()
    else:
        shutil.copy(shard, newest / "more.safetensors")
    with pytest.warns(UserWarning, match=re.escape(f"{newest} is damaged")):
        assert newest_checkpoint(copied).facts["step"] == 4
    assert not (copied / "harm").exists()


def full_disk(patch, after):
    """The disk takes so many bytes of tensors, and then says that it is full."""

    class Limited:
        def __init__(self, path, mode):
            self.file, self.room = open(path, mode), after  # noqa: SIM115

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

        def write(self, content):
            self.file.write(content[: self.room])
            self.room -= len(content)
            if self.room < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    patch.setattr(tensor_files, "open", Limited, raising=False)


@pytest.mark.parametrize(
    "fault", ["full", "full state", "limit", "read-only", "no rename", "bad disk", "not JSON", "^C"]
)
def test_a_save_that_fails_leaves_the_older_ones_alone(copied, saved, monkeypatch, fault):
    def refuse(*_):
        raise PermissionError(errno.EROFS, os.strerror(errno.EROFS))

    def write_to_a_full_disk(*_, **__):
        with open("/dev/full", "w") as file:
            file.write("x")

    def interrupted(path):
        raise KeyboardInterrupt

    facts, kind, sentence = {"step": 12}, OSError, None
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with monkeypatch.context() as patch:
        if fault == "full":
            full_disk(patch, after=500)
            sentence = r"no room for the checkpoint of step 12 in .*checkpoints, where .* MB are free; make room"
        elif fault == "full state":
            patch.setattr(files.Path, "write_text", write_to_a_full_disk)
            sentence = "no room for the checkpoint of step 12"
        elif fault == "limit":
            resource.setrlimit(resource.RLIMIT_FSIZE, (700, limits[1]))
            sentence = "no room for the checkpoint of step 12"
        elif fault == "read-only":
            patch.setattr(os, "mkdir", refuse)
            sentence = "the checkpoint of step 12 cannot be written, for .*checkpoints is read-only"
        elif fault == "no rename":
            patch.setattr(os, "replace", refuse)
            sentence = "the checkpoint of step 12 cannot be written"
        elif fault == "bad disk":
            patch.setattr(files, "sha256", lambda path: "another")
            sentence = "step-00000012 was not read back as it was written"
        elif fault == "not JSON":
            facts, kind = {"step": 12, "loss": float("nan")}, ValueError
        else:
            patch.setattr(files, "list_tensors", interrupted)
            kind = KeyboardInterrupt
        try:
            with pytest.raises(kind, match=sentence):
                save_checkpoint(copied, facts, tensors_of(12))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names_in(copied) == ["step-00000004", "step-00000008"]
    assert_equal(saved(copied)[1], tensors_of(8))


def test_a_disk_that_fills_up_ends_a_run_with_a_sentence_and_it_resumes(decoder, text, recipe, tmp_path, monkeypatch):
    config = recipe(max_steps=4, checkpoint_every=1)
    unbroken, model = decoder(), decoder()
    train(unbroken, text(), config, tmp_path / "unbroken", progress=False)

    def third(path, tensors):
        if "step-00000003" in str(path):
            full_disk(patch, after=100)
        return write_tensors(path, tensors)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no room for the checkpoint of step 3"):
        patch.setattr(files, "write_tensors", third)
        train(model, text(), config, tmp_path / "run", progress=False)
    assert names_in(tmp_path / "run") == ["step-00000001", "step-00000002"]
    train(model, text(), config, tmp_path / "run", resume=True, progress=False)
    for name, tensor in unbroken.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_what_a_killed_run_was_writing_is_removed(decoder, text, recipe, tmp_path):
    train(decoder(), text(), recipe(), tmp_path, progress=False)
    root = tmp_path / "checkpoints"
    for name in (".step-00000004.123.tmp", ".step-00000001.gone"):
        (root / name).mkdir()
        (root / name / "x.safetensors").write_bytes(random.Random(0).randbytes(50))
    train(decoder(), text(), recipe(), tmp_path, resume=True, progress=False)
    assert names_in(tmp_path) == ["step-00000002", "step-00000003"]
