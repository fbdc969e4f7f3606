"""compare_decoding: its arithmetic on made-up timings, then a real tiny model."""

import json
from dataclasses import dataclass

import pytest
import torch

from layerskip_moe.analysis import ContinuationScore, score_continuations
from layerskip_moe.bench import compare_decoding, decoding
from layerskip_moe.bench.decoding import first_difference
from layerskip_moe.generation import Autoregressive, Generation, GenerationStats, SelfSpeculative, generate
from layerskip_moe.nn import ModelConfig, MoEDecoder


@dataclass
class Fake:
    """A strategy whose seconds per prompt are given, the warm-up's first."""

    name: str
    seconds: list
    outputs: list
    drafted: int = 0
    accepted: int = 0
    rounds: int = 4


@pytest.fixture
def calls(monkeypatch):
    """Replaces generate by one that takes its answers from Fake strategies; what it was called with."""
    log = []

    def fake_generate(model, prompts, strategy, **settings):
        (prompt,) = prompts
        run = sum(name == strategy.name for name, *_ in log)
        log.append((strategy.name, prompt, settings))
        tokens = strategy.outputs[0 if run == 0 else run - 1]
        stats = GenerationStats(
            generated=len(tokens), rounds=strategy.rounds, layers_run=3 * len(tokens),
            drafted_by_position=[strategy.drafted], accepted_by_position=[strategy.accepted],
            prefill_seconds=float(run), decode_seconds=strategy.seconds[run],
        )  # fmt: skip
        return Generation([tokens], None, [[3] * len(tokens)], stats, [stats])

    def fake_score(model, prompts, outputs):
        return ContinuationScore(perplexity=sum(map(sum, outputs)), agreement=0.5, tokens=sum(map(len, outputs)))

    monkeypatch.setattr(decoding, "generate", fake_generate)
    monkeypatch.setattr(decoding, "score_continuations", fake_score)
    return log


def _compare(strategies, prompts, **settings):
    return compare_decoding(None, prompts, {s.name: s for s in strategies}, progress=False, **settings)


def test_the_arithmetic_by_hand(calls):
    same, other = [1, 2, 3, 4], [1, 2, 9, 4]
    plain = Fake("plain", [99.0, 4.0, 2.0, 8.0], [same] * 3)
    # Tokens/s: plain 1, 2, 0.5; fast 2, 4, 2, so 2, 2, 4 times as fast; slow 0.5, 0.5, 0.5, so 1/2, 1/4, 1.
    fast = Fake("fast", [99.0, 2.0, 1.0, 2.0], [same, other, same], drafted=6, accepted=3, rounds=2)
    slow = Fake("slow", [99.0, 6.0, 8.0, 8.0], [same[:3], same, other])
    compared = _compare([plain, fast, slow], [[1], [2], [3]], max_new_tokens=4, temperature=0.8, top_p=0.9, seed=5)
    baseline, quick, tardy = compared.strategies

    assert (compared.prompts, compared.max_new_tokens, compared.temperature) == (3, 4, 0.8)
    assert (compared.top_p, compared.seed) == (0.9, 5)
    assert [row.name for row in compared.strategies] == ["plain", "fast", "slow"]
    assert baseline.tokens_per_second_by_prompt == [1.0, 2.0, 0.5]
    assert baseline.tokens_per_second == 1.0 and baseline.speed_up == 1.0
    assert baseline.speed_up_quartiles == (1.0, 1.0)
    assert baseline.identical == 3 and baseline.first_differences == {}
    assert baseline.acceptance_rate is None and baseline.exit_layer is None and baseline.draft_length is None

    assert quick.tokens_per_second == 2.0 and quick.speed_up == 2.0 and quick.speed_up_quartiles == (2.0, 3.0)
    assert (quick.drafted, quick.accepted, quick.acceptance_rate) == (18, 9, 0.5)
    assert (quick.drafted_by_position, quick.accepted_by_position) == ([18], [9])
    assert quick.mean_layers == 3.0 and quick.layers_run == [[3] * 4] * 3
    assert quick.perplexity == 10 + 16 + 10 and quick.agreement == 0.5  # of all its outputs together
    assert quick.tokens_per_verification == 2.0
    assert quick.identical == 2 and quick.first_differences == {1: 2}
    assert quick.distinct_4grams == pytest.approx(2 / 3)
    assert quick.prefill_seconds == 2.0  # the median of runs 1, 2, 3: the warm-up's 0 is left out
    assert quick.tokens == [same, other, same]

    # Speed-up is the median of ratios on the same prompt (1/2, 1/4, 1), not the ratio of medians (0.5 / 1).
    assert tardy.speed_up == 0.5 and tardy.speed_up_quartiles == (0.375, 0.75)
    assert tardy.identical == 1 and tardy.first_differences == {0: 3, 2: 2}


def test_speed_up_is_a_median_of_paired_ratios(calls):
    plain = Fake("plain", [1.0, 1.0, 10.0, 100.0], [[1]] * 3)
    other = Fake("other", [1.0, 10.0, 2.5, 50.0], [[1]] * 3)  # ratios 0.1, 4, 2; medians of speed 0.1 and 0.1
    compared = _compare([plain, other], [[1]] * 3, max_new_tokens=1)
    assert compared.strategies[1].tokens_per_second == compared.strategies[0].tokens_per_second == 0.1
    assert compared.strategies[1].speed_up == pytest.approx(2.0)


