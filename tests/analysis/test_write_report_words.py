"""The sentences that judge follow the numbers: each verdict turns when they do."""

import pytest


def _summary(text):
    return text.split("## ")[1]


def test_begins_with_the_answer(written, full_report):
    text, held = written(full_report)
    summary = _summary(text)
    greedy, sampled, early, experts, runs = [line for line in summary.splitlines() if line.startswith("- ")]
    assert text.startswith("# ") and summary.startswith("In short")
    assert "\n\n\n" not in text and text.endswith("|\n")
    assert greedy.startswith("- Greedy") and "1.39 times as fast" in greedy
    assert "exit layer 2 and draft length 4" in greedy and "1.28 to 1.52" in greedy
    assert "All 60 outputs" in greedy and "identical" in greedy
    assert sampled.startswith("- Temperature 0.8") and "1.09 times as fast" in sampled
    assert "exit layer 1 and draft length 3" in sampled and "All 40 outputs, over all settings tried," in sampled
    assert "at its best" in greedy and "median of each prompt's own ratio, over 20 prompts" in greedy
    assert "repeats itself" not in greedy
    assert "0.9 saves most: 2.64 of 3 layers" in early and "slower than plain decoding: 0.94 times" in early
    assert "layer 2, whose busiest expert got 100.0% more" in experts and "dead" in experts
    assert "perplexity 44.31 against 43.11. Whether experts are balanced better" in runs and "cannot be told" in runs
    assert "same model decoded plainly" in summary
    assert [best["speed_up"] for best in held["summary"]] == [1.387, 1.093]


@pytest.mark.parametrize(
    ("speed_up", "said", "unsaid"),
    [
        (0.86, "**slower** than plain decoding: 0.86 times its speed", "as fast"),
        (0.93, "slower than plain decoding: 0.93 times its speed (middle half of the prompts: 0.82 to 1.06", "as fast"),
        (0.998, "neither faster nor slower than plain decoding (1.00 times", "as fast"),
        (1.004, "neither faster nor slower", "as fast"),
        (1.006, "1.01 times as fast", "slower"),
    ],
)
def test_says_plainly_when_speculation_did_not_pay(written, full_report, speed_up, said, unsaid):
    comparison = full_report["decoding"][0]
    for row in comparison["strategies"][1:]:
        row |= {"speed_up": speed_up, "speed_up_quartiles": [speed_up - 0.11, speed_up + 0.13]}
    text, _ = written({"decoding": [comparison]})
    assert said in _summary(text) and unsaid not in _summary(text)


def test_says_plainly_when_outputs_differ(written, full_report):
    row = full_report["decoding"][0]["strategies"][2]
    row["identical"], row["first_differences"] = 18, {3: 17, 11: 90}
    text, held = written(full_report)
    assert "**Not all outputs are identical** to plain decoding's: 58 of 60" in _summary(text)
    assert "`exit 1, draft 6` parts from `plain` on prompts 4 (token 18), 12 (token 91)." in text
    assert held["decoding"][0]["strategies"][2]["first_differences"] == {"3": 17, "11": 90}


def test_one_setting_has_no_best_and_looping_text_is_said_to_be(written, full_report):
    comparison = full_report["decoding"][0]
    comparison["strategies"][2:] = []
    comparison["strategies"][1]["distinct_4grams"] = 0.06
    text, _ = written({"decoding": [comparison]})
    assert "- Greedy: self-speculative decoding was **1.21" in text and "at its best" not in text
    assert "All 20 outputs are identical" in text and "settings tried" not in text
    assert "repeats itself (distinct 4-grams: 6.0%), and loops are easy to draft" in text
    comparison["strategies"][1]["identical"] = 19
    assert (
        "**Not all outputs are identical** to plain decoding's: 19 of 20 are;" in written({"decoding": [comparison]})[0]
    )


def test_a_speed_up_that_half_of_the_prompts_contradict_is_not_bold(written, full_report):
    comparison = full_report["decoding"][0]
    comparison["strategies"][2:] = []
    comparison["strategies"][1] |= {"speed_up": 1.3, "speed_up_quartiles": [0.95, 5.43]}
    told = "1.30 times as fast as plain decoding (middle half of the prompts: 0.95 to 5.43 times, so not alike on all)"
    assert told in written({"decoding": [comparison]})[0]
    comparison["strategies"][1]["speed_up_quartiles"] = [1.0, 5.43]
    told = "**1.30 times as fast** as plain decoding (middle half of the prompts: 1.00 to 5.43 times)"
    assert told in written({"decoding": [comparison]})[0]


