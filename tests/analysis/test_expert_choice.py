"""expert_choice against counting one token at a time, and routers whose answer is known."""

import importlib
from collections import Counter, defaultdict
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from layerskip_moe.analysis import expert_choice, held_out

# The function's module: the room exports the function by the same name.
room = importlib.import_module("layerskip_moe.analysis.expert_choice")

LETTERS = SimpleNamespace(decode=lambda ids: "".join(chr(ord("a") + token) for token in ids))


def _routed_by(monkeypatch, chosen):
    """Let every MoE layer choose by chosen(inputs [B, T]) -> [B, T, K], and run nothing."""

    def run(model, inputs, *, collect):
        routing = SimpleNamespace(chosen=chosen(inputs).flatten(0, 1))
        return SimpleNamespace(routing=dict.fromkeys(range(model.config.n_layers), routing))

    monkeypatch.setattr(held_out, "run_layers", run)


def _is_lower_bound(bound, share, n, z):
    """Wilson's interval by its definition: the shares that lie z of their own standard errors from the measured."""
    return bound <= share and (share - bound) ** 2 == pytest.approx(z**2 * bound * (1 - bound) / n)


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_equals_counting_one_token_at_a_time(decoder, tokens, monkeypatch, batch_size):
    monkeypatch.setattr(room, "_MIN_COUNT", 3)
    monkeypatch.setattr(room, "_STANDARD_ERRORS", 1.0)
    model, text, n_windows = decoder(n_layers=4, moe_layers="every other"), tokens(160), 23  # and 21 tokens left over
    found = expert_choice(
        model, text, LETTERS, seq_len=6, batch_size=batch_size, max_windows=n_windows, top=3, progress=False
    )
    pairs = {1: ([], []), 3: ([], [])}  # layer -> (token, choices) of each half
    with torch.no_grad():
        for window in range(n_windows):
            inputs = text[6 * window : 6 * window + 6]
            out = model.eval().run(model.embed(inputs[None]), range(4), positions=torch.arange(6)[None])
            for layer, routing in out.routing.items():
                pairs[layer][window >= 11].extend(zip(inputs.tolist(), routing.chosen.tolist(), strict=True))
    assert found.tokens == 138 and list(found.layers) == [1, 3]
    for layer, (first, second) in pairs.items():
        load, by_token = Counter(), defaultdict(Counter)
        for token, experts in first:
            load.update(experts)
            by_token[token].update(experts)
        usual = sorted(range(4), key=lambda e: -load[e])[:2]
        hits = usual_hits = 0
        for token, experts in second:
            best = sorted(range(4), key=lambda e: (-by_token[token][e], -load[e]))[:2]
            hits += len(set(best) & set(experts))
            usual_hits += len(set(usual) & set(experts))
        assert found.layers[layer].token_dependence == pytest.approx(hits / (2 * len(second)))
        assert found.layers[layer].chance == pytest.approx(usual_hits / (2 * len(second)))
        _check_typical_tokens(found.layers[layer].experts, first + second)


def _check_typical_tokens(experts, pairs, z=1.0, min_count=3, top=3):
    count = Counter(token for token, _ in pairs)
    assert any(experts)
    for expert, best in enumerate(experts):
        share, bound = {}, {}
        usual = sum(expert in chosen for _, chosen in pairs) / len(pairs)
        for token, n in count.items():
            share[token] = sum(expert in chosen for other, chosen in pairs if other == token) / n
            bound[token] = float(room._lower_bound(torch.tensor(share[token]).double(), torch.tensor(n).double()))
            assert _is_lower_bound(bound[token], share[token], n, z)
        typical = [t for t, n in count.items() if n >= min_count and bound[t] > usual and share[t] > usual]
        assert len(best) == min(top, len(typical))
        assert [chr(ord("a") + t) for t in sorted(typical, key=lambda t: (-bound[t], t))[:top]] == [
            b.text for b in best
        ]
        for told in best:
            token = ord(told.text) - ord("a")
            assert told.count == count[token] and told.share == pytest.approx(share[token])
            # P(token | expert) / P(token), by its definition.
            given_expert = share[token] * count[token] / sum(expert in chosen for _, chosen in pairs)
            assert told.lift == pytest.approx(given_expert / (count[token] / len(pairs))) and told.lift > 1


def test_a_router_that_sees_only_the_token_is_foreseen_in_full(decoder, tokens):
    model = decoder()
    for block in model.blocks:
        block.attention.output.weight.data.zero_()  # nothing of the text before, and no position, gets through
    text = tokens(60).repeat(2)
    found = expert_choice(model, text, LETTERS, seq_len=17, batch_size=3, progress=False)
    assert set(text[:51].tolist()) >= set(text[51:].tolist()), "the first half shows every token"
    for layer in found.layers.values():
        assert layer.token_dependence == 1.0 and layer.chance < 1.0
        assert all(told.share == 1.0 for best in layer.experts for told in best)


def test_a_router_that_always_chooses_the_same_needs_no_token(decoder, tokens):
    model = decoder(bias_balancing=True)
    for block in model.blocks:
        block.mlp.router.balance_bias.copy_(torch.tensor([0.0, 5.0, 0.0, 5.0]))
    found = expert_choice(model, tokens(300), LETTERS, seq_len=10, batch_size=8, progress=False)
    for layer in found.layers.values():
        assert layer.token_dependence == layer.chance == 1.0
        assert layer.experts == [[], [], [], []]  # no token is more typical than another


