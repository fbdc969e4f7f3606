"""Configurations of any values: a network, or one sentence that says which value is wrong."""

import dataclasses

import torch
from hypothesis import given
from hypothesis import strategies as st

from layerskip_moe.nn import ModelConfig, MoEDecoder, RopeScaling
from layerskip_moe.pretrained.families import FAMILIES, read_config
from layerskip_moe.training import TrainConfig

NETWORK = dict(vocab_size=11, n_layers=2, d_model=8, n_heads=2, num_experts=3, d_ff=8)


def names(kind):
    return [field.name for field in dataclasses.fields(kind)]


def some_of(fields, values):
    """A few fields with values of another kind, and now and then one that does not exist."""
    return st.dictionaries(st.sampled_from(fields), values, min_size=1, max_size=3)


def test_networks(cases, refused, junk):
    @cases("networks")
    @given(some_of(names(ModelConfig), junk), some_of(names(RopeScaling), junk), st.booleans())
    def check(changes, scaling, scaled):
        def build():
            rope = {"kind": "llama3", "factor": 8.0, "original_max_seq_len": 64} | scaling
            config = ModelConfig(**(NETWORK | ({"rope_scaling": rope} if scaled else {}) | changes))
            if config.n_layers < 50:  # a layer takes a millisecond
                with torch.device("meta"):  # without memory, so that the sizes alone are on trial
                    MoEDecoder(config)

        refused(build)

    check()


def test_recipes(cases, refused, junk):
    @cases("recipes")
    @given(some_of(names(TrainConfig), junk))
    def check(changes):
        refused(lambda: TrainConfig(**changes))

    check()


def test_other_people_s_networks(cases, refused, junk):
    fields = [*{name: None for facts in FAMILIES.values() for name in facts.defaults}]
    fields += ["head_dim", "architectures", "rope_scaling", "rope_parameters", "layer_types", "quantization_config"]
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "mscale": 1}
    more = ["type", "rope_theta", "beta_fast", "beta_slow", "low_freq_factor", "high_freq_factor", "mscale_all_dim"]

    @cases("other people's networks")
    @given(
        st.sampled_from([*FAMILIES]),
        some_of(fields, junk),
        st.none() | some_of([*scaling, *more], junk).map(lambda changes: {"rope_scaling": scaling | changes}),
    )
    def check(family, changes, scaled):
        refused(lambda: read_config({"model_type": family} | (scaled or {}) | changes))

    check()
