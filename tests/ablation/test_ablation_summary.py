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
    assert (other["quality"], other["pays"]) == ("within", [])  # two pairs do not prove it
    assert base["quality"] is None and base["speed"] == {}


def compared(result, **variants):
    """Rows of the base, at perplexity 20 to 22 and 100 tokens/s, and of variants: [(perplexity, tokens/s) per seed]."""
    runs = []
    for seed in range(3):
        runs.append(result("base", seed, perplexity=20.0 + seed))
        for name, found in variants.items():
            perplexity, speed = found[seed]
            # Its own plain decoding is slow: what it gains over that is not what it gains over the base.
            runs.append(result(name, seed, perplexity=perplexity, tokens_per_second=speed, speed_up=9.0))
    return {row["variant"]: row for row in summarise(runs)}


@pytest.mark.parametrize(
    ("perplexities", "quality"),
    [
        ((20.2, 21.22, 22.2), "within"),  # about +1%, the interval up to +1.2%
        ((20.2, 21.4, 22.5), "not shown"),  # +1.0%, +1.9% and +2.3%, the interval past 2%
        ((20.6, 21.6, 22.7), "over"),
        ((21.0, 21.0, 22.0), "not shown"),  # worse on average, perhaps better
    ],
)
def test_quality_is_judged_by_the_whole_interval(result, perplexities, quality):
    row = compared(result, other=[(perplexity, 150.0 + i / 10) for i, perplexity in enumerate(perplexities)])["other"]
    assert row["quality"] == quality
    assert row["speed"]["0"]["verdict"] == "faster"
    assert row["pays"] == (["0", "0.8"] if quality == "within" else [])


def test_speed_is_that_of_the_fastest_pairs_beside_each_other(result):
    def verdict(*speeds):
        row = compared(result, other=[(20.0 + seed, speed) for seed, speed in enumerate(speeds)])["other"]
        return row["speed"]["0"]["verdict"], row["speed"]["0.8"]["verdict"], row["pays"]

    assert verdict(150.0, 151.0, 149.0) == ("faster", "faster", ["0", "0.8"])
    assert verdict(50.0, 51.0, 49.0) == ("slower", "slower", [])
    assert verdict(150.0, 110.0, 190.0) == ("not shown", "not shown", [])
    assert verdict(100.0, 101.0, 99.0) == ("not shown", "not shown", [])


def test_the_more_is_compared_the_more_each_has_to_prove(result):
    good = [(20.0 + seed, speed) for seed, speed in enumerate((140.0, 150.0, 160.0))]  # t = 8.66: p = 0.013
    noise = [(20.0 + seed, speed) for seed, speed in enumerate((90.0, 110.0, 100.0))]
    alone = compared(result, other=good)["other"]
    assert alone["difference"]["tokens_per_second_0"]["mean"] == pytest.approx(0.5)
    p = alone["difference"]["tokens_per_second_0"]["p"]
    assert alone["speed"]["0"] == {"p": pytest.approx(2 * p), "verdict": "faster"}  # of two temperatures
    among = compared(result, other=good, more=noise, most=noise)["other"]
    assert among["speed"]["0"] == {"p": pytest.approx(6 * p), "verdict": "not shown"} and among["pays"] == []


def test_one_seed_says_nothing(result):
    row = summarise([result("base", 0), result("other", 0, tokens_per_second=200.0)])[1]
    assert (row["quality"], row["speed"], row["pays"]) == (None, {}, None)


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
            result(
                "other",
                seed,
                perplexity=20.2,
                speed_up=1.5 + seed / 1000,
                tokens_per_second=150 + seed / 1000,
                union=(1.25, None),
                changes=CHANGES,
            )
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
    assert "of the base's: other (temperature 0 and 0.8)." in text and "for 2 comparisons)" in text
    assert "| other | +1.0% | +1.0% | within 2.0% | +50.0%, p 1.3e-05: faster |" in text
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
    assert "at most 1 pair:" in text and "| +0.30 |" in text and "What is shown" not in text


def test_before_anything_has_finished_there_is_little_to_tell(result, tmp_path):
    path = writing.write_ablation(tmp_path, ABOUT, [result("base", 0, failed="nan", decoding=None, timed_on=None)])
    text = path.read_text()
    assert "No run has finished." in text and "nothing yet to compare with the base" in text
    assert not (tmp_path / "figures").exists()
