"""evaluate_exits against a reference that unembeds everything at once, one window at a time."""

import pytest
import torch

from layerskip_moe.analysis import evaluate_exits, held_out


def _reference(model, tokens, seq_len, n_windows):
    """Perplexity and agreement per exit, each exit by running only its own layers."""
    model.eval()
    perplexity, agreement = [], []
    for depth in range(1, model.config.n_layers + 1):
        nats, same = [], []
        for start in range(0, n_windows * seq_len, seq_len):
            inputs, labels = tokens[start : start + seq_len][None], tokens[start + 1 : start + seq_len + 1]
            positions = torch.arange(seq_len)[None]
            hidden = model.run(model.embed(inputs), range(depth), positions=positions).hidden
            logits = model.unembed(hidden)[0]
            nats += (-logits.log_softmax(-1)[torch.arange(seq_len), labels]).tolist()
            same += (logits.argmax(-1) == model(inputs)[0].argmax(-1)).tolist()
        perplexity.append(torch.tensor(nats, dtype=torch.float64).mean().exp().item())
        agreement.append(sum(same) / len(same))
    return perplexity, agreement


@pytest.mark.parametrize("live_logits", [2**24, 5 * 17, 1])
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_equals_a_reference_for_every_batch_and_chunk_size(decoder, tokens, monkeypatch, live_logits, batch_size):
    monkeypatch.setattr(held_out, "LIVE_LOGITS", live_logits)
    model, text = decoder(), tokens(45)  # 7 windows of 6, and 2 tokens left over
    found = evaluate_exits(model, text, seq_len=6, batch_size=batch_size, progress=False)
    with torch.no_grad():
        perplexity, agreement = _reference(model, text, seq_len=6, n_windows=7)
    assert found.perplexity == pytest.approx(perplexity, rel=1e-5)  # cross entropies are float32
    assert found.agreement == pytest.approx(agreement)
    assert found.agreement[-1] == 1.0 and min(found.agreement) < 1.0
    assert found.tokens == 42


def test_max_windows_takes_the_first_ones(decoder, tokens):
    model, text = decoder(), tokens(100)
    some = evaluate_exits(model, text, seq_len=6, batch_size=2, max_windows=3, progress=False)
    assert some == evaluate_exits(model, text[:19], seq_len=6, batch_size=2, progress=False)
    assert some.tokens == 18


def test_one_pass_per_batch_and_one_chunk_of_logits_at_a_time(decoder, tokens, monkeypatch):
    model, passes, rows = decoder(), [], []
    monkeypatch.setattr(held_out, "LIVE_LOGITS", 4 * 17)
    run, unembed = model.run, model.unembed
    monkeypatch.setattr(model, "run", lambda hidden, layers, **how: passes.append(1) or run(hidden, layers, **how))
    monkeypatch.setattr(model, "unembed", lambda hidden: rows.append(hidden.shape[:-1].numel()) or unembed(hidden))
    evaluate_exits(model, tokens(37), seq_len=6, batch_size=2, progress=False)
    assert len(passes) == 3
    assert max(rows) == 4 and sum(rows) == 36 * 3


def test_a_single_layer_agrees_with_itself(decoder, tokens):
    found = evaluate_exits(decoder(n_layers=1), tokens(20), seq_len=6, batch_size=2, progress=False)
    assert len(found.perplexity) == 1 and found.agreement == [1.0]


def test_dropout_is_off_and_every_module_gets_its_mode_back(decoder, tokens):
    model = decoder(dropout=0.5).train()
    model.norm.eval()  # a user may have frozen a part
    modes = [module.training for module in model.modules()]
    first, second = (evaluate_exits(model, tokens(40), seq_len=6, batch_size=4, progress=False) for _ in range(2))
    assert first == second
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize(
    ("text", "seq_len", "said"),
    [
        (torch.zeros(6, dtype=torch.long), 6, "longer text"),
        (torch.full((40,), 17), 6, "vocabulary of 17"),
        (torch.zeros(100, dtype=torch.long), 33, "max_seq_len is 32"),
    ],
)
def test_bad_input_is_refused_and_the_mode_put_back(decoder, text, seq_len, said):
    model = decoder().train()
    with pytest.raises(ValueError, match=said):
        evaluate_exits(model, text, seq_len=seq_len, batch_size=2, progress=False)
    assert all(module.training for module in model.modules())
