"""The sentences that judge follow the numbers: each verdict turns when they do."""

import pytest


def _summary(text):
    return text.split("## ")[1]


def test_begins_with_the_answer(written, full_report):
    text, held = written(full_report)
    summary = _summary(text)
    greedy, sampled = [line for line in summary.splitlines() if line.startswith("- ")]
    assert text.startswith("# ") and summary.startswith("In short")
    assert "\n\n\n" not in text and text.endswith("|\n")
    assert greedy.startswith("- Greedy") and "1.39 times as fast" in greedy
    assert "exit layer 2 and draft length 4" in greedy and "1.28 to 1.52" in greedy
    assert "All 60 outputs" in greedy and "identical" in greedy
    assert sampled.startswith("- Temperature 0.8") and "1.09 times as fast" in sampled
    assert "exit layer 1 and draft length 3" in sampled and "All 40 outputs" in sampled
    assert "same model decoded plainly" in summary
    assert [best["speed_up"] for best in held["summary"]] == [1.387, 1.093]


@pytest.mark.parametrize(
    ("speed_up", "said", "unsaid"),
    [
        (0.93, "**slower** than plain decoding: 0.93 times its speed", "as fast"),
        (0.998, "neither faster nor slower", "as fast"),
        (1.004, "neither faster nor slower", "as fast"),
        (1.006, "1.01 times as fast", "slower"),
    ],
)
def test_says_plainly_when_speculation_did_not_pay(written, full_report, speed_up, said, unsaid):
    comparison = full_report["decoding"][0]
    for row in comparison["strategies"][1:]:
        row["speed_up"] = speed_up
    text, _ = written({"decoding": [comparison]})
    assert said in _summary(text) and unsaid not in _summary(text)


def test_says_plainly_when_outputs_differ(written, full_report):
    row = full_report["decoding"][0]["strategies"][2]
    row["identical"], row["first_differences"] = 18, {3: 17, 11: 90}
    text, held = written(full_report)
    assert "**Not all outputs are identical** to plain decoding's: 58 of 60" in _summary(text)
    assert "`exit 1, draft 6` parts from `plain` on prompts 3 (token 17), 11 (token 90)" in text
    assert held["decoding"][0]["strategies"][2]["first_differences"] == {"3": 17, "11": 90}


def _section(text, title):
    return next(part for part in text.split("\n## ") if part.startswith(title))


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
    assert "1.51 times as fast" in lossy and "less likely than" in lossy and "repeats itself as much as" in lossy
    assert "slower" in other and "about as likely as" in other and "repeats itself more than" in other
    assert "parts from" not in text


def test_the_verdict_on_a_lossy_strategy_turns_with_its_text(written, full_report):
    row = full_report["strategies"][0]["strategies"][2]
    row |= {"perplexity": 6.17, "distinct_4grams": 0.99}
    text, _ = written({"strategies": full_report["strategies"]})
    assert "likelier than plain decoding's (perplexity 6.17 against 12.34)" in text
    assert "repeats itself less than plain decoding (distinct 4-grams: 99.0% against 87.3%)" in text
    row |= {"perplexity": None, "distinct_4grams": None, "agreement": None}
    text, _ = written({"strategies": full_report["strategies"]})
    assert "- `layers 1-2` was **1.51 times as fast** as plain decoding." in text.splitlines()


def test_an_early_exit_that_never_left_is_not_called_lossless(written, full_report):
    row = full_report["early_exit"]["decoding"]["strategies"][2] | {"mean_layers": 3.0, "identical": 20}
    full_report["strategies"][0]["strategies"][2] = row
    text, _ = written({"strategies": full_report["strategies"]})
    assert "| threshold 0.9 | lossy | 3.00 |" in text and "All 20 outputs of the lossless" in text
    assert "`threshold 0.9` was **slower** than plain decoding: 0.94 times its speed, and left out no layer" in text


def test_a_lossless_strategy_that_differs_is_a_fault_and_said(written, full_report):
    row = full_report["strategies"][0]["strategies"][1]
    row["identical"], row["first_differences"] = 19, {"4": 33}
    text, _ = written({"strategies": full_report["strategies"]})
    assert "**Not all outputs of the lossless strategies are identical** to plain decoding's: 19 of 20 are." in text
    assert "`exit 2, draft 4` parts from `plain` on prompts 4 (token 33)" in text


def test_early_exit_names_the_threshold_that_saves_most_and_still_agrees(written, full_report):
    early_exit = full_report["early_exit"]
    text, held = written({"early_exit": early_exit})
    assert "95.0% of the positions or more, 0.9 saves most: 2.64 of 3 layers" in text
    assert held["findings"]["early_exit"] == {
        "least_agreement": 0.95, "n_layers": 3, "threshold": 0.9, "mean_layers": 2.64,
    }  # fmt: skip
    early_exit["held_out"]["agreement"] = [0.842, 0.91, 1.0]  # and 1.0 saves nothing
    text, _ = written({"early_exit": early_exit})
    assert "**No threshold that saves layers** agrees with the last layer at 95.0%" in text


def test_early_exit_says_when_fewer_layers_took_longer(written, full_report):
    early_exit = full_report["early_exit"]
    text, _ = written({"early_exit": early_exit})
    assert "with threshold 0.5, early exit was **1.26 times as fast**" in text
    assert "1 of 20 outputs are plain decoding's. With threshold 0.9 it left out layers and was slower" in text
    early_exit["decoding"]["strategies"][2]["speed_up"] = 1.01
    assert "slower" not in written({"early_exit": early_exit})[0]
    early_exit["cache"], early_exit["by_prompt"] = "exact", None
    assert "are run for it later" in written({"early_exit": early_exit})[0]


