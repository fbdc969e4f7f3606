"""The loop: what is learned, what a step adds up, when it validates, what it keeps, and what it refuses."""

import math
import warnings

import pytest
import torch

from layerskip_moe.training import run as run_module
from layerskip_moe.training import train
from layerskip_moe.training.exit_loss import active_exits
from layerskip_moe.training.expert_dropout import expert_mask
from layerskip_moe.training.layer_dropout import layer_dropout_rates, layer_keep
from layerskip_moe.training.losses import validation_losses
from layerskip_moe.training.optimizer import learning_rate_at

L, E, K = 4, 4, 2


def of(result, split):
    return [record for record in result.metrics if record["split"] == split]


def weights_of(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_same_weights(one, other):
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_a_repetitive_text_is_learned_at_every_exit(decoder, text, recipe, tmp_path):
    model, corpus = decoder(), text()
    config = recipe(max_steps=40, learning_rate=0.03, layer_dropout_max=0.1, expert_dropout=0.1)
    before = [math.exp(loss) for loss in validation_losses(model, corpus.validation, config)]
    result = train(model, corpus, config, tmp_path, progress=False)
    assert all(after < 0.5 * at_first for after, at_first in zip(result.validation, before, strict=True))
    assert result.validation[-1] < 2  # each token says which comes next: 1 is perfect, 11 is knowing nothing
    losses = [record["loss"] for record in of(result, "train")]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def test_accumulated_batches_are_one_large_batch(decoder, text, recipe, tmp_path):
    shared = dict(
        layer_dropout_max=0.5, layer_dropout_time="uniform", expert_dropout=0.2, max_steps=4,
        moe_loss_weight=0.0, router_z_loss_weight=0.0,  # these are means over a batch, not over its tokens
    )  # fmt: skip
    one, two = decoder(dtype=torch.float64), decoder(dtype=torch.float64)
    large = train(one, text(), recipe(**shared, batch_size=8), tmp_path / "1", progress=False)
    small = train(two, text(), recipe(**shared, batch_size=4, accumulation=2), tmp_path / "2", progress=False)
    torch.testing.assert_close(one.state_dict(), two.state_dict(), rtol=1e-6, atol=1e-8)
    assert large.tokens == small.tokens == 4 * 8 * 8
    for a, b in zip(of(large, "train"), of(small, "train"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-9)
        assert a["exit_losses"] == pytest.approx(b["exit_losses"], rel=1e-9)
        assert a["gradient_norm"] == pytest.approx(b["gradient_norm"], rel=1e-9)
        assert a["load"] == b["load"]


def test_samples_are_kept_as_often_as_the_rates_say(decoder, text, recipe, tmp_path):
    steps, batch_size, seed = 20, 40, 3
    model = decoder()
    kept = torch.zeros(L)

    norms = [block.attention_norm for block in model.blocks]

    def count(norm, arguments):
        kept[norms.index(norm)] += len(arguments[0])

    for norm in norms:
        norm.register_forward_pre_hook(count)
    config = recipe(max_steps=steps, batch_size=batch_size, seq_len=4, layer_dropout_max=0.8, seed=seed)
    train(model, text(validation=0), config, tmp_path, progress=False)
    rates = torch.stack([layer_dropout_rates(step, steps, L, p_max=0.8) for step in range(steps)])  # [steps, L]
    drawn = [
        layer_keep(rates[step], seed=seed, step=step, sample_ids=torch.arange(batch_size) + step * batch_size)
        for step in range(steps)
    ]
    assert kept.tolist() == torch.stack(drawn).sum((0, 2)).tolist()
    assert kept[0] == steps * batch_size  # D(0) = 0
    dropped, expected = steps * batch_size - kept, batch_size * rates.sum(0)
    spread = (batch_size * (rates * (1 - rates)).sum(0)).sqrt()
    assert (expected[1:] > 20).all()
    assert ((dropped - expected)[1:].abs() < 5 * spread[1:]).all()  # 5 sigma, for a fixed seed


def test_each_step_supervises_the_exits_of_its_curriculum(decoder, text, recipe, tmp_path):
    config = recipe(max_steps=6, exit_curriculum="rotational", exit_rotation=3)
    result = train(decoder(), text(), config, tmp_path, progress=False)
    for step, record in enumerate(of(result, "train")):
        active = active_exits(step, 6, L, curriculum="rotational", rotation=3)
        assert list(record["exit_losses"]) == [str(layer + 1) for layer in range(L) if active[layer]]
        assert record["learning_rate"] == learning_rate_at(step, 6, config)


@pytest.mark.parametrize("expert_dropout", [0.0, 0.5])
def test_the_choice_bias_steps_towards_an_even_load(decoder, text, recipe, tmp_path, expert_dropout):
    model = decoder(bias_balancing=True, moe_layers=(1, 2))
    config = recipe(max_steps=1, bias_update_rate=0.25, expert_dropout=expert_dropout, accumulation=2)
    load = of(train(model, text(validation=0), config, tmp_path, progress=False), "train")[0]["load"]
    active = expert_mask(expert_dropout, E, K, seed=0, step=0, layers=range(L))
    assert expert_dropout == 0.0 or not active[[1, 2]].all()
    for layer in (1, 2):
        counts = load[str(layer)]
        assert sum(counts) == 2 * 4 * 8 * K  # both batches
        mean = sum(counts) / int(active[layer].sum())
        expected = [
            0.25 * ((count < mean) - (count > mean)) if active[layer, expert] else 0.0
            for expert, count in enumerate(counts)
        ]  # an expert that sat out was not too little liked
        bias = model.blocks[layer].mlp.router.balance_bias
        assert bias.tolist() == expected
        assert not bias.requires_grad and bias.grad is None


def test_bias_balancing_evens_out_a_lopsided_router(decoder, text, recipe, tmp_path):
    model = decoder(bias_balancing=True, n_layers=1)
    with torch.no_grad():  # everyone's first choice is expert 0 or 1
        model.blocks[0].mlp.router.weight.mul_(0.1)
        model.blocks[0].mlp.router.balance_bias += torch.tensor([0.5, 0.5, 0.0, 0.0])
    config = recipe(max_steps=60, learning_rate=1e-9, bias_update_rate=0.02, moe_loss_weight=0.0)
    records = of(train(model, text(validation=0), config, tmp_path, progress=False), "train")
    assert records[0]["max_violation"] == 1.0
    assert sum(record["max_violation"] for record in records[-10:]) / 10 < 0.6


@pytest.mark.parametrize(
    "length, steps",
    [
        (dict(max_steps=2, epochs=3.0), 2),
        (dict(max_steps=None, epochs=1.0), 13),  # 399 // 8 = 49 samples, in batches of 4
        (dict(max_steps=None, epochs=0.3), 4),
        (dict(max_steps=None, epochs=0.5, accumulation=4), 2),  # 4 steps an epoch
    ],
)
def test_the_length_of_a_run(decoder, text, recipe, tmp_path, length, steps):
    config = recipe(**length)
    result = train(decoder(), text(validation=0), config, tmp_path, progress=False)
    assert result.steps == len(of(result, "train")) == steps
    assert result.tokens == steps * 4 * 8 * config.accumulation
    assert result.losses["loss"] == result.metrics[-1]["loss"]
    assert result.validation == [] and result.best_step == steps


@pytest.mark.parametrize(
    "validate_every, validated", [(None, list(range(20))), (0, [19]), (3, [2, 5, 8, 11, 14, 17, 19]), (99, [19])]
)
def test_when_validation_happens(decoder, text, recipe, tmp_path, monkeypatch, validate_every, validated):
    monkeypatch.setattr(run_module, "validation_losses", lambda *_: [1.0, 0.0])
    config = recipe(max_steps=20, batch_size=1, validate_every=validate_every)
    if validate_every is None:
        validated = validated[1::2]  # ten times
    records = of(train(decoder(n_layers=2), text(), config, tmp_path, progress=False), "validation")
    assert [record["step"] for record in records] == validated
    assert records[0]["perplexity"] == pytest.approx([math.e, 1.0])


def test_a_validation_split_too_short_to_use_is_reported(decoder, text, recipe, tmp_path):
    with pytest.warns(UserWarning, match="validation split has 8 tokens.*seq_len"):
        result = train(decoder(), text(validation=8), recipe(), tmp_path, progress=False)
    assert of(result, "validation") == [] and result.validation == []
    for length in (0, 9):  # none is a choice; 9 tokens are one sample
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            result = train(decoder(), text(validation=length), recipe(), tmp_path, progress=False)
        assert len(result.validation) == (L if length else 0)


@pytest.mark.parametrize("keep_best, best_step", [(True, 4), (False, 8)])
def test_the_best_validations_weights_are_kept(decoder, text, recipe, tmp_path, monkeypatch, keep_best, best_step):
    last_layer = iter([3.0, 1.0, 2.0, 1.0])  # after 2, 4, 6 and 8 steps
    seen = []

    def scripted(model, *_):
        seen.append(weights_of(model))
        return [0.1 * len(seen)] * (L - 1) + [next(last_layer)]

    monkeypatch.setattr(run_module, "validation_losses", scripted)
    model = decoder(bias_balancing=True)
    config = recipe(max_steps=8, validate_every=2, keep_best=keep_best)
    result = train(model, text(), config, tmp_path, progress=False)
    assert result.best_step == best_step
    assert_same_weights(weights_of(model), seen[best_step // 2 - 1])
    assert result.validation == pytest.approx([math.exp(0.05 * best_step)] * (L - 1) + [math.e])


@pytest.mark.parametrize("training", [True, False])
def test_mode_and_random_state_are_put_back(decoder, text, recipe, tmp_path, training):
    model = decoder(dropout=0.2).train(training)
    before = torch.random.get_rng_state()
    train(model, text(), recipe(), tmp_path, progress=False)
    assert model.training is training
    assert torch.equal(torch.random.get_rng_state(), before)
    for bad in (text(train=8), text(train=0)):
        with pytest.raises(ValueError):
            train(model, bad, recipe(), tmp_path, progress=False)
        assert model.training is training


@pytest.mark.parametrize(
    "fields, tokens, sentence",
    [
        (dict(seq_len=33), 400, "seq_len=33 is longer than the model's max_seq_len=32"),
        (dict(max_steps=5), 8, "8 tokens but one example needs seq_len"),
        (dict(max_steps=None), 8, "8 tokens but one example needs seq_len"),
    ],
)
def test_a_run_that_cannot_start_says_why(decoder, text, recipe, tmp_path, fields, tokens, sentence):
    with pytest.raises(ValueError, match=sentence):
        train(decoder(), text(train=tokens), recipe(**fields), tmp_path / "run", progress=False)
    assert not list(tmp_path.rglob("*.*"))


def test_an_exit_that_the_model_lacks_is_refused_before_anything_is_written(decoder, text, recipe, tmp_path):
    config = recipe(exit_weights="drafting", drafting_exit=L)
    with pytest.raises(ValueError, match=f"drafting_exit={L} must be an early exit"):
        train(decoder(), text(), config, tmp_path, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_drafting_weights_teach_one_exit_and_the_last(decoder, text, recipe, tmp_path):
    config = recipe(exit_weights="drafting", drafting_exit=2, exit_curriculum="all", router_coherence_weight=0.1)
    result = train(decoder(), text(), config, tmp_path, progress=False)
    assert [list(record["exit_losses"]) for record in of(result, "train")] == [["2", str(L)]] * 3
    assert all(0 < record["router_coherence_loss"] < 1 for record in of(result, "train"))
