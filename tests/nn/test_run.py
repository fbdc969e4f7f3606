"""`run` is the one way through the network: any range of its layers, causal, refusing what it cannot do."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layerskip_moe.nn import MoEDecoder


def states_of(model, rows=2, length=7, seed=0):
    tokens = torch.randint(23, (rows, length), generator=torch.Generator().manual_seed(seed))
    return model.embed(tokens), torch.arange(length).expand(rows, length)


@given(
    changed=st.integers(0, 11), seed=st.integers(0, 3), switches=st.sampled_from([{}, {"moe_layers": "every other"}])
)
@settings(max_examples=20, deadline=None)
@torch.no_grad()
def test_a_future_token_never_changes_an_earlier_logit(tiny_model, changed, seed, switches):
    model = tiny_model(seed=seed, **switches)
    tokens = torch.randint(23, (2, 12), generator=torch.Generator().manual_seed(seed))
    other = tokens.clone()
    other[0, changed] = (other[0, changed] + 1) % 23
    before, after = model(tokens), model(other)
    torch.testing.assert_close(before[0, :changed], after[0, :changed], atol=1e-12, rtol=0)
    torch.testing.assert_close(before[1], after[1], atol=1e-12, rtol=0)
    # ... and does reach every later one.
    assert (before[0, changed:] - after[0, changed:]).abs().amax(-1).min() > 1e-6


@torch.no_grad()
def test_a_row_does_not_depend_on_its_batch(tiny_model):
    for switches, tolerance in (({"num_experts": 0}, 1e-12), ({}, 2e-5)):  # the router is in float32
        model = tiny_model(**switches)
        tokens = torch.randint(23, (3, 9), generator=torch.Generator().manual_seed(1))
        alone = torch.cat([model(row[None]) for row in tokens])
        torch.testing.assert_close(model(tokens), alone, atol=tolerance, rtol=tolerance)


@given(first=st.integers(0, 4))
@settings(deadline=None)
@torch.no_grad()
def test_two_runs_one_after_the_other_are_one_run(tiny_model, first):
    model = tiny_model()
    hidden, positions = states_of(model)
    early = model.run(hidden, range(first), positions=positions)
    late = model.run(early.hidden, range(first, 4), positions=positions)
    whole = model.run(hidden, range(4), positions=positions)
    assert torch.equal(late.hidden, whole.hidden)
    assert list(early.routing | late.routing) == list(whole.routing) == [0, 1, 2, 3]


@torch.no_grad()
def test_gaps_are_allowed(tiny_model):
    model = tiny_model()
    hidden, positions = states_of(model)
    expected = hidden
    for layer in (0, 3):
        expected = model.run(expected, [layer], positions=positions).hidden
    skipped = model.run(hidden, [0, 3], positions=positions)
    assert torch.equal(skipped.hidden, expected)
    assert list(skipped.routing) == [0, 3]


def test_no_layers_give_hidden_back(tiny_model):
    model = tiny_model()
    hidden, positions = states_of(model)
    output = model.run(hidden, [], positions=positions)
    assert torch.equal(output.hidden, hidden)
    assert output.routing == {} and output.collected == {}


@torch.no_grad()
def test_collect_gives_each_layer_s_output(tiny_model):
    model = tiny_model()
    hidden, positions = states_of(model)
    output = model.run(hidden, range(4), positions=positions, collect=[0, 2, 3])
    assert sorted(output.collected) == [0, 2, 3]
    for layer, collected in output.collected.items():
        assert torch.equal(collected, model.run(hidden, range(layer + 1), positions=positions).hidden)
    assert torch.equal(output.collected[3], output.hidden)


@torch.no_grad()
def test_forward_is_embed_run_unembed(tiny_model):
    for model in (tiny_model(), tiny_model(tie_embeddings=True)):
        tokens = torch.randint(23, (2, 6), generator=torch.Generator().manual_seed(2))
        positions = torch.arange(6).expand(2, 6)
        hidden = model.run(model.embed(tokens), range(4), positions=positions).hidden
        normed = hidden / (hidden.pow(2).mean(-1, keepdim=True) + model.config.norm_eps).sqrt() * model.norm.weight
        head = model.embedding.weight if model.config.tie_embeddings else model.head.weight
        torch.testing.assert_close(model(tokens), normed @ head.T, atol=1e-12, rtol=1e-12)
        assert model(tokens).shape == (2, 6, 23)


@torch.no_grad()
def test_rotary_positions_are_relative(tiny_model):
    """Without a cache a text moved along by a constant reads the same (up to the angles' rounding)."""
    model = tiny_model(n_layers=2)
    hidden, positions = states_of(model)
    here = model.run(hidden, range(2), positions=positions).hidden
    there = model.run(hidden, range(2), positions=positions + 3).hidden
    torch.testing.assert_close(here, there, atol=1e-5, rtol=1e-5)
    stretched = model.run(hidden, range(2), positions=positions * 3).hidden
    assert (here - stretched).abs().max() > 1e-3


@torch.no_grad()
def test_expert_mask_per_layer(tiny_model):
    model = tiny_model()
    hidden, positions = states_of(model)
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[0, [0, 1, 2]] = False
    mask[2, 4] = False
    output = model.run(hidden, [0, 1, 3], positions=positions, expert_mask=mask)
    assert set(output.routing[0].chosen.unique().tolist()) == {3, 4}
    assert 4 not in output.routing[3].chosen
    one_by_one = hidden
    for index, layer in enumerate([0, 1, 3]):
        one_by_one = model.run(one_by_one, [layer], positions=positions, expert_mask=mask[index]).hidden
    assert torch.equal(output.hidden, one_by_one)


@torch.no_grad()
def test_fewer_experts_for_drafting(tiny_model):
    model, narrow = tiny_model(), tiny_model(top_k=1)
    hidden, positions = states_of(model)
    output = model.run(hidden, range(4), positions=positions, top_k=1)
    assert output.routing[2].chosen.shape == (14, 1)
    assert torch.equal(output.hidden, narrow.run(hidden, range(4), positions=positions).hidden)


@pytest.mark.parametrize("layers", [[1, 0], [0, 0], [0, 4], [-1], [2, 3, 1]], ids=str)
def test_layers_out_of_order_or_range_are_refused(tiny_model, layers):
    model = tiny_model()
    hidden, positions = states_of(model)
    with pytest.raises(ValueError, match="must rise and lie within 0 to 3"):
        model.run(hidden, layers, positions=positions)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(top_k=0), "top_k=0 must be between 1 and num_experts=5"),
        (dict(top_k=6), "top_k=6 must be between 1 and num_experts=5"),
        (dict(expert_mask=torch.tensor([True, False, False, False, False])), "fewer experts active than the top 2"),
        (dict(expert_mask=torch.tensor([[True] * 5, [False] * 5])), "fewer experts active than the top 2"),
        (dict(expert_mask=torch.tensor([True] * 3 + [False] * 2), top_k=4), "fewer experts active than the top 4"),
        (dict(keep=torch.ones(4, 2, dtype=torch.bool)), r"keep is \[4, 2\] but 2 layers run 2 samples"),
        (dict(keep_experts=torch.ones(1, 2, dtype=torch.bool)), r"keep_experts is \[1, 2\] but 2 layers run 2 samples"),
        (
            dict(expert_mask=torch.ones(3, 5, dtype=torch.bool)),
            r"expert_mask is \[3, 5\] but must be \(5,\) or \(2, 5\)",
        ),
        (dict(keep=torch.ones(2, 1, dtype=torch.bool)), r"keep is \[2, 1\] but 2 layers run 2 samples"),
        (dict(expert_mask=torch.ones(4, dtype=torch.bool)), r"expert_mask is \[4\] but must be"),
        (dict(collect=[0, 2]), r"collect=\[0, 2\] names layers that do not run"),
    ],
    ids=str,
)
def test_what_cannot_be_run_is_refused(tiny_model, arguments, message):
    model = tiny_model()
    hidden, positions = states_of(model)
    with pytest.raises(ValueError, match=message):
        model.run(hidden, [0, 1], positions=positions, **arguments)


