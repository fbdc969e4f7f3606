"""Means over seeds, paired differences and what pays, by hand; and the text that tells them."""

import json

import pytest

from layerskip_moe.ablation import write as writing
from layerskip_moe.ablation.summary import measures_of, summarise

ABOUT = {
    "command": "layerskip-moe ablate --seeds 0 1", "corpus": {"name": "a text"},
    "base": {"network": {"n_layers": 4, "d_model": 16, "num_experts": 4, "top_k": 2}, "recipe": {}},
}  # fmt: skip
CHANGES = {"network": {"n_layers": 8}, "recipe": {"exit_weights": "paper", "exit_loss_scale": 0.2}}


def test_the_numbers_that_a_run_is_compared_by(result):
    assert measures_of(result("base", 0)) == {
        "perplexity": 20.0, "perplexity_quarter": 50.0, "perplexity_half": 40.0, "agreement_quarter": 0.4,
        "agreement_half": 0.6, "union_2": 1.5, "union_4": 2.0, "speed_up_0": 1.2, "acceptance_0": 0.75,
        "tokens_per_second_0": 100.0, "plain_tokens_per_second_0": 80.0, "distinct_4grams_0": 0.25,
        "speed_up_0.8": pytest.approx(0.9), "acceptance_0.8": 0.75, "tokens_per_second_0.8": 100.0,
        "plain_tokens_per_second_0.8": 80.0, "distinct_4grams_0.8": 0.25,
    }  # fmt: skip


def test_a_shared_expert_is_read_once_however_many_rows_there_are(result):
    # One row: 1 chosen + 1 shared. Two rows: 1.6 chosen + 1 shared.
    found = measures_of(result("shared", 0, union=(1.6, 2.4), network={"top_k": 1, "shared_expert_d_ff": 16}))
    assert (found["union_2"], found["union_4"]) == pytest.approx((2.6 / 2, 3.4 / 2))


def test_a_dense_network_has_no_unions(result):
    union = {"spans": [2, 4], "over_top_k": [], "independent": []}
    assert measures_of(result("dense", 0, **{"union": union}) | {"union": union})["union_2"] is None


def test_differences_are_paired_by_seed(result):
    rows = summarise(
        [
            result("base", 0, perplexity=20.0, speed_up=1.0),
            result("other", 0, perplexity=20.2, speed_up=1.5),
            result("base", 1, perplexity=40.0, speed_up=1.2),
            result("other", 1, perplexity=40.4, speed_up=1.8),
            result("other", 2, perplexity=99.0, speed_up=9.0),  # whose base is still to come
        ]
    )
    base, other = rows
    assert (base["variant"], base["difference"], base["pays"]) == ("base", {}, None)
    assert base["mean"]["perplexity"] == 30.0 and base["seeds"] == [0, 1] and other["seeds"] == [0, 1, 2]
    found = other["difference"]["perplexity"]
    assert (found["mean"], found["low"], found["high"], found["pairs"]) == pytest.approx((0.01, 0.01, 0.01, 2))
    faster = other["difference"]["speed_up_0"]  # 0.5 and 0.6: mean 0.55, s = 0.0707, t = 12.706
    assert (faster["mean"], faster["low"]) == pytest.approx((0.55, 0.55 - 12.706 * 0.05))
    assert other["pays"] == []  # two pairs do not prove it


def test_what_pays_is_faster_for_sure_at_little_perplexity(result):
    def pays(perplexity, speed_ups):
        runs = []
        for seed, speed_up in enumerate(speed_ups):
            runs += [result("base", seed), result("other", seed, perplexity=perplexity, speed_up=speed_up)]
        return summarise(runs)[1]["pays"]

    assert pays(20.3, (1.5, 1.51, 1.49)) == ["0", "0.8"]
    assert pays(20.5, (1.5, 1.51, 1.49)) == []  # 2.5% of perplexity
    assert pays(20.3, (1.5, 1.1, 1.9)) == []
    assert pays(20.3, (1.0, 1.01, 0.99)) == []  # slower for sure
    assert pays(20.3, (1.5,)) is None  # one seed says nothing


