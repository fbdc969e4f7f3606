"""The sentences on experts, the recipe and training follow the numbers, as those on decoding do."""

import pytest


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
        ([0.7, 0.4], "It foretells no more than the busiest experts in layer 1."),
        (
            [0.5, 0.4],
            "In no layer does the token foretell more than the busiest experts do** (at most 50.0% against 50.0%)",
        ),
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
        ({"exit_rotation": 1}, "(`rotational`): all layers at every step"),
        ({}, "one in 4, the turn moving up by a layer a step"),
        (
            {},
            "grows with depth (`exp`) and grows over the steps (`exp`); it is 12.5% at the last step and the last",
        ),
        ({"layer_dropout_time": "uniform"}, "(`exp`) and is the same at all steps; it is 12.5% at the last layer."),
        (
            {"layer_dropout_depth": "uniform"},
            "is the same at all layers and grows over the steps (`exp`); it is 12.5% at",
        ),
        (
            {"layer_dropout_depth": "uniform", "layer_dropout_time": "uniform"},
            "is the same at all layers and is the same at all steps; it is 12.5%.",
        ),
        ({}, "each early exit 0.75, the last layer 2."),
        ({"exit_weights": "paper"}, "scaled by 0.75; layer 1 has weight 0"),
        (
            {"exit_weights": "drafting", "drafting_exit": None},
            "exit layer 1, which is to draft, 0.75, the last",
        ),
        ({"exit_weights": "drafting", "drafting_exit": 2}, "exit layer 2, which is to draft, 0.75, the last layer 2"),
        ({"exit_weights": "drafting", "drafting_exit": 2}, "a step; the exit that is to draft and the last of the"),
        ({"exit_loss_scale": 0.0}, "only the last layer learns"),
    ],
)
def test_the_recipe_is_put_in_words(written, full_report, changed, said):
    full_report["recipe"]["train_config"] |= changed
    assert said in written({"recipe": full_report["recipe"]})[0]


def test_without_early_exits_their_weights_are_not_told(written, full_report):
    full_report["recipe"]["train_config"]["exit_curriculum"] = "none"
    assert "Weights" not in written({"recipe": full_report["recipe"]})[0]


def test_the_text_that_the_best_step_was_found_on_is_told(written, full_report):
    sections = {name: full_report[name] for name in ("training", "recipe", "exits")}
    assert "after 400 steps." in written(sections)[0]
    sections["recipe"]["train_config"] |= {"validation_windows": 64, "keep_best": True}
    text, _ = written(sections)
    assert "after 400 steps, on the first 64 windows of the held-out text" in text
    assert "over 32,768 tokens, hence another figure" in text and "picked on held-out text" in text
