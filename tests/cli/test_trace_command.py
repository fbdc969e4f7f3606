"""`layerskip-moe trace`, and `layerskip-moe bench policies` on what it wrote."""

import json
from dataclasses import dataclass, replace

import pytest

from layerskip_moe.analysis.trace import load_trace, save_trace
from layerskip_moe.cli import bench_policies, trace
from layerskip_moe.pretrained import load_tokenizer

TINY = ["--prompt-length", 3, "--max-new-tokens", 6, "--num-windows", 2, "--window-length", 5, "--device", "cpu"]


@dataclass(frozen=True)
class Cost:
    """Stands in for the fitted one, which takes seconds and is another every time."""

    layer: float = 0.001

    def round_seconds(self, exit_layers, drafted, experts=None, made=None, staged=None):
        return self.layer * (5 + sum(drafted) + 0.1 * sum(experts))

    def asking_seconds(self, *, stops, made, shadow):
        return 0.0


@pytest.fixture(autouse=True)
def cost_model(monkeypatch):
    monkeypatch.setattr(bench_policies, "CostModel", Cost)
    for command in (trace, bench_policies):
        monkeypatch.setattr(command, "fit_costs", lambda model: (Cost(), Cost(0.0005)))


@pytest.fixture
def recorded(shell, checkpoint, text, tmp_path):
    given = ["--checkpoint", checkpoint, "--dataset", text, "--num-prompts", 3, "--out", "made/trace.npz"]
    code, out, err = shell("trace", *given, *TINY)
    assert code == 0, err
    assert out.splitlines() == [
        "3 prompts of 3 tokens, continued by 6 at each of 2 temperatures, and 2 texts of 5 tokens",
        "made/trace.npz",
    ]
    return tmp_path / "made" / "trace.npz"


def test_a_trace_says_what_it_is_of(recorded, checkpoint):
    found = load_trace(recorded)
    assert [len(texts) for texts in found.continuations().values()] == [3, 3]
    assert list(found.continuations()) == [0.0, 0.8]
    assert [len(text.tokens) for text in found.texts] == [9] * 6 + [5] * 2
    assert found.about["command"].startswith("layerskip-moe trace --checkpoint")
    assert found.about["checkpoint"] == str(checkpoint) and found.about["cost_model"] == {"layer": 0.001}
    assert found.about["int8_cost_model"] == {"layer": 0.0005}
    assert found.about["machine"]["device"] == "cpu" and found.config.n_layers == 5


def test_prompts_from_a_file(shell, checkpoint, tmp_path):
    (tmp_path / "story.txt").write_text("Once upon a time there was a fox. " * 9)
    given = ["--checkpoint", checkpoint, "--prompts", "story.txt", "--out", "t.npz", "--temperatures", 0.5]
    code, _, err = shell("trace", *given, "--num-prompts", 2, *TINY)
    assert code == 0, err
    found = load_trace(tmp_path / "t.npz")
    assert found.about["text"] == "story.txt" and list(found.continuations()) == [0.5]
    ids = load_tokenizer(checkpoint).encode((tmp_path / "story.txt").read_text(), add_special_tokens=False).ids
    for text in found.texts:
        prompt = text.tokens[: text.prompt_length].tolist()
        assert any(ids[start : start + len(prompt)] == prompt for start in range(0, len(ids), len(prompt)))
    code, _, err = shell("trace", *given, "--num-prompts", 2000, *TINY)
    assert code == 1 and "story.txt holds" in err and "not 2000; give a longer text" in err


def test_policies_are_compared_and_written(shell, recorded, tmp_path):
    given = ["bench", "policies", "--trace", recorded, "--max-draft-length", 3, "--resamples", 50]
    code, out, err = shell(*given, "--out", "told")
    assert code == 0, err
    assert "greedy: 3 prompts, 18 new tokens" in out and "temperature 0.8: 3 prompts" in out
    told = json.loads((tmp_path / "told" / "policies.json").read_text())
    assert [comparison["temperature"] for comparison in told["comparisons"]] == [0.0, 0.8]
    assert told["command"].startswith("layerskip-moe bench policies --trace")
    assert told["cost_model"] == {"layer": 0.001} and told["trace"]["fingerprint"]
    assert (tmp_path / "told" / "policies.md").read_text().startswith("# Drafting policies on a trace\n")
    assert (tmp_path / "told" / "policies.png").stat().st_size > 5000
    assert shell(*given)[1] == out


def test_a_trace_is_checked_against_its_model(shell, recorded, checkpoint, tmp_path):
    few = ["--max-draft-length", 2, "--resamples", 5]
    given = ["bench", "policies", "--trace", recorded, "--checkpoint", checkpoint, "--check", *few]
    code, out, err = shell(*given, "--out", "told")
    assert code == 0, err
    assert "decoded for real" in out and "measured / modelled" in out
    told = json.loads((tmp_path / "told" / "policies.json").read_text())
    for comparison in told["comparisons"]:
        rows = {row["name"]: row for row in comparison["check"]}
        assert rows["plain"]["same_rounds"] == rows["best fixed"]["same_rounds"] == rows["DEL"]["same_rounds"] == 3
        assert all(row["same_text"] == 3 for row in rows.values())


def test_another_model_s_trace_is_refused(shell, recorded, checkpoint):
    given = ["bench", "policies", "--trace", recorded, "--checkpoint", checkpoint, "--dtype", "bfloat16"]
    code, out, err = shell(*given)
    assert (code, out) == (1, "") and "was recorded with another model" in err and "or in another --dtype" in err


@pytest.mark.parametrize(
    "about",
    [
        {},
        {"machine": {}},
        {"machine": "mine", "cost_model": {"layer": 0.001}},
        {"machine": {}, "cost_model": 0.001},
        {"machine": {}, "cost_model": {"layer": 0.001, "head": 0.001}},
        {"machine": {}, "cost_model": {}},
    ],
)
def test_a_trace_without_costs_needs_its_model(shell, recorded, about):
    save_trace(replace(load_trace(recorded), about=about), recorded)
    code, out, err = shell("bench", "policies", "--trace", recorded)
    assert (code, out) == (1, "") and "does not tell what its model's rounds cost" in err and "give --checkpoint" in err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["trace", "--checkpoint", "x"], "layerskip-moe trace needs --out;"),
        (["trace", "--checkpoint", "x", "--out", "y", "--num-prompts", 0], "num_prompts=0 must be 1 or more."),
        (["trace", "--checkpoint", "x", "--out", "y", "--window-length", 1], "window_length=1 must be 2 or more."),
        (["bench", "policies"], "layerskip-moe bench policies needs --trace;"),
        (["bench", "policies", "--trace", "x", "--check"], "--check decodes for real, which takes the trace's model;"),
        (["bench", "policies", "--trace", "nowhere.npz"], "nowhere.npz: No such file"),
        (["bench", "polices"], "'polices' is nothing to measure; did you mean policies?"),
    ],
)
def test_mistakes_are_one_sentence(shell, arguments, sentence):
    code, out, err = shell(*arguments)
    assert (code, out) == (1, "") and err.startswith(f"error: {sentence}") and err.count("\n") == 1
