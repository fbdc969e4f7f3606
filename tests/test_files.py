"""Writing that never leaves half a file or folder and says why it failed, and values as JSON has them."""

import errno
import json
import math
import os
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest

from layerskip_moe.files import explaining_failure, plain, replacing, replacing_folder, set_aside


def test_replacing_takes_the_place_only_when_all_is_written(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    with replacing(path) as beside:
        beside.write_text("old")
        assert not path.exists()
    assert path.read_text() == "old"
    with pytest.raises(RuntimeError), replacing(path) as beside:
        beside.write_text("half of the ne")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]


def test_an_error_leaves_no_folder_behind_that_was_made_for_the_file(tmp_path):
    (tmp_path / "here").mkdir()
    for path in (tmp_path / "here" / "new" / "deep" / "file.txt", tmp_path / "here" / "file.txt"):
        with pytest.raises(RuntimeError), replacing(path) as beside:
            beside.write_text("half")
            raise RuntimeError
        assert list(tmp_path.rglob("*")) == [tmp_path / "here"]
    with pytest.raises(RuntimeError), replacing(tmp_path / "new" / "file.txt"):
        (tmp_path / "new" / "other.txt").write_text("somebody else's")
        raise RuntimeError
    assert list((tmp_path / "new").iterdir()) == [tmp_path / "new" / "other.txt"]


def test_a_folder_takes_the_place_only_when_all_is_written(tmp_path):
    path = tmp_path / "deep" / "folder"
    for content in ("old", "new"):
        with replacing_folder(path) as beside:
            (beside / content).write_text(content)
            assert not (path / content).exists() and list(beside.iterdir()) == [beside / content]
        assert [file.read_text() for file in path.iterdir()] == [content]
    with pytest.raises(RuntimeError), replacing_folder(path) as beside:
        (beside / "newer").write_text("half of the ne")
        raise RuntimeError
    assert list(path.parent.iterdir()) == [path] and list(path.iterdir()) == [path / "new"]
    with pytest.raises(RuntimeError), replacing_folder(tmp_path / "other" / "folder"):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == [tmp_path / "deep"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_stop_between_the_two_renames_of_a_folder_loses_neither(tmp_path, monkeypatch, error):
    path, renames, replace = tmp_path / "deep" / "folder", [], os.replace
    with replacing_folder(path) as beside:
        (beside / "old").write_text("old")

    def stopping(*paths):
        renames.append(paths)
        if len(renames) == 2:
            raise error
        replace(*paths)

    monkeypatch.setattr(os, "replace", stopping)
    with pytest.raises(error), replacing_folder(path) as beside:
        (beside / "new").write_text("new")
    assert len(renames) == 3 and list(path.parent.iterdir()) == [path] and list(path.iterdir()) == [path / "old"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a process of its own")
def test_a_kill_between_the_two_renames_leaves_the_older_folder_to_be_found(tmp_path):
    path = tmp_path / "folder.of.mine"
    with replacing_folder(path) as beside:
        (beside / "old").write_text("old")
    assert set_aside(tmp_path) == {}
    child = os.fork()
    if not child:
        renames, replace = [], os.replace
        os.replace = lambda *paths: os.kill(os.getpid(), signal.SIGKILL) if renames else renames.append(replace(*paths))
        with replacing_folder(path) as beside:
            (beside / "new").write_text("new")
        os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL and not path.exists()
    [(name, before)] = set_aside(tmp_path).items()
    assert name == path and [file.name for file in before.iterdir()] == ["old"]
    path.mkdir()
    assert set_aside(tmp_path) == {}, "there is another now"


def test_a_folder_that_a_killed_process_of_our_number_had_moved_away_is_no_hindrance(tmp_path):
    path, before = tmp_path / "folder", tmp_path / f".folder.{os.getpid()}.old"
    for folder in (path, before):
        folder.mkdir()
        (folder / "old").write_text("old")
    with replacing_folder(path) as beside:
        (beside / "new").write_text("new")
    assert list(tmp_path.iterdir()) == [path] and list(path.iterdir()) == [path / "new"]


def test_all_of_a_folder_is_on_the_disk_before_it_takes_the_place(tmp_path, monkeypatch):
    """In this order: each file, the list of them, the rename, the list that it is in."""
    done, replace = [], os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: done.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    monkeypatch.setattr(os, "replace", lambda *paths: (done.append("rename"), replace(*paths)))
    with replacing_folder(tmp_path / "folder") as beside:
        (beside / "a").write_text("a")
    assert done == [str(beside / "a"), str(beside), "rename", str(tmp_path)]


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        (errno.ENOSPC, "there is no room for the thing in {}, where .* MB are free; make room, or take another folder"),
        (errno.EDQUOT, "there is no room for the thing in {}"),
        (errno.EROFS, "the thing cannot be written, for {} is read-only for this user"),
        (errno.EACCES, "the thing cannot be written, for {} is read-only for this user"),
        (errno.EIO, "Input/output error"),
    ],
)
def test_a_failure_is_explained(tmp_path, code, sentence):
    with pytest.raises(OSError, match=sentence.format(tmp_path)) as raised, explaining_failure("the thing", tmp_path):
        raise OSError(code, os.strerror(code), "some file")
    assert raised.value.errno == code


def test_plain_values_are_what_json_has():
    @dataclass
    class Measured:
        losses: tuple
        of: dict

    values = {
        "run": Measured((1.5, math.inf), {3: [-math.inf, {"at": math.nan}]}),
        "at": Path("a/b"),
        "n": [1, True, None],
    }
    told = plain(values)
    assert told == {
        "run": {"losses": [1.5, None], "of": {3: [None, {"at": None}]}},
        "at": str(Path("a/b")),
        "n": [1, True, None],
    }
    json.dumps(told, allow_nan=False)
    assert values["run"].of[3][0] == -math.inf  # what it was given stays as it was