def test_the_setting_picked_by_the_sweep_is_told_from_one_picked_here(written, full_report):
    greedy, sampled = full_report["decoding"]
    text, _ = written({"decoding": [greedy, sampled]})
    assert "The best setting was picked on the prompts it is stated for." in _summary(text)
    text, _ = written({"decoding": [greedy, sampled], "sweep": full_report["sweep"]})
    assert "picked on other prompts than these is exit layer 2 and draft length 4;" in _summary(text)
    assert "Its speed-up here: 1.39 (greedy) and 0.96 (temperature 0.8)." in _summary(text)
    text, _ = written({"decoding": [greedy], "sweep": full_report["sweep"]})
    assert "The setting was picked on other prompts than these." in _summary(text)
    assert "picked on the prompts it is stated for" not in _summary(text)
    del greedy["strategies"][2:]
    text, _ = written({"decoding": [greedy]})
    assert "It was the only setting tried" in _summary(text) and "picked on" not in _summary(text)


def test_the_sweep_says_how_many_settings_pay(written, full_report):
    sweep = full_report["sweep"]
    text, _ = written({"sweep": sweep})
    assert "Not all of the settings are faster" in text and "the fastest of them" in text
    assert "| 2 | 1.12 (67.4%) | **1.23 (63.3%)** | 1.15 (56.1%) |" in text
    text, _ = written({"sweep": {**sweep, "chosen": {"exit_layer": 1, "draft_length": 3}}})
    assert "Exit layer 1 with 3 drafts was picked (in bold)." in text
    text, _ = written({"sweep": {**sweep, "speed_up": [[0.9, 0.8, None], [0.95, 1.0, 0.7]]}})
    assert "**None of the settings is faster**" in text and "| - (42.1%) |" in text
    text, _ = written({"sweep": {**sweep, "speed_up": [[1.1, 1.2, 1.3], [1.4, 1.5, 1.6]]}})
    assert "All of the settings are faster" in text


def test_the_sweep_says_how_sure_its_pick_is_and_how_exact(written, full_report):
    sweep = full_report["sweep"]
    text, held = written({"sweep": sweep})
    assert held["findings"]["sweep"] == {"exit_layer": 2, "draft_length": 6, "speed_up": 1.153, "small": True}
    assert "Exit layer 2 with 6 drafts comes close (1.15)" in text and "**another run may pick another**" in text
    assert "All 36 outputs of these settings are identical" in text
    text, held = written({"sweep": {**sweep, "speed_up": [[1.1, 1.0, 0.9], [1.0, 1.3, 1.1]], "identical": 35}})
    assert held["findings"]["sweep"]["small"] is False and "may pick another" not in text
    assert "**Not all outputs of these settings are identical** to plain decoding's: 35 of 36 are." in text
    alone = {**sweep, "exit_layers": [2], "draft_lengths": [4], "speed_up": [[1.2]], "acceptance_rate": [[0.5]]}
    assert "sweep" not in written({"sweep": alone})[1]["findings"]


def test_acceptance_by_position_has_the_sweeps_exit_layers_too(written, full_report):
    text, held = written({"sweep": full_report["sweep"]})
    first, second = held["findings"]["acceptance_by_position"]
    assert first["accepted"][0] == 45 / 80 and second["name"] == "sweep, exit layer 2"
    assert "| temperature 0.8 | sweep, exit layer 1 | 56.2% |" in text and "has both, from the sweep." in text


def test_acceptance_by_position_is_told_for_every_strategy_that_drafts(written, full_report):
    rows = full_report["decoding"][0]["strategies"]
    rows[1] |= {"drafted_by_position": [10, 8], "accepted_by_position": [9, 2]}
    text, held = written({"decoding": full_report["decoding"][:1]})
    assert held["findings"]["acceptance_by_position"][0] == {
        "decoding": "greedy", "name": "exit 1, draft 3", "accepted": [0.9, 0.25],
    }  # fmt: skip
    assert "| greedy | exit 1, draft 3 | 90.0% | 25.0% | - |" in text and "| greedy | plain |" not in text


