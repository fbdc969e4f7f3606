"""Prompts, sampling arguments and exit layers of any values: text, or one sentence before anything runs."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerskip_moe.generation import (
    Autoregressive,
    EarlyExit,
    LayerSkipping,
    LookupSpeculative,
    PromptLookup,
    SelfSpeculative,
    SparseSpeculative,
    generate,
)
from layerskip_moe.generation.policies import DEL, Adaptive, Cascade, DraftVerify, Fixed, Heuristic
from layerskip_moe.nn import ModelConfig, MoEDecoder


@pytest.fixture(scope="module")
def model():
    sizes = dict(vocab_size=11, n_layers=3, d_model=8, n_heads=2, num_experts=2, top_k=1, d_ff=8, max_seq_len=16)
    return MoEDecoder(ModelConfig(**sizes)).eval()


def test_prompts_and_sampling(cases, refused, junk, model):
    ids = st.integers(0, 10)
    odd = junk | st.lists(ids | junk, max_size=4) | st.lists(ids, max_size=20)
    options = ["temperature", "top_k", "top_p", "repetition_penalty", "seed", "stop_tokens", "stop_strings"]
    options += ["max_new_tokens", "batch_size", "prompts"]
    usual = dict(prompts=[[1, 2], [3]], max_new_tokens=3, temperature=0.8, compile=False)

    @cases("prompts and sampling")
    @given(
        st.dictionaries(st.sampled_from(options), junk, min_size=1, max_size=2),
        st.none() | st.lists(odd, max_size=3),
    )
    def check(changes, prompts):
        how = usual | changes | ({} if prompts is None else {"prompts": prompts})
        refused(lambda: generate(model, **how))

    check()


def test_exit_layers(cases, refused, junk, model):
    kinds = {
        Autoregressive: ["exit_layer"],
        SelfSpeculative: ["exit_layer", "draft_length", "coupling"],
        LookupSpeculative: ["exit_layer", "draft_length", "ngram", "min_ngram"],
        PromptLookup: ["draft_length", "ngram", "min_ngram"],
        SparseSpeculative: ["draft_layers", "draft_length", "draft_top_k"],
        EarlyExit: ["threshold", "min_layer", "decay", "cache", "tau", "confidence"],
        LayerSkipping: ["layers", "every", "random"],
        Fixed: ["exit_layer", "draft_length"],
        Heuristic: ["exit_layer", "length", "threshold"],
        Cascade: ["exit_layer", "start", "length", "trial", "trials", "rounds"],
        DraftVerify: ["exit_layer", "length", "threshold"],
        DEL: ["length", "decay"],
        Adaptive: ["length"],
    }
    needed = {kind: {"exit_layer": 1} for kind in (LookupSpeculative, Heuristic, Cascade, DraftVerify)}
    needed |= {EarlyExit: {"threshold": 0.5}, Fixed: {"exit_layer": 1, "draft_length": 2}}

    @cases("exit layers")
    @given(st.data())
    def check(data):
        kind = data.draw(st.sampled_from([*kinds]))
        changes = data.draw(st.dictionaries(st.sampled_from(kinds[kind]), junk, min_size=1, max_size=2))

        def decode():
            strategy = kind(**(needed.get(kind, {}) | changes))
            strategy = SelfSpeculative(policy=strategy) if hasattr(strategy, "plan") else strategy
            generate(model, [[1, 2, 1]], strategy, max_new_tokens=3, compile=False)

        refused(decode)

    check()