def test_order_warm_up_and_seeds(calls):
    strategies = [Fake(name, [1.0] * 5, [[1]] * 4) for name in "abc"]
    _compare(strategies, [[10], [11], [12], [13]], max_new_tokens=1, temperature=0.5, seed=100)
    warm_up, timed = calls[:3], calls[3:]
    assert [(name, prompt) for name, prompt, _ in warm_up] == [("a", [10]), ("b", [10]), ("c", [10])]
    assert "".join(name for name, *_ in timed) == "abc" + "bca" + "cab" + "abc"
    assert [prompt for _, prompt, _ in timed] == [[10 + i] for i in range(4) for _ in range(3)]
    assert [settings["seed"] for *_, settings in timed] == [100 + i for i in range(4) for _ in range(3)]
    assert all(s["temperature"] == 0.5 and s["max_new_tokens"] == 1 for *_, s in calls)


def test_with_fewer_prompts_than_strategies_the_turns_are_spread(calls):
    names = "abcdef"
    _compare([Fake(name, [1.0] * 4, [[1]] * 3) for name in names], [[10], [11], [12]], max_new_tokens=1)
    assert "".join(name for name, *_ in calls[6::6]) == "ace"


@pytest.mark.parametrize(
    ("one", "other", "position"),
    [([1, 2], [1, 2], None), ([], [], None), ([1, 2], [1, 3], 1), ([1], [1, 2], 1), ([], [7], 0), ([4], [5], 0)],
)
def test_first_difference(one, other, position):
    assert first_difference(one, other) == first_difference(other, one) == position


def test_outputs_that_are_the_same_are_scored_once(calls, monkeypatch):
    scored = []

    def score(model, prompts, outputs):
        scored.append([list(output) for output in outputs])
        return ContinuationScore(perplexity=float(len(scored)), agreement=1.0, tokens=4)

    monkeypatch.setattr(decoding, "score_continuations", score)
    texts = {"plain": [[1], [2]], "same": [[1], [2]], "other": [[1], [3]], "turned": [[2], [1]], "again": [[1], [3]]}
    strategies = [Fake(name, [1.0] * 3, outputs) for name, outputs in texts.items()]
    compared = _compare(strategies, [[10], [11]], max_new_tokens=1)
    assert scored == [texts["plain"], texts["other"], texts["turned"]]
    assert [row.perplexity for row in compared.strategies] == [1.0, 1.0, 2.0, 3.0, 2.0]


def test_nothing_to_compare_is_refused():
    with pytest.raises(ValueError, match="at least one of each"):
        compare_decoding(None, [], {"plain": Autoregressive()})
    with pytest.raises(ValueError, match="at least one of each"):
        compare_decoding(None, [[1]], {})


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_real_model(temperature):
    config = ModelConfig(
        vocab_size=19, n_layers=3, d_model=8, n_heads=2, d_ff=8, num_experts=4, max_seq_len=32, init_std=0.4
    )
    model = MoEDecoder(config).double().train()
    prompts = [[1, 2, 3], [4], [5, 6]]
    strategies = {"plain": Autoregressive(), "exit 1": SelfSpeculative(1, 2), "exit 3": SelfSpeculative(3, 4)}
    compared = compare_decoding(
        model, prompts, strategies, max_new_tokens=12, temperature=temperature, seed=3, progress=False
    )
    plain, early, whole = compared.strategies
    assert (early.exit_layer, early.draft_length, whole.exit_layer) == (1, 2, 3)
    for row in compared.strategies:
        assert row.identical == 3 and row.tokens == plain.tokens
        assert min(row.tokens_per_second, row.speed_up, row.prefill_seconds) > 0
    assert plain.tokens_per_verification == 1.0 and plain.drafted == 0
    assert 0 < early.acceptance_rate < 1 < early.tokens_per_verification <= 3
    assert whole.acceptance_rate == 1.0  # the whole model agrees with itself
    assert plain.mean_layers == early.mean_layers == 3.0 and plain.threshold is None
    score = score_continuations(model, prompts, plain.tokens)
    assert (plain.perplexity, plain.agreement) == (score.perplexity, score.agreement)
    assert sum(early.drafted_by_position) == early.drafted and len(early.drafted_by_position) == 2
    again = generate(model, [prompts[2]], SelfSpeculative(1, 2), max_new_tokens=12, temperature=temperature, seed=3 + 2)
    assert again.tokens[0] == early.tokens[2]
    assert model.training and all(p.dtype == torch.float64 for p in model.parameters())


def test_as_report_is_plain_and_without_tokens(calls):
    strategies = [Fake("plain", [1.0] * 3, [[1, 2]] * 2), Fake("other", [1.0] * 3, [[1, 2], [1, 3]])]
    compared = _compare(strategies, [[1], [2]], max_new_tokens=2)
    entry = compared.as_report()
    assert json.loads(json.dumps(entry))["strategies"][1]["first_differences"] == {"1": 1}
    assert all("tokens" not in row and "layers_run" not in row for row in entry["strategies"])
    assert compared.strategies[1].tokens == [[1, 2], [1, 3]]
    assert entry["strategies"][0]["distinct_4grams"] is None  # two tokens hold no 4-gram


def test_a_comparison_can_be_reported(calls, tmp_path):
    from layerskip_moe.analysis import write_report

    strategies = [Fake("plain", [1.0] * 3, [[1, 2]] * 2), Fake("other", [0.5] * 3, [[1, 2], [1, 3]], drafted=4)]
    strategies[1].exit_layer, strategies[1].draft_length = 2, 4
    entry = _compare(strategies, [[1], [2]], max_new_tokens=2).as_report()
    text = write_report(tmp_path, {"decoding": [entry]}).read_text(encoding="utf-8")
    assert "2.00 times as fast" in text and "1 of 2 are" in text and "2 (token 2)" in text