def test_runs_that_failed_are_left_out_of_means_and_pairs(result):
    rows = summarise(
        [result("base", 0), result("other", 0, failed="nan"), result("base", 1), result("other", 1, perplexity=22.0)]
    )
    assert (rows[1]["failed"], rows[1]["seeds"], rows[1]["mean"]["perplexity"]) == ([0], [1], 22.0)
    assert rows[1]["difference"]["perplexity"]["pairs"] == 1
    alone = summarise([result("base", 0, failed="nan"), result("other", 0)])
    assert alone[0]["mean"] == {} and alone[1]["difference"] == {} and alone[1]["pays"] is None


def told_of(results, tmp_path, monkeypatch):
    """ablation.md, and ablation.json, without drawing."""
    monkeypatch.setattr(writing, "_draw", lambda out_dir, told: {"unions": "figures/unions.png"})
    path = writing.write_ablation(tmp_path, ABOUT, results)
    return path.read_text(), json.loads((tmp_path / "ablation.json").read_text())


def test_the_text_tells_settings_means_differences_and_failures(result, tmp_path, monkeypatch):
    results = [
        *(result("base", seed, perplexity=20.0, speed_up=1.2) for seed in (0, 1)),
        *(
            result("other", seed, perplexity=20.2, speed_up=1.5 + seed / 1000, union=(1.25, None), changes=CHANGES)
            for seed in (0, 1)
        ),
        result("other", 2, failed="the loss is nan at step 3; lower learning_rate.", changes=CHANGES),
    ]
    text, told = told_of(results, tmp_path, monkeypatch)
    assert told["seeds"] == [0, 1, 2] and told["machine"]["cpu"] == "A CPU" and told["variants"]["other"] == CHANGES
    assert "`layerskip-moe ablate --seeds 0 1`" in text and "Timed on A CPU, 2 cores, torch 2.13" in text
    assert "not timed yet" not in text
    assert "every run 4 steps, 256 tokens of a text" in text
    assert "| base | 2 | 2.3M (1.2M) | 20.0 | 50.0 | 40.0% |" in text
    assert "perplexity: other (temperature 0 and 0.8)." in text
    assert "| other | **+1.0%** [1.0, 1.0] |" in text and "| -0.25 [" not in text and "**-0.25** [-0.25, -0.25]" in text
    assert "**+0.30** [0.29, 0.31]" in text
    assert "- other, seed 2: the loss is nan at step 3" in text
    assert "| other | n_layers=8 | exit_weights=paper, exit_loss_scale=0.2 |" in text
    assert "figures/unions.png" in text and "figures/tradeoff.png" not in text


def test_runs_that_are_not_timed_yet_have_no_speeds(result, tmp_path, monkeypatch):
    untimed = {"decoding": None, "timed_on": None}
    text, told = told_of([result("base", 0, **untimed), result("other", 0, **untimed)], tmp_path, monkeypatch)
    assert told["machine"] is None and "Timed on" not in text and "speed-up" not in text
    assert "Decoding of 2 runs is not timed yet: give the command that trained them again, without" in text
    assert told["summary"][1]["difference"]["union_2"]["mean"] == 0 and told["summary"][1]["pays"] is None
    # One of each is timed: the means of the other are not of all its seeds, and there is one pair.
    some = [result("base", 0), result("other", 0, **untimed), result("base", 1), result("other", 1, speed_up=1.5)]
    text, told = told_of(some, tmp_path, monkeypatch)
    base, other = told["summary"]
    assert base["mean"]["speed_up_0"] == 1.2 and other["mean"]["speed_up_0"] is None
    assert other["difference"]["speed_up_0"]["pairs"] == 1 and other["difference"]["union_2"]["pairs"] == 2
    assert "Timed on A CPU" in text and "Decoding of 1 run is not timed yet" in text
    assert "| other | 2 | 2.3M (1.2M) | 1.50 | 2.00 | - | - | - |" in text


def test_one_seed_has_differences_without_intervals(result, tmp_path, monkeypatch):
    text, _ = told_of([result("base", 0), result("other", 0, speed_up=1.5)], tmp_path, monkeypatch)
    assert "at most 1 pair:" in text and "| +0.30 |" in text and "A larger speed-up" not in text


def test_before_anything_has_finished_there_is_little_to_tell(result, tmp_path):
    path = writing.write_ablation(tmp_path, ABOUT, [result("base", 0, failed="nan", decoding=None, timed_on=None)])
    text = path.read_text()
    assert "No run has finished." in text and "nothing yet to compare with the base" in text
    assert not (tmp_path / "figures").exists()