@pytest.mark.parametrize(
    ("max_violation", "entropy", "said"),
    [
        (0.4, 0.95, "Layer skipping **balanced experts better** here: mean MaxVio 0.400 against 0.550"),
        (
            0.8,
            0.8,
            "Layer skipping **did not balance experts better** here, but worse: mean MaxVio 0.800 against 0.550",
        ),
        (0.55, 0.8865, "Layer skipping **made no difference** to the balance of experts here"),
    ],
)
def test_whether_layer_skipping_balances_experts_is_read_from_both_runs(
    written, full_report, max_violation, entropy, said
):
    comparison = full_report["comparison"]
    for row in comparison["runs"][0]["experts"].values():
        row |= {"max_violation": max_violation, "normalized_entropy": entropy}
    text, held = written({"comparison": comparison})
    assert said in text and "One seed each (7)" in text and "says the opposite" not in text
    assert held["findings"]["comparison"]["runs"][1]["balance"]["max_violation"] == pytest.approx(0.55)


def test_measures_of_balance_that_disagree_are_said_to(written, full_report):
    for row in full_report["comparison"]["runs"][0]["experts"].values():
        row |= {"max_violation": 0.2, "normalized_entropy": 0.5}
    text, held = written({"comparison": full_report["comparison"]})
    assert "**balanced experts better**" in text and "says the opposite" in text
    assert held["findings"]["comparison"]["more_even"] == held["findings"]["comparison"]["layers"] == 2


def test_two_runs_are_compared_by_exits_and_speed(written, full_report):
    comparison = full_report["comparison"]
    text, _ = written({"comparison": comparison})
    assert "The whole model is **worse** with LayerSkip: held-out perplexity 44.31 against 43.11." in text
    assert "Exit layer 1 is better with LayerSkip: held-out perplexity 81.52 against 1,893.20." in text
    assert "`LayerSkip` was at its best 1.39 times as fast as itself decoded plainly" in text
    assert "`plain` 0.68 times" in text
    for run in comparison["runs"]:
        run["experts"], run["decoding"], run["best_step"] = {}, [], None
    text, _ = written({"comparison": comparison})
    assert "The balance of experts cannot be compared" in text and "at its best" not in text


@pytest.mark.parametrize(
    ("max_violation", "dead", "said"),
    [
        (0.0, 0.0, "Every layer is perfectly even. No expert is without a choice."),
        (0.37, 0.0, "Least even is layer 1, whose busiest expert got 37.0% more than an even share"),
        (0.37, 0.25, "Experts that no token chose (dead) are in layer 1."),
        (None, None, "No layer was given a choice to make."),
    ],
)
def test_the_balance_of_experts_is_put_in_words(written, max_violation, dead, said):
    metrics = {"1": {"max_violation": max_violation, "dead_experts": dead}}
    text, _ = written({"experts": {"load": {"1": [1, 2]}, "metrics": metrics, "tokens": 3}})
    assert said in text


def test_typical_tokens_cannot_break_the_markdown(written):
    tokens = ["\n", "a|b", "`", "``x", " ", "\\|", "'", "<b>", "*_*"]
    experts = [[{"text": text, "share": 0.5, "lift": 2.0, "count": 10} for text in tokens]]
    text, held = written(
        {"expert_choice": {"layers": {"0": {"token_dependence": 0.5, "chance": 0.25, "experts": experts}}, "tokens": 9}}
    )
    (row,) = (line for line in text.splitlines() if line.startswith("| 0 | `"))
    assert "`'\\n'` 50.0%" in row and "`` '`' ``".replace(" ", "") in row and "`' '` 50.0%" in row
    cells = row.removeprefix("| ").removesuffix(" |").replace("\\|", "PIPE").split(" | ")
    assert len(cells) == 2 and cells[1].count("50.0%") == len(tokens)
    assert cells[1].count("PIPE") == 2 and "'<b>'" in cells[1]
    assert [token["text"] for token in held["expert_choice"]["layers"]["0"]["experts"][0]] == tokens


def test_many_experts_tokens_are_left_to_the_json(written, full_report):
    layer = full_report["expert_choice"]["layers"]["1"]
    layer["experts"] = layer["experts"][:1] * 64
    text, _ = written({"expert_choice": {"layers": {"1": layer}, "tokens": 9}})
    assert "typical tokens |" not in text and "in `report.json`" in text


@pytest.mark.parametrize(
    ("dependence", "said"),
    [
        ([0.7, 0.6], "The token foretells most in layer 0: 70.0% against 50.0%. It says nothing"),
        ([0.7, 0.4], "It foretells nothing beyond chance in layer 1."),
        ([0.5, 0.4], "**In no layer does the token foretell more than chance** (at most 50.0% against 50.0%)"),
        ([float("nan")] * 2, "There was too little text to tell."),
    ],
)
def test_token_dependence_is_judged_against_chance(written, dependence, said):
    layers = {str(n): {"token_dependence": d, "chance": 0.5, "experts": [[]]} for n, d in enumerate(dependence)}
    text, _ = written({"expert_choice": {"layers": layers, "tokens": 9}})
    assert said in text


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"layer_dropout_max": 0.0}, "No layer was dropped during training."),
        ({"layer_dropout_part": "experts"}, "skips a layer's MLP or experts with a probability"),
        ({"exit_curriculum": "gradual"}, "one more after the other"),
        ({"exit_curriculum": "none"}, "no earlier one learns to be an exit"),
        ({"exit_curriculum": "all"}, "all layers at every step"),
        ({}, "one in 4, the turn moving up by a layer a step"),
    ],
)
def test_the_recipe_is_put_in_words(written, full_report, changed, said):
    full_report["recipe"]["train_config"] |= changed
    assert said in written({"recipe": full_report["recipe"]})[0]
