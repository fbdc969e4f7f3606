"""Reading metrics.jsonl."""

import json

import pytest

from layerskip_moe.analysis import read_metrics


def test_reads_records_in_order(tmp_path):
    records = [{"split": "train", "step": 0, "loss": 3.5}, {"split": "validation", "step": 0, "perplexity": [2.0]}]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert read_metrics(path) == records


def test_a_cut_off_last_line_is_left_out_with_a_warning(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 1, "lo')
    with pytest.warns(UserWarning, match="incomplete"):
        assert read_metrics(path) == [{"step": 0}]


@pytest.mark.parametrize("bad", ["{broken", "[1, 2]", ""])
def test_a_bad_line_is_named(tmp_path, bad):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 0}}\n{bad}\n{{"step": 2}}\n')
    with pytest.raises(ValueError, match="Line 2"):
        read_metrics(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="no metrics file"):
        read_metrics(tmp_path / "metrics.jsonl")
