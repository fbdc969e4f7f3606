"""TrainConfig: every field's check, each with a sentence that names the field."""

import dataclasses

import pytest

from layerskip_moe.training import TrainConfig

REFUSED = {
    "max_steps": (0, -1, 2.0, True),
    "epochs": (0, -1.0, float("nan"), float("inf")),
    "seq_len": (0, 1.5, "8"),
    "batch_size": (0, -4),
    "accumulation": (0, 1.0),
    "optimizer": ("adam", "AdamW", None),
    "learning_rate": (0.0, -1e-3, float("nan"), float("inf")),
    "min_learning_rate_ratio": (-0.1, 1.1),
    "warmup_steps": (-1, 0.5),
    "weight_decay": (-0.1, float("nan"), float("inf"), "0.1"),
    "beta1": (-0.1, 1.0, None),
    "beta2": (-0.1, 1.0),
    "max_gradient_norm": (-1.0, float("inf")),
    "layer_dropout_max": (-0.1, 1.1, float("nan")),
    "layer_dropout_depth": ("step", "EXP", None),
    "layer_dropout_time": ("constant",),
    "layer_dropout_part": ("attention",),
    "expert_dropout": (-0.1, 1.1, True),
    "exit_weights": ("linear",),
    "drafting_exit": (0, -2, 1.5, True),
    "exit_loss_scale": (-0.2,),
    "exit_curriculum": ("rotate",),
    "exit_rotation": (0,),
    "exit_distillation": (-0.1, 1.1),
    "moe_loss_weight": (-0.01,),
    "router_z_loss_weight": (-0.01,),
    "router_coherence_weight": (-0.1, float("nan"), float("inf"), True),
    "bias_update_rate": (-0.01,),
    "precision": ("fp16", "int8"),
    "compile": (1, "yes"),
    "activation_checkpointing": (1, "yes", None),
    "expert_parallel": (0, -1, 1.5),
    "seed": (0.5, "1"),
    "validate_every": (-1, 2.5),
    "validation_windows": (0,),
    "keep_best": ("no", 1),
    "checkpoint_every": (-1, True),
    "log_every": (0,),
    "max_skipped_steps": (0, -1, 1.5),
}

LARGE = [  # and then could not be computed with
    *(("max_steps", 10**400), ("warmup_steps", 2**63), ("exit_rotation", 10**30), ("batch_size", 2**63)),
    *(("epochs", 1e308), ("learning_rate", 10**400), ("weight_decay", 10**400)),
]

ACCEPTED = {
    "max_steps": (None, 1),
    "epochs": (0.01, 3, 1000.0),
    "min_learning_rate_ratio": (0.0, 1.0),
    "warmup_steps": (None, 0, 10_000),
    "weight_decay": (0.0,),
    "beta1": (0.0,),
    "max_gradient_norm": (0.0, 1e9),
    "layer_dropout_max": (0.0, 1.0),
    "layer_dropout_depth": ("uniform", "exp", "linear", "log", "sin", "sigmoid"),
    "layer_dropout_time": ("uniform", "exp"),
    "layer_dropout_part": ("block", "experts"),
    "expert_dropout": (0.0, 1.0),
    "exit_weights": ("paper", "equal", "drafting"),
    "drafting_exit": (None, 1, 100),
    "exit_loss_scale": (0.0, 5.0),
    "exit_curriculum": ("rotational", "gradual", "all", "none"),
    "exit_rotation": (1, 100),
    "exit_distillation": (0.0, 1.0),
    "router_coherence_weight": (0.0, 5.0),
    "precision": ("auto", "float32", "bfloat16", "float16"),
    "optimizer": ("adamw", "adamw8bit"),
    "compile": (None, True, False),
    "seed": (-1, 2**70),
    "validate_every": (None, 0, 1),
    "checkpoint_every": (None, 0, 1),
}


def pairs(table):
    return [(name, value) for name, values in table.items() for value in values]


def test_every_field_is_tried():
    assert REFUSED.keys() == {field.name for field in dataclasses.fields(TrainConfig)}


@pytest.mark.parametrize("name, value", pairs(REFUSED))
def test_a_value_that_makes_no_sense_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name) as error:
        TrainConfig(**{name: value})
    sentence = str(error.value)
    assert str(value) in sentence and sentence.endswith(".") and "\n" not in sentence


@pytest.mark.parametrize("name, value", pairs(ACCEPTED))
def test_a_value_at_the_edge_is_taken(name, value):
    others = {"exit_weights": "drafting"} if name == "drafting_exit" else {}
    assert getattr(TrainConfig(**{name: value}, **others), name) == value


def test_a_recipe_does_not_change_under_a_run():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig().learning_rate = 1.0


def test_a_drafting_exit_is_for_drafting_weights():
    with pytest.raises(ValueError, match=r"drafting_exit=2 is for exit_weights='drafting', not 'equal'\."):
        TrainConfig(max_steps=1, exit_weights="equal", drafting_exit=2)
    TrainConfig(max_steps=1, exit_weights="drafting", drafting_exit=2)


def test_drafting_weights_without_early_exits_are_refused():
    with pytest.raises(
        ValueError, match=r"exit_weights='drafting' has nothing to supervise under exit_curriculum='none'"
    ):
        TrainConfig(max_steps=1, exit_weights="drafting", exit_curriculum="none")


@pytest.mark.parametrize(("name", "value"), LARGE, ids=[name for name, _ in LARGE])
def test_numbers_without_end_are_refused(name, value):
    with pytest.raises(ValueError, match=f"^{name}=.* is too large; it must be 9223372036854775807 or less."):
        TrainConfig(**{name: value})
    assert TrainConfig(seed=10**400).seed == 10**400, "a seed may be any number"


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(TrainConfig)])
def test_long_values_are_not_told_whole(name):
    for value in ("x" * 10**5, [0] * 1000):
        with pytest.raises(ValueError, match=f"^{name}=") as refused:
            TrainConfig(**{name: value})
        assert len(str(refused.value)) < 500