def test_lossless_and_lossy_strategies_are_told_apart(written, full_report):
    text, _ = written({"strategies": full_report["strategies"]})
    kinds = {line.split(" | ")[0]: line.split(" | ")[1] for line in text.splitlines() if line.startswith("| ")}
    assert kinds["| exit 2, draft 4"] == "lossless" and kinds["| layers 1-2"] == kinds["| every 2nd"] == "lossy"
    assert kinds["| plain"] == "baseline"
    assert "All 20 outputs of the lossless strategies are identical" in text
    lossy, other = (line for line in text.splitlines() if line.startswith(("- `layers 1-2`", "- `every 2nd`")))
    assert "1.51 times as fast" in lossy and "less likely than plain" in lossy and "first choice less often" in lossy
    assert "from 2,560 tokens whether these differ: distinct 4-grams 87.3% against 87.3%." in lossy
    assert "slower" in other and "repeats itself more than" in other
    assert "from 2,560 tokens whether these differ: perplexity 12.41 against 12.34." in other
    assert "parts from" not in text


def test_the_verdict_on_a_lossy_strategy_turns_with_its_text(written, full_report):
    row = full_report["strategies"][0]["strategies"][2]
    row |= {"perplexity": 6.17, "distinct_4grams": 0.99}
    text, _ = written({"strategies": full_report["strategies"]})
    assert "likelier than plain decoding's (perplexity 6.17 against 12.34)" in text
    assert "repeats itself less than in plain decoding (distinct 4-grams 99.0% against 87.3%)" in text
    row |= {"perplexity": None, "distinct_4grams": None, "agreement": None}
    text, _ = written({"strategies": full_report["strategies"]})
    told = (
        "- `layers 1-2` was **1.51 times as fast** as plain decoding (middle half of the prompts: 1.40 to 1.64 times)."
    )
    assert told in text.splitlines()


@pytest.mark.parametrize(
    ("field", "alike", "other"),
    [("perplexity", 14.1, 14.3), ("agreement", 0.94, 0.93), ("distinct_4grams", 0.92, 0.93)],
)
def test_a_small_difference_between_texts_is_not_told(written, full_report, field, alike, other):
    baseline, _, row, _ = full_report["strategies"][0]["strategies"]
    same = {name: baseline[name] for name in ("perplexity", "agreement", "distinct_4grams")}
    for value, is_told in ((alike, False), (other, True)):
        row |= same | {field: value}
        text, _ = written({"strategies": full_report["strategies"]})
        (line,) = (line for line in text.splitlines() if line.startswith("- `layers 1-2`"))
        told, untold = line.split("whether these differ: ")
        name = field.replace("_4", " 4-")
        assert (name in told, name in untold) == (is_told, not is_told)


def test_an_early_exit_that_never_left_is_not_called_lossless(written, full_report):
    row = full_report["early_exit"]["decoding"]["strategies"][2] | {"mean_layers": 3.0, "identical": 20}
    full_report["strategies"][0]["strategies"][2] = row
    text, _ = written({"strategies": full_report["strategies"]})
    assert "| threshold 0.9 | lossy | 3.00 |" in text and "All 20 outputs of the lossless" in text
    (told,) = (line for line in text.splitlines() if line.startswith("- `threshold 0.9`"))
    assert "slower than plain decoding: 0.94 times its speed" in told and told.endswith("and left out no layer here.")


def test_a_lossless_strategy_that_differs_is_a_fault_and_said(written, full_report):
    row = full_report["strategies"][0]["strategies"][1]
    row["identical"], row["first_differences"] = 19, {"4": 33}
    text, _ = written({"strategies": full_report["strategies"]})
    assert "**Not all outputs of the lossless strategies are identical** to plain decoding's: 19 of 20 are." in text
    assert "`exit 2, draft 4` parts from `plain` on prompts 5 (token 34)." in text


