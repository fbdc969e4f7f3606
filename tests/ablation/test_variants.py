"""Variants: what each changes, and how they are named, joined and refused."""

import dataclasses

import pytest

from layerskip_moe import ModelConfig, MoEDecoder, TrainConfig
from layerskip_moe.ablation import named_variants, usual_variants
from layerskip_moe.ablation.variants import COMBINATIONS, Variant

# The default network of `layerskip-moe ablate`.
USUAL = ModelConfig(vocab_size=2048, d_model=192, n_heads=4, n_kv_heads=2, d_ff=192, dense_d_ff=384)


def changed(config, variant):
    return dataclasses.replace(config, **variant.network)


def test_each_changes_something_that_exists_and_the_base_nothing():
    variants = usual_variants(USUAL)
    made = {name: (changed(USUAL, of), TrainConfig(**of.recipe)) for name, of in variants.items()}
    assert made["base"] == (USUAL, TrainConfig())
    assert len({repr(one) for one in made.values()}) == len(variants)


def test_active_parameters_are_equal_where_that_is_the_point():
    variants = usual_variants(USUAL)

    active = {name: MoEDecoder(changed(USUAL, of)).parameter_counts()[1] for name, of in variants.items()}
    for name in ("shared", "deep", "wide", "every-other", "first-half", "last-half"):
        assert active[name] == pytest.approx(active["base"], rel=0.02), name
    shapes = {
        name: (config.n_layers, config.d_model) for name in variants if (config := changed(USUAL, variants[name]))
    }
    assert (shapes["base"], shapes["deep"], shapes["wide"]) == ((8, 192), (16, 136), (4, 272))


@pytest.mark.parametrize("vocab_size", [8, 512, 4096])
def test_reshaped_networks_make_up_for_the_embedding(vocab_size):
    base = dataclasses.replace(USUAL, vocab_size=vocab_size, moe_layers="every other")
    deep, wide = (changed(base, usual_variants(base)[name]) for name in ("deep", "wide"))
    assert (deep.dense_d_ff, wide.dense_d_ff) == (2 * deep.d_ff, 2 * wide.d_ff)
    for network in (deep, wide):
        counted = [MoEDecoder(config).parameter_counts()[1] for config in (network, base)]
        assert counted[0] == pytest.approx(counted[1], rel=0.02)


def test_what_a_network_leaves_no_room_for_is_absent():
    assert "shared" not in usual_variants(dataclasses.replace(USUAL, top_k=1))
    given = usual_variants(dataclasses.replace(USUAL, moe_layers=(0, 3)))
    assert not {"deep", "wide"} & given.keys()
    assert not any("deep" in name for name in named_variants([], given))
    assert "wide" not in usual_variants(dataclasses.replace(USUAL, vocab_size=50_000))
    odd = usual_variants(ModelConfig(vocab_size=8, n_layers=1, d_model=6, n_heads=3))
    assert "wide" not in odd


def test_without_names_there_are_all_and_the_combinations():
    known = usual_variants(USUAL)
    assert list(named_variants([], known)) == [*known, *COMBINATIONS]


def test_the_base_comes_first_and_names_are_joined():
    known = usual_variants(USUAL)
    chosen = named_variants(["deep+every-other", "paper", "base", "paper"], known)
    assert list(chosen) == ["base", "deep+every-other", "paper"]
    assert chosen["paper"] == known["paper"]
    assert chosen["deep+every-other"] == Variant(known["deep"].network | {"moe_layers": "every other"}, {})
    both = changed(USUAL, chosen["deep+every-other"])
    assert (both.n_layers, both.moe_layers) == (16, "every other")


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("papers", "'papers' is no variant; did you mean paper?"),
        ("paper+zzz", "'zzz' is no variant; they are base, paper,"),
        ("paper+drafting", "'paper\\+drafting' changes exit_weights twice"),
        ("first-half+last-half", "changes moe_layers twice"),
    ],
)
def test_a_name_that_is_none_is_refused(name, sentence):
    with pytest.raises(ValueError, match=sentence):
        named_variants([name], usual_variants(USUAL))
