"""Exit weights and curricula: hand-computed values of the paper's formulas, and torchtune where it agrees."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from layerskip_moe.training import TrainConfig
from layerskip_moe.training.exit_loss import active_exits, exit_weights, usual_drafting_exit
from layerskip_moe.training.losses import step_exit_weights

ALL_4 = torch.ones(4, dtype=torch.bool)


def test_paper_weights_by_hand():
    # L=4, e_scale=0.2: e = 0.2*0, 0.2*1, 0.2*3, 3 + 0.2*(0+1+2) = 0, 0.2, 0.6, 3.6; their sum is 4.4
    assert exit_weights(ALL_4, scale=0.2).tolist() == pytest.approx([0, 0.2 / 4.4, 0.6 / 4.4, 3.6 / 4.4])
    # e_scale=1: 0, 1, 3, 6; layer 1 inactive: sum 9
    some = torch.tensor([True, False, True, True])
    assert exit_weights(some, scale=1.0).tolist() == pytest.approx([0, 0, 3 / 9, 6 / 9])
    # The paper's 24 layers, e_scale=0.2: e(22) = 0.2*253 = 50.6, e(23) = 23 + 50.6
    # (253 = 0+1+..+22 = 22*23/2); all e sum to 0.2*(22*23*24/6) + 73.6 = 404.8 + 73.6
    weights = exit_weights(torch.ones(24, dtype=torch.bool), scale=0.2)
    assert weights[22].item() == pytest.approx(50.6 / 478.4)
    assert weights[23].item() == pytest.approx(73.6 / 478.4)


def test_equal_weights_by_hand():
    assert exit_weights(ALL_4, kind="equal").tolist() == pytest.approx([0.2, 0.2, 0.2, 0.4])
    assert exit_weights(ALL_4, kind="equal", scale=0.5).tolist() == pytest.approx([1 / 7, 1 / 7, 1 / 7, 4 / 7])


def test_drafting_weights_by_hand():
    eight = torch.ones(8, dtype=torch.bool)  # a quarter of 8 layers: exit layer 2, which is index 1
    assert exit_weights(eight, kind="drafting").tolist() == pytest.approx([0, 1 / 3, 0, 0, 0, 0, 0, 2 / 3])
    assert exit_weights(ALL_4, kind="drafting", scale=0.5).tolist() == pytest.approx([0.2, 0, 0, 0.8])
    third = exit_weights(ALL_4, kind="drafting", scale=6.0, drafting_exit=3)
    assert third.tolist() == pytest.approx([0, 0, 0.75, 0.25])
    off = exit_weights(torch.tensor([True, True, False, True]), kind="drafting", drafting_exit=3)
    assert off.tolist() == [0, 0, 0, 1]  # it is not the exit's turn
    assert [usual_drafting_exit(n) for n in (1, 2, 4, 5, 8, 9, 24)] == [1, 1, 1, 2, 2, 3, 6]


@pytest.mark.parametrize("drafting_exit", [0, -1, 4, 5])
def test_a_drafting_exit_is_an_early_one(drafting_exit):
    with pytest.raises(ValueError, match=f"drafting_exit={drafting_exit} must be an early exit, 1 to 3 of 4"):
        exit_weights(ALL_4, kind="drafting", drafting_exit=drafting_exit)
    with pytest.raises(ValueError, match=f"drafting_exit={drafting_exit} must be an early exit, 1 to 3 of 4"):
        active_exits(0, 1, 4, kind="drafting", drafting_exit=drafting_exit)
    assert exit_weights(ALL_4, kind="equal", drafting_exit=drafting_exit).equal(exit_weights(ALL_4, kind="equal"))


@pytest.mark.parametrize("kind", ["paper", "equal", "drafting"])
@pytest.mark.parametrize("scale", [0.0, 0.2, 1.0])
def test_the_smallest_networks(kind, scale):
    assert exit_weights(torch.tensor([True]), kind=kind, scale=scale).tolist() == [1.0]
    two = exit_weights(torch.tensor([True, True]), kind=kind, scale=scale)
    assert two.tolist() == pytest.approx([0, 1] if kind == "paper" else [scale / (scale + 2), 2 / (scale + 2)])
    assert exit_weights(ALL_4, kind=kind, scale=0.0).tolist() == [0, 0, 0, 1]


@given(
    early=st.lists(st.booleans(), max_size=30),
    kind=st.sampled_from(["paper", "equal", "drafting"]),
    scale=st.floats(0.01, 10),
)
def test_weights_are_the_full_ones_renormalised(early, kind, scale):
    active = torch.tensor([*early, True])
    weights = exit_weights(active, kind=kind, scale=scale)
    assert weights.sum().item() == pytest.approx(1)
    assert (weights[~active] == 0).all() and weights[-1] > 0
    full = exit_weights(torch.ones_like(active), kind=kind, scale=scale)
    torch.testing.assert_close(weights / weights[-1], full / full[-1] * active)


def test_uniform_weights_agree_with_torchtune():
    from torchtune.modules.early_exit_loss import uniform_loss_scale

    for active in (ALL_4, torch.tensor([False, True, False, True])):
        theirs = uniform_loss_scale(active.nonzero()[:, 0].float(), 4, 0.3)
        ours = exit_weights(active, kind="equal", scale=0.6)[active]
        torch.testing.assert_close(ours.float(), theirs)


def test_torchtunes_sum_weights_are_not_the_papers():
    # Its "sum_l" lets the weights of two exits depend on whether a third is active; the paper's does not.
    from torchtune.modules.early_exit_loss import sum_l_loss_scale

    with_layer_2 = sum_l_loss_scale(torch.tensor([1.0, 2.0, 3.0]), 4, 0.2)
    without = sum_l_loss_scale(torch.tensor([1.0, 3.0]), 4, 0.2)
    assert (with_layer_2[0] / with_layer_2[2]).item() != pytest.approx((without[0] / without[1]).item())


@pytest.mark.parametrize(
    ("active", "options"),
    [
        (ALL_4, {"kind": "linear"}),
        (ALL_4, {"scale": -1.0}),
        (~ALL_4, {}),
        (torch.ones(0, dtype=torch.bool), {}),
    ],
)
def test_bad_weight_arguments_are_refused(active, options):
    with pytest.raises(ValueError):
        exit_weights(active, **options)


def layers_on(step, max_steps, n_layers, **options):
    return active_exits(step, max_steps, n_layers, **options).nonzero()[:, 0].tolist()


def test_rotation_by_hand():
    on = [layers_on(step, 100, 8, curriculum="rotational", rotation=3) for step in range(4)]
    assert on == [[0, 3, 6, 7], [1, 4, 7], [2, 5, 7], [0, 3, 6, 7]]


def test_rotation_agrees_with_torchtune_where_it_divides_the_layers():
    from torchtune.modules.early_exit_loss import RotationalEarlyExitCurriculum

    theirs = RotationalEarlyExitCurriculum([layer % 4 == 0 for layer in range(12)], max_steps=100)
    for step in range(20):
        assert active_exits(step, 100, 12, rotation=4).tolist() == theirs.get().tolist()
        theirs.step()


@given(n_layers=st.integers(1, 20), rotation=st.integers(1, 25), first=st.integers(0, 1000))
def test_rotation_gives_every_layer_its_turn_once(n_layers, rotation, first):
    steps = range(first, first + rotation)
    turns = sum(active_exits(step, 2000, n_layers, rotation=rotation).long() for step in steps)
    assert turns[:-1].tolist() == [1] * (n_layers - 1)
    assert turns[-1] == rotation


def test_gradual_by_hand():
    # L=4, T=80: one more layer every 80 / 8 = 10 steps, from the last down
    changes = {0: [3], 9: [3], 10: [2, 3], 19: [2, 3], 20: [1, 2, 3], 29: [1, 2, 3], 30: [0, 1, 2, 3]}
    for step, layers in changes.items():
        assert layers_on(step, 80, 4, curriculum="gradual") == layers
    assert layers_on(79, 80, 4, curriculum="gradual") == [0, 1, 2, 3]


@given(n_layers=st.integers(1, 20), max_steps=st.integers(1, 200))
def test_gradual_only_grows_and_is_complete_at_half_time(n_layers, max_steps):
    before = torch.zeros(n_layers, dtype=torch.bool)
    for step in range(max_steps):
        now = active_exits(step, max_steps, n_layers, curriculum="gradual")
        assert (now | before).equal(now)
        assert now.all() or 2 * step < max_steps
        before = now


@pytest.mark.parametrize("curriculum", ["rotational", "gradual", "all"])
def test_the_drafting_exit_is_supervised_at_every_step(curriculum):
    config = TrainConfig(exit_weights="drafting", drafting_exit=3, exit_curriculum=curriculum, exit_rotation=4)
    for step in range(40):
        assert step_exit_weights(config, 8, step, 40).tolist() == pytest.approx([0, 0, 1 / 3, 0, 0, 0, 0, 2 / 3])
    usual = TrainConfig(exit_weights="drafting", exit_curriculum=curriculum)
    assert step_exit_weights(usual, 8, 0, 40)[1] == pytest.approx(1 / 3)
    # Others have their turns as before, and other kinds of weights wait for it.
    options = dict(curriculum="rotational", rotation=4)
    assert layers_on(1, 40, 8, **options, kind="drafting", drafting_exit=3) == [1, 2, 5, 7]
    assert layers_on(1, 40, 8, **options, kind="equal", drafting_exit=3) == [1, 5, 7]
    assert layers_on(1, 40, 8, curriculum="none", kind="drafting") == [7]


def test_all_and_none():
    assert layers_on(5, 10, 4, curriculum="all") == [0, 1, 2, 3]
    assert layers_on(5, 10, 4, curriculum="none") == [3]
    assert layers_on(5, 10, 1, curriculum="none") == [0]


@pytest.mark.parametrize(
    "change", [{"step": 10}, {"step": -1}, {"n_layers": 0}, {"rotation": 0}, {"curriculum": "rotate"}]
)
def test_bad_curriculum_arguments_are_refused(change):
    arguments = {
        "step": 0,
        "max_steps": 10,
        "n_layers": 4,
        "curriculum": "rotational",
        "rotation": 2,
        **change,
    }
    with pytest.raises(ValueError):
        active_exits(**arguments)