def test_a_text_longer_than_max_seq_len_is_refused(tiny_model):
    model = tiny_model(max_seq_len=8)
    assert model(torch.zeros(1, 8, dtype=torch.int64)).shape == (1, 8, 23)
    with pytest.raises(ValueError, match="9 positions are too many: max_seq_len is 8"):
        model(torch.zeros(1, 9, dtype=torch.int64))


def test_dropout_acts_in_training_mode_only(tiny_model):
    model, plain = tiny_model(dropout=0.5), tiny_model()
    tokens = torch.randint(23, (2, 6), generator=torch.Generator().manual_seed(3))
    assert torch.equal(model(tokens), plain(tokens))
    model.train()
    torch.manual_seed(0)
    first, second = model(tokens), model(tokens)
    assert not torch.allclose(first, second)
    plain.train()
    assert torch.equal(plain(tokens), plain(tokens))


@pytest.mark.parametrize("sublayer", ["attention", "dense", "experts"])
def test_dropout_zeroes_sublayer_outputs_and_not_the_residual_stream(tiny_model, sublayer):
    """With p = 0.5, what the stream gains is 0 or twice the sublayer's output, element by element."""
    model = tiny_model(dropout=0.5, n_layers=1, num_experts=5 if sublayer == "experts" else 0)
    block = model.blocks[0]
    silent = block.mlp.down if sublayer == "attention" else block.attention.output
    with torch.no_grad():
        silent.weight.zero_()  # leaves the other sublayer alone to be seen
    hidden, positions = states_of(model)
    full = model.run(hidden, [0], positions=positions).hidden - hidden
    model.train()
    torch.manual_seed(1)
    gained = model.run(hidden, [0], positions=positions).hidden - hidden
    dropped = gained.abs() < 1e-12
    torch.testing.assert_close(gained[~dropped], 2 * full[~dropped])
    # 224 elements, each dropped with probability 1/2: outside 70..154 once in 10^8 (binomial, 5.6 sigma).
    assert 70 <= int(dropped.sum()) <= 154


def test_parameter_counts():
    from layerskip_moe.nn import ModelConfig

    model = MoEDecoder(
        ModelConfig(vocab_size=10, n_layers=2, d_model=8, n_heads=2, d_ff=4, num_experts=4, top_k=1, moe_layers=(1,))
    )
    attention = 3 * 8 * 8 + 8 * 8 + 2 * 4  # qkv, output, the norms of query and key
    dense, expert = 3 * 8 * 4, 3 * 8 * 4
    total = 2 * 10 * 8 + 8 + 2 * (attention + 2 * 8) + dense + 4 * 8 + 4 * expert
    assert model.parameter_counts() == (total, total - 3 * expert)
