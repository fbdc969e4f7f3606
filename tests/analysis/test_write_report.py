"""report.md says what report.json holds, and copes with what is missing."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from layerskip_moe.analysis import report as report_room
from layerskip_moe.analysis import write_report


def _numbers(value):
    """Every number in the JSON, those within texts and names included."""
    if isinstance(value, dict):
        counted_from_1 = [n + 1 for pair in value.get("first_differences", {}).items() for n in map(int, pair)]
        return counted_from_1 + [n for key, part in value.items() for n in (*_numbers(key), *_numbers(part))]
    if isinstance(value, list):
        return [n for part in value for n in _numbers(part)] + [float(i + 1) for i in range(len(value))]
    if isinstance(value, str):
        return [float(n) for n in re.findall(r"\d+(?:\.\d+)?", value)]
    return [] if value is None else [float(value)]


def test_every_figure_stated_is_in_the_json(written, full_report):
    text, held = written(full_report)
    numbers = _numbers(held)
    stated = re.sub(r"(?<=\d),(?=\d{3})", "", text)
    for match in re.finditer(r"\d+(?:\.(\d+))?(%?)", stated):
        digits, percent = len(match[1] or ""), match[2]
        value = float(match[0].removesuffix("%"))
        scales = (100,) if percent else (1, 1000)  # prefill is stated in milliseconds
        assert any(abs(scale * number - value) <= 0.5 * 10**-digits + 1e-9 for number in numbers for scale in scales), (
            f"{match[0]} in: {stated[max(0, match.start() - 60) : match.end() + 20]!r}"
        )


def test_the_json_holds_what_was_given(written, full_report):
    _, held = written(full_report)
    assert {name: held[name] for name in full_report} == full_report


def test_constants_machine_versions_and_command_are_listed(written, full_report):
    text, _ = written(full_report)
    assert "```\npython main.py --n_layers 3 --dataset 'a|b'\n```" in text
    for row in (
        "| `learning_rate` | 0.0015 |",
        "| `max_steps` | - |",
        "| `dataset` | a\\|b |",
        "| `cpu` | Some CPU @ 2.1 |",
        "| `torch` | 2.13.0 |",
        "| `d_model` | 192 |",
        "| text | 11.3 |",
    ):
        assert row in text.splitlines()


def test_every_table_has_as_many_cells_in_each_row(written, full_report):
    text, _ = written(full_report)
    for table in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(widths) == 1 and len(table.splitlines()) >= 3


def test_continuations_stay_within_their_fences(written):
    texts = ["a ``` b", "`````", "# not a heading\n\n## nor this", "~~~"]
    text, _ = written({"continuations": [{"prompt": t, "plain": t, "self_speculative": t + "!"} for t in texts]})
    blocks, fence, inside = [], None, []
    for line in text.splitlines():  # as CommonMark reads fences
        if fence is None and re.fullmatch("`{3,}", line):
            fence, inside = line, []
        elif fence is not None and re.fullmatch(fence + "`*", line):
            blocks.append("\n".join(inside))
            fence = None
        elif fence is not None:
            inside.append(line)
    assert fence is None
    assert blocks == [part for t in texts for part in (t, t, t + "!")]


def test_equal_continuations_are_told_once(written, full_report):
    text, _ = written({"continuations": full_report["continuations"][:1]})
    assert text.count("return x") == 1 and "the same text" in text


@pytest.mark.parametrize("section", report_room.SECTIONS)
def test_any_section_may_be_missing_or_stand_alone(written, full_report, section):
    alone, _ = written({section: full_report[section]})
    rest, _ = written({name: part for name, part in full_report.items() if name != section})
    none, _ = written({**full_report, section: None})
    assert none == rest
    assert len(alone) > len(written({})[0])


def test_an_empty_report_says_that_nothing_was_measured(written):
    text, held = written({})
    assert "No self-speculative decoding was measured" in text
    assert held == {"summary": [], "findings": {}, "figures": {}}


def test_one_layer_no_experts_no_validation_no_speculation(written, full_report):
    only_plain = full_report["decoding"][0]
    del only_plain["strategies"][1:]
    text, _ = written(
        {
            "exits": {"perplexity": [50.0], "agreement": [1.0], "tokens": 100},
            "experts": {"load": {}, "metrics": {}, "tokens": 100},
            "training": {**full_report["training"], "best_validation": None, "final_losses": {"1": 4.0}},
            "decoding": [only_plain],
        },
        draw=True,
    )
    assert "No self-speculative decoding was measured" in text
    assert "| 1 | 50.00 | 100.0% |" in text and "No layer of this model holds experts" in text
    assert "Best held-out" not in text


def test_many_experts_are_left_to_the_figure(written):
    load = {0: list(range(64))}
    text, held = written({"experts": {"load": load, "metrics": {0: {"max_violation": 1.0}}, "tokens": 1008}})
    assert "expert 63" not in text and held["experts"]["load"]["0"] == load[0]


def test_what_json_has_no_number_for_becomes_null(written):
    text, held = written({"exits": {"perplexity": [float("inf"), 50.0], "agreement": [0.5, 1.0], "tokens": 100}})
    assert held["exits"]["perplexity"] == [None, 50.0]
    assert "| 1 | - | 50.0% |" in text


def test_dataclasses_and_paths_are_taken(written):
    @dataclass
    class Exits:
        perplexity: list
        agreement: list
        tokens: int

    _, held = written({"exits": Exits([50.0], [1.0], 10), "constants": {"out_dir": Path("runs")}})
    assert held["exits"] == {"perplexity": [50.0], "agreement": [1.0], "tokens": 10}
    assert held["constants"] == {"out_dir": "runs"}


@pytest.mark.parametrize(
    ("report", "said"), [({"decodings": []}, "decodings"), ({"constants": {"x": object()}}, "numbers, texts")]
)
def test_what_is_no_report_is_refused_before_anything_is_written(tmp_path, report, said):
    with pytest.raises(ValueError, match=said):
        write_report(tmp_path, report)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_report_leaves_the_old_one(written, full_report, tmp_path, monkeypatch):
    before = written(full_report)

    def broken(report):
        raise RuntimeError

    monkeypatch.setattr(report_room, "render", broken)
    with pytest.raises(RuntimeError):
        write_report(tmp_path, {"command": "another"})
    assert (tmp_path / "report.md").read_text(encoding="utf-8") == before[0]
    assert json.loads((tmp_path / "report.json").read_text()) == before[1]