def test_a_router_that_throws_dice_cannot_be_foreseen_however_rare_the_tokens(decoder, monkeypatch):
    model = decoder(n_layers=1, vocab_size=2000, num_experts=8, top_k=1, max_seq_len=100)
    generator = torch.Generator().manual_seed(1)
    _routed_by(monkeypatch, lambda inputs: torch.randint(8, (*inputs.shape, 1), generator=generator))
    text = torch.randint(2000, (20001,), generator=generator)  # each token 5 times in a half
    layer = expert_choice(model, text, LETTERS, seq_len=100, batch_size=10, progress=False).layers[0]
    # Learnt and tested on the same text, it would be about 2 in 5.
    assert layer.token_dependence == pytest.approx(1 / 8, abs=0.015)
    assert layer.chance == pytest.approx(1 / 8, abs=0.015)
    assert sum(map(len, layer.experts)) < 0.005 * 8 * 2000


def test_an_unseen_token_is_foreseen_by_load(decoder, monkeypatch):
    model = decoder(n_layers=1, num_experts=3, top_k=1)
    experts = torch.tensor([0, 2, 2, 2, 1])  # by token id
    _routed_by(monkeypatch, lambda inputs: experts[inputs][..., None])
    text = torch.tensor([0, 0, 1, 1, 1, 2, 0, 0, 3, 3, 3, 4, 0])
    layer = expert_choice(model, text, LETTERS, seq_len=6, batch_size=2, progress=False).layers[0]
    assert layer.token_dependence == pytest.approx(5 / 6)  # 0 was seen, 3 goes with the load, 4 against it
    assert layer.chance == pytest.approx(3 / 6)


def test_rare_tokens_do_not_win(decoder, monkeypatch):
    model = decoder(n_layers=1, num_experts=2, top_k=1)
    # Token 0 always goes to expert 0 but is rare, 1 does so a little less rarely, 2 nearly always; 3 never.
    counts = {0: 9, 1: 12, 2: 300, 3: 319}
    text = torch.cat([torch.full((n,), token) for token, n in counts.items()] + [torch.tensor([3])])
    chosen = (text == 3).long()
    chosen[[25, 200]] = 1  # two of token 2's
    windows = iter(chosen[:640].view(-1, 32))
    _routed_by(monkeypatch, lambda inputs: next(windows)[None, :, None])
    layer = expert_choice(model, text, LETTERS, seq_len=32, batch_size=1, progress=False).layers[0]
    first, second = layer.experts
    assert [told.text for told in first] == ["c", "b"] and [told.share for told in first] == [298 / 300, 1.0]
    assert [told.text for told in second] == ["d"] and second[0].lift == pytest.approx(1 / (321 / 640))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.lists(st.integers(0, 16), min_size=13, max_size=60), top_k=st.integers(1, 4), top=st.integers(1, 3))
def test_shares_are_shares_for_any_text(decoder, text, top_k, top):
    model = decoder(n_layers=1, top_k=top_k)
    layer = expert_choice(
        model, torch.tensor(text), LETTERS, seq_len=6, batch_size=4, top=top, progress=False
    ).layers[0]  # fmt: skip
    assert 0 <= layer.token_dependence <= 1 + 1e-9 and 0 <= layer.chance <= 1 + 1e-9
    if top_k == 4:
        assert layer.token_dependence == layer.chance == 1.0
    for best in layer.experts:
        assert len(best) <= top
        assert all(0 < told.share <= 1 and told.lift > 1 and told.count >= 10 for told in best)


def test_a_token_without_text_is_named_by_its_id(decoder, tokens):
    model = decoder(n_layers=1)
    model.blocks[0].attention.output.weight.data.zero_()
    found = expert_choice(
        model, tokens(300), SimpleNamespace(decode=lambda ids: ""), seq_len=10, batch_size=8, progress=False
    )
    texts = {told.text for best in found.layers[0].experts for told in best}
    assert texts and texts <= {f"<{token}>" for token in range(17)}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_tokens_may_lie_beside_the_model(decoder, tokens):
    model = decoder(dtype=torch.float32).cuda()
    settings = dict(seq_len=10, batch_size=8, progress=False)
    found = [expert_choice(model, text, LETTERS, **settings) for text in (tokens(300), tokens(300).cuda())]
    assert found[0] == found[1]


def test_a_dense_model_chooses_nothing(decoder, tokens):
    found = expert_choice(decoder(num_experts=0), tokens(31), LETTERS, seq_len=5, batch_size=3, progress=False)
    assert found.layers == {} and found.tokens == 30


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seq_len": 20}, "at least two"),
        ({"max_windows": 1}, "at least two"),
        ({"top": 0}, "top=0"),
        ({"seq_len": 40}, "longer text"),
    ],
)
def test_bad_input_is_refused(decoder, tokens, change, said):
    how = dict(seq_len=5, batch_size=3, progress=False)
    with pytest.raises(ValueError, match=said):
        expert_choice(decoder(), tokens(31), LETTERS, **{**how, **change})


def test_the_mode_is_put_back(decoder, tokens):
    model = decoder().train()
    expert_choice(model, tokens(31), LETTERS, seq_len=5, batch_size=3, progress=False)
    assert all(module.training for module in model.modules())