def test_early_exit_names_the_threshold_that_saves_most_and_still_agrees(written, full_report):
    early_exit = full_report["early_exit"]
    text, held = written({"early_exit": early_exit})
    assert "95.0% of the held-out positions or more, 0.9 saves most: 2.64 of 3 layers" in text
    assert held["findings"]["early_exit"] == {
        "least_agreement": 0.95, "n_layers": 3, "threshold": 0.9, "mean_layers": 2.64,
    }  # fmt: skip
    early_exit["held_out"]["agreement"] = [0.842, 0.91, 1.0]  # and 1.0 saves nothing
    text, _ = written({"early_exit": early_exit})
    assert "**No threshold that saves layers** agrees with the last layer at 95.0%" in text


def test_early_exit_says_when_fewer_layers_took_longer(written, full_report):
    early_exit = full_report["early_exit"]
    text, _ = written({"early_exit": early_exit})
    fastest = "With threshold 0.5, the fastest of 2 on these prompts, early exit was **1.26 times as fast**"
    assert fastest in text and "1 of 20 outputs are plain decoding's. The best of several looks better" in text
    assert "With threshold 0.9 it left out layers and was slower" in text and "easy to leave" not in text
    last = early_exit["decoding"]["strategies"][2]
    last["mean_layers"] = 2.998
    text, _ = written({"early_exit": early_exit})
    assert "With threshold 0.9 it ran all layers, at 0.94 times plain decoding's speed" in text
    assert "left out layers and was slower" not in text
    last["speed_up"] = 1.01
    early_exit["decoding"]["strategies"][1]["distinct_4grams"] = 0.141
    text, _ = written({"early_exit": early_exit})
    assert "slower" not in text and "distinct 4-grams: 14.1%, plain decoding's 87.3%" in text
    assert "text that loops is easy to leave early" in text
    assert "| 2 | 0.538 | 0.217 | 0.823 |" in text
    early_exit["cache"], early_exit["by_prompt"] = "exact", None
    assert "are run for it later" in written({"early_exit": early_exit})[0]


@pytest.mark.parametrize(
    ("max_violation", "entropy", "said"),
    [
        ([0.3, 0.5], 0.95, "With LayerSkip, experts were **balanced better**: mean MaxVio 0.400 against 0.550"),
        ([0.9, 0.7001], 0.8, "With LayerSkip, experts were **balanced worse**: mean MaxVio 0.800 against 0.550"),
        ([0.1, 0.8], 0.95, "**cannot be told** from this: mean MaxVio 0.450 against 0.550"),  # but 1 layer of 2
        ([0.2, 0.2], 0.5, "**cannot be told** from this: mean MaxVio 0.200 against 0.550"),  # but entropy
        ([0.9, 0.8], 0.95, "**cannot be told** from this: mean MaxVio 0.850 against 0.550"),  # likewise
        ([0.4, 0.7], 0.8865, "**cannot be told** from this: mean MaxVio 0.550 against 0.550"),
    ],
)
def test_the_verdict_on_balance_needs_both_measures_and_most_layers(written, full_report, max_violation, entropy, said):
    comparison = full_report["comparison"]
    for row, value in zip(comparison["runs"][0]["experts"].values(), max_violation, strict=True):
        row |= {"max_violation": value, "normalized_entropy": entropy}
    text, held = written({"comparison": comparison})
    assert said in text and "One seed each (7)" in text and "Layer skipping" not in text
    assert held["findings"]["comparison"]["runs"][1]["balance"]["max_violation"] == pytest.approx(0.55)


def test_two_runs_are_compared_by_exits_and_speed(written, full_report):
    comparison = full_report["comparison"]
    text, _ = written({"comparison": comparison})
    assert "The whole model is **worse** with LayerSkip: held-out perplexity 44.31 against 43.11." in text
    assert "Exit layer 1 is better with LayerSkip: held-out perplexity 81.52 against 1,893.20." in text
    assert (
        "`LayerSkip` was at its best 1.39 times as fast as itself decoded plainly (exit layer 2, draft length 4; "
        "middle half of the prompts: 1.28 to 1.52), and `plain` 0.68 times (exit layer 2, draft length 4;" in text
    )
    assert "| greedy | plain | exit 1, draft 3 | 1 | 3 |" in text
    for run in comparison["runs"]:
        run["experts"], run["decoding"], run["best_step"] = {}, [], None
    text, _ = written({"comparison": comparison})
    assert "The balance of experts cannot be compared" in text and "at its best" not in text
