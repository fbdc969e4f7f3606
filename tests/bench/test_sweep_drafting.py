"""sweep_drafting: every pair once, the fastest chosen, exact on a real model."""

import json
import math
from types import SimpleNamespace

import pytest

from layerskip_moe.bench import sweep, sweep_drafting
from layerskip_moe.nn import ModelConfig, MoEDecoder


def test_every_pair_stands_where_it_belongs(monkeypatch):
    def fake_compare(model, prompts, strategies, **settings):
        first, *others = strategies
        assert first == "plain" and settings["temperature"] == 0.7 and settings["max_new_tokens"] == 9
        rows = [SimpleNamespace(speed_up=1.0)]
        for strategy in map(strategies.get, others):
            n, length = strategy.exit_layer, strategy.draft_length
            # 1.0 where the pair is (2, 3) or (5, 1): of equal ones the first is taken.
            speed_up = 1.0 if (n, length) in ((2, 3), (5, 1)) else 0.1 * n + 0.01 * length
            acceptance = None if length == 1 else n / 10
            places = dict(drafted_by_position=[n] * length, accepted_by_position=[1] * length)
            rows.append(SimpleNamespace(speed_up=speed_up, acceptance_rate=acceptance, identical=2, **places))
        return SimpleNamespace(strategies=rows)

    monkeypatch.setattr(sweep, "compare_decoding", fake_compare)
    swept = sweep_drafting(
        None, [[1], [2]], exit_layers=[5, 2, 5], draft_lengths=(3, 1), max_new_tokens=9, temperature=0.7
    )
    assert (swept.exit_layers, swept.draft_lengths) == ([2, 5], [1, 3])
    assert swept.speed_up == [[pytest.approx(0.21), 1.0], [1.0, pytest.approx(0.53)]]
    assert [row[1] for row in swept.acceptance_rate] == [0.2, 0.5]
    assert all(math.isnan(row[0]) for row in swept.acceptance_rate)
    assert swept.chosen == {"exit_layer": 2, "draft_length": 3}
    assert [(at["exit_layer"], at["draft_length"], at["drafted_by_position"]) for at in swept.by_position] == [
        (2, 3, [2, 2, 2]),
        (5, 3, [5, 5, 5]),
    ]
    assert (swept.prompts, swept.identical, swept.outputs) == (2, 8, 8)


def test_a_real_model_is_decoded_exactly():
    config = ModelConfig(vocab_size=19, n_layers=3, d_model=8, n_heads=2, d_ff=8, num_experts=4, max_seq_len=32)
    model = MoEDecoder(config).double()
    swept = sweep_drafting(
        model, [[1, 2], [3]], exit_layers=(1, 3), draft_lengths=(2,), max_new_tokens=7, temperature=0.8, progress=False
    )
    assert swept.identical == swept.outputs == 4
    assert swept.acceptance_rate[1] == [1.0]  # the whole model agrees with itself
    assert all(speed > 0 for row in swept.speed_up for speed in row)
    assert json.loads(json.dumps(swept.as_report()))["chosen"] == swept.chosen


@pytest.mark.parametrize("empty", ["exit_layers", "draft_lengths"])
def test_nothing_to_sweep_is_refused(empty):
    with pytest.raises(ValueError, match="at least one exit layer and one draft length"):
        sweep_drafting(None, [[1]], **({"exit_layers": [1], "draft_lengths": [1]} | {empty: []}))
