"""Checkpoint folders: whole or not at all, found out when damaged, harmless to read, and old ones gone only in time."""

import errno
import json
import os
import random
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
from layerskip_moe.training.checkpoint import (
    finish_run,
    is_finished,
    newest_checkpoint,
    remove_checkpoints,
    save_checkpoint,
)
from layerskip_moe.training.tensor_files import list_tensors, read_tensors, write_tensors


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype and one[name].shape == other[name].shape, name
        assert torch.equal(one[name].view(-1).view(torch.uint8), other[name].view(-1).view(torch.uint8)), name


def names_in(out_dir):
    return sorted(path.name for path in (out_dir / "checkpoints").iterdir())


def test_what_is_saved_is_loaded(tensors_of, tmp_path, saved):
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


def test_a_file_is_what_torch_and_safetensors_write(tensors_of, tmp_path):
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


def test_the_newest_two_are_kept(tensors_of, tmp_path):
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


def test_a_finished_run_is_one_until_nothing_of_it_is_left(copied, tensors_of, monkeypatch):
    finish_run(copied)
    assert is_finished(copied) and newest_checkpoint(copied).facts["step"] == 8

    def killed(path, real=files._remove):
        if path.name == "step-00000008":
            raise KeyboardInterrupt
        real(path)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(files, "_remove", killed)
        remove_checkpoints(copied)
    assert is_finished(copied) and names_in(copied) == ["finished", "step-00000008"]
    remove_checkpoints(copied)
    assert not is_finished(copied) and not (copied / "checkpoints").exists()
    save_checkpoint(copied, {"step": 4}, tensors_of(4))
    finish_run(copied)
    save_checkpoint(copied, {"step": 8}, tensors_of(8))
    assert not is_finished(copied)  # it has gone on


def test_what_is_cut_short_is_not_one_of_the_two(tensors_of, copied):
    (copied / "checkpoints" / "step-00000008" / "state.json").write_text("")
    save_checkpoint(copied, {"step": 12}, tensors_of(12))
    assert names_in(copied) == ["step-00000004", "step-00000012"]


def test_a_damaged_one_of_the_same_step_is_replaced(tensors_of, copied, saved):
    (copied / "checkpoints" / "step-00000008" / "state.json").write_text("{}")
    with pytest.warns(UserWarning, match=r"step-00000008 is damaged \(state.json cannot be read\) and passed over"):
        assert newest_checkpoint(copied).facts["step"] == 4
    save_checkpoint(copied, {"step": 8}, tensors_of(7))
    assert_equal(saved(copied)[1], tensors_of(7))
    assert names_in(copied) == ["step-00000004", "step-00000008"]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_damaged_byte_gets_in(tensors_of, two, saved, tmp_path, data):
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
def test_a_save_that_fails_leaves_the_older_ones_alone(tensors_of, copied, saved, monkeypatch, fault):
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
    (root / ".finished.123.tmp").touch()
    train(decoder(), text(), recipe(), tmp_path, resume=True, progress=False)
    assert names_in(tmp_path) == ["finished", "step-00000002", "step-00000003"]
