"""Writing that never leaves half a file, and values as JSON has them."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import pytest

from layerskip_moe.files import plain, replacing


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
