"""`bench speculation`: what is compared with what, drafts that are never right, and the tables."""

import pytest

from layerskip_moe.bench.speculation import SpeculationSettings, drafts_never_right, speculation_benchmark
from layerskip_moe.bench.speculation_tables import speculation_text
from layerskip_moe.generation import SelfSpeculative, Session, generate, self_speculative
from layerskip_moe.generation.cost_model import CostModel
from layerskip_moe.generation.policies import DEL, Adaptive
from layerskip_moe.generation.verification import Round
from layerskip_moe.nn import ModelConfig, MoEDecoder

PROMPTS = [[3, 1, 4, 1, 5, 9], [2, 7, 1, 8, 2, 8], [1, 1, 2, 3, 5, 8], [6, 6, 2, 6, 0, 7]]


@pytest.fixture(scope="module")
def network():
    """An untrained network of 4 layers whose exits are often right: the last ones add little."""
    sizes = dict(n_layers=4, d_model=16, n_heads=2, n_kv_heads=1, d_ff=16, num_experts=4, max_seq_len=64)
    return MoEDecoder(ModelConfig(23, **sizes, init_std=0.05), seed=1).eval()


def adaptive(network):
    """`SelfSpeculative()` where all that takes time are layers that verify: it drafts, whatever comes of it."""
    seconds = (0.0, 0.0, 0.0, 1e-6, 0.0, 1e-3, 0.0, 0.0, 0.0)
    config = network.config
    cost_model = CostModel(config.n_layers, tuple(range(config.n_layers)), config.num_experts, config.top_k, seconds)
    return SelfSpeculative(policy=Adaptive(cost_model=cost_model))


STRATEGIES = {
    "SelfSpeculative(), which drafts": adaptive,
    "1, 3": lambda network: SelfSpeculative(1, 3),
    "2, 3": lambda network: SelfSpeculative(2, 3),
    "3, 2": lambda network: SelfSpeculative(3, 2),
}


@pytest.mark.parametrize(
    ("in_one_call", "sampling"),
    [(True, dict(temperature=0.0)), (True, dict(temperature=0.8)), (False, dict(temperature=0.8, top_k=9))],
    ids=str,
)
@pytest.mark.parametrize("name", STRATEGIES)
def test_drafts_are_never_right_for_a_while(network, monkeypatch, name, in_one_call, sampling):
    """Neither where a round is one call, nor where a filter takes it apart."""
    how = dict(max_new_tokens=20, seed=2, **sampling)
    plain = generate(network, PROMPTS, **how).tokens
    before = generate(network, PROMPTS, STRATEGIES[name](network), **how)
    calls = {"draft_and_verify": 0, "settle": 0}
    for owner, called in ((self_speculative, "draft_and_verify"), (Round, "settle")):
        monkeypatch.setattr(owner, called, counted(getattr(owner, called), calls))
    with drafts_never_right():
        wrong = generate(network, PROMPTS, STRATEGIES[name](network), **how)
    monkeypatch.undo()
    after = generate(network, PROMPTS, STRATEGIES[name](network), **how)
    assert wrong.stats.accepted == 0
    assert before.tokens == wrong.tokens == after.tokens == plain
    assert wrong.stats.drafted > 0 and before.stats.accepted > 0 and after.stats.accepted > 0
    assert calls["draft_and_verify"] > 0 if in_one_call else calls["draft_and_verify"] == 0 < calls["settle"]


def counted(function, calls):
    """The function, which notes that it was called."""

    def call(*arguments):
        calls[function.__name__] += 1
        return function(*arguments)

    return call


def test_all_is_put_back_whatever_happens():
    places = [(Round, "settle"), (self_speculative, "draft_and_verify"), (self_speculative, "shadow_tokens")]
    places += [(Session, "prompt_agreement")]
    own = [getattr(*place) for place in places]
    with pytest.raises(KeyError), drafts_never_right():
        assert all(getattr(*place) is not function for place, function in zip(places, own, strict=True))
        raise KeyError
    assert [getattr(*place) for place in places] == own


def test_shadows_and_prompts_are_wrong_too(network):
    adaptive, by_layers = Adaptive(), DEL()
    with drafts_never_right():
        for policy in (adaptive, by_layers):
            generate(network, PROMPTS[:1], SelfSpeculative(policy=policy), max_new_tokens=30)
    # Nothing was ever right: what is left is the one half that everything begins with.
    assert all(adaptive._acceptance.rate(0, exit_layer) < 0.5 for exit_layer in adaptive.exits)
    assert max(by_layers.agreed[0][:-1]) <= 0.5 < by_layers.agreed[0][-1]


def test_rows_and_tables(network):
    settings = SpeculationSettings(
        max_new_tokens=6,
        draft_lengths=(1, 2),
        wrong_tokens=8,
        wrong_repeats=2,
        batch_size=3,
        batches=2,
        temperatures=(0.0, 0.7),
    )
    result = speculation_benchmark(network, {"one": PROMPTS, "other": PROMPTS[::-1]}, settings, progress=False)
    assert [(row["text"], row["temperature"]) for row in result["rows"]] == [
        ("one", 0.0),
        ("other", 0.0),
        ("one", 0.7),
        ("other", 0.7),
    ]
    for row in result["rows"]:
        pairs = [(pair["exit_layer"], pair["draft_length"], pair["int8"]) for pair in row["grid"]]
        own = [(layer, length, False) for layer in (1, 2) for length in (1, 2)]
        assert pairs == [*own, *((layer, length, True) for layer in (2, 4) for length in (7, 15))]
        assert row["best_fixed"]["speed_up"] == max(pair["speed_up"] for pair in row["grid"])
        assert row["identical_in_grid"] == row["outputs_in_grid"] == 4 * 9
        assert row["over_best_fixed"]["low"] <= row["over_best_fixed"]["median"] <= row["over_best_fixed"]["high"]
    assert [row["prompts"] for row in result["wrong"]] == [8, 8] and result["wrong"][0]["tokens"] == 8
    for row in result["batch"]:
        assert (row["batch_size"], row["identical"], row["outputs"]) == (3, 6, 6)
    tables = speculation_text(result).split("\n\n")
    assert [len(table.splitlines()) for table in tables] == [6, 4, 4]
    assert "| one | greedy |" in tables[0] and "| other | T 0.7 |" in tables[0] and "36 of 36" in tables[0]
