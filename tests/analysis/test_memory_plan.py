"""The plan against what it plans: networks on the meta device, operations that PyTorch counts, and allocated bytes."""

import contextlib
import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from layerskip_moe import ModelConfig, MoEDecoder, TrainConfig
from layerskip_moe.analysis.plan import Decoding, memory_plan
from layerskip_moe.analysis.plan.activations import Numbers
from layerskip_moe.analysis.plan.counts import count_operations, count_parameters
from layerskip_moe.analysis.plan.decoding import decoding_memory
from layerskip_moe.analysis.plan.training import training_memory
from layerskip_moe.bench.plan import allocated, decoding_peak, few_steps, shared_training_peaks, training_peak
from layerskip_moe.nn import products
from layerskip_moe.pretrained.config_file import empty_model
from layerskip_moe.pretrained.quantize import quantize, quantized_state

SMALL = dict(vocab_size=512, n_layers=4, d_model=64, n_heads=4, n_kv_heads=2, d_ff=128, dense_d_ff=256, num_experts=4)
MAIN = {**SMALL, "moe_layers": "every other"}  # main.py's kind
DENSE = {**SMALL, "num_experts": 0, "qk_norm": None, "tie_embeddings": True, "n_kv_heads": 4}
FINE = {**SMALL, "num_experts": 16, "top_k": 4, "d_ff": 32, "shared_expert_d_ff": 64, "shared_expert_gate": True}
# Without layer dropout, whose schedules take seconds to import; the step that takes most is one that drops nothing.
RECIPE = dict(batch_size=8, seq_len=64, precision="float32", layer_dropout_max=0.0)
CPU = torch.device("cpu")


@st.composite
def configs(draw):
    experts = draw(st.integers(0, 5))
    heads, groups = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    fields = dict(
        vocab_size=draw(st.integers(1, 50)), n_layers=draw(st.integers(1, 4)), d_model=draw(st.integers(1, 9)),
        n_heads=heads * groups, n_kv_heads=heads, head_dim=2 * draw(st.integers(1, 3)), d_ff=draw(st.integers(1, 9)),
        dense_d_ff=draw(st.integers(1, 9) | st.none()), num_experts=experts,
        qk_norm=draw(st.sampled_from(["head", "full", None])), qkv_bias=draw(st.booleans()),
        output_bias=draw(st.booleans()), tie_embeddings=draw(st.booleans()),
    )  # fmt: skip
    if not experts:
        return ModelConfig(**fields, mlp_bias=draw(st.booleans()))
    shared = draw(st.integers(0, 5))
    return ModelConfig(
        **fields, top_k=draw(st.integers(1, experts)), shared_expert_d_ff=shared,
        shared_expert_gate=bool(shared) and draw(st.booleans()), bias_balancing=draw(st.booleans()),
        moe_layers=draw(st.sampled_from(["all", "every other", "first half", (0,)])),
    )  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(configs())
def test_parameters_are_the_networks_own(config):
    model, counted = empty_model(config), count_parameters(config)
    assert (counted.total, counted.active) == model.parameter_counts()
    for layer, block in enumerate(model.blocks):
        assert counted.blocks[layer] == sum(p.numel() for p in block.parameters())
        assert counted.vectors[layer] == sum(p.numel() for p in block.parameters() if p.dim() == 1)


@pytest.mark.parametrize("fields", [DENSE, {**DENSE, "n_kv_heads": 1, "mlp_bias": True, "tie_embeddings": False}])
def test_operations_are_those_that_pytorch_counts(fields):
    config, recipe = ModelConfig(**fields), TrainConfig(**{**RECIPE, "exit_curriculum": "none"})
    model, tokens = MoEDecoder(config), torch.zeros(2, 64, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(tokens).sum().backward()
    counts = counter.get_flop_counts()["Global"]
    ours = count_operations(config, recipe, positions=1)
    attention = 3 * config.n_layers * 4 * config.n_heads * config.head_width * (64 + 1) / 2
    matrices = sum(count for op, count in counts.items() if "attention" not in str(op)) / tokens.numel()
    assert ours.training == pytest.approx(matrices + attention)
    assert ours.forward == pytest.approx(ours.training / 3)
    # A token alone reads one position, and every other operation is as before.
    assert ours.decoding == pytest.approx(ours.forward - attention / 3 + attention / 3 / ((64 + 1) / 2))


def test_operations_of_the_recipe():
    config = ModelConfig(**MAIN)
    plain = TrainConfig(**RECIPE, exit_curriculum="none")
    every = dataclasses.replace(plain, exit_curriculum="all")

    def training(recipe):
        return count_operations(config, recipe, positions=64).training

    head = config.vocab_size * config.d_model
    assert training(every) - training(plain) == pytest.approx(6 * head * (config.n_layers - 1))
    blocks = training(plain) / 3 - 2 * head
    assert training(dataclasses.replace(plain, activation_checkpointing=True)) - training(plain) == pytest.approx(
        blocks
    )
    always = dataclasses.replace(
        plain, layer_dropout_max=1.0, layer_dropout_time="uniform", layer_dropout_depth="uniform"
    )
    assert training(always) == pytest.approx(6 * head)  # nothing but the head is left
    experts = training(dataclasses.replace(always, layer_dropout_part="experts"))
    assert training(always) < experts < training(plain)
    idle = {**MAIN, "num_experts": 64}  # a router is 64 wide then
    more = count_operations(ModelConfig(**idle), plain, positions=64).forward
    assert more - training(plain) / 3 == pytest.approx(2 * 2 * 60 * config.d_model)


def within(planned, measured, share=0.1):
    assert abs(planned - measured) <= share * measured, f"planned {planned}, allocated {measured}"


@pytest.mark.parametrize(
    ("fields", "changes"),
    [
        (MAIN, {}),
        (MAIN, dict(batch_size=1, seq_len=16)),  # weights outweigh activations
        (MAIN, dict(accumulation=2, exit_curriculum="none")),
        (MAIN, dict(exit_curriculum="all", exit_distillation=0.5, keep_best=False)),
        (DENSE, dict(seq_len=128)),
        (DENSE, dict(batch_size=1, seq_len=16, accumulation=2)),
        (FINE, {}),
        ({**FINE, "n_layers": 1, "vocab_size": 32}, dict(exit_curriculum="none")),
        ({**MAIN, "qk_norm": "full", "clip_qkv": 4.0, "dropout": 0.1, "sliding_window": 16}, {}),
    ],
)
def test_training_takes_what_is_planned(fields, changes):
    config, recipe = ModelConfig(**fields), TrainConfig(**{**RECIPE, **changes})
    planned = memory_plan(config, few_steps(recipe), gpus=0).training
    assert planned.best == (4 * count_parameters(config).total if recipe.keep_best else 0)
    within(planned.peak, training_peak(config, recipe, CPU))


@pytest.mark.parametrize("fields", [MAIN, {**FINE, "qk_norm": None}])
def test_training_in_16_bits(fields, monkeypatch):
    """As on a processor that multiplies bfloat16, which this one need not be."""
    monkeypatch.setattr(products, "product_dtype", lambda dtype, device_type: dtype)
    config, recipe = ModelConfig(**fields), TrainConfig(**{**RECIPE, "precision": "bfloat16", "seq_len": 32})
    planned = training_memory(config, few_steps(recipe), Numbers(narrow=2))
    within(planned.peak, training_peak(config, recipe, CPU))


WIDER = dict(vocab_size=1024, d_model=128, d_ff=256)  # weights outweigh activations
SHARED = [
    (MAIN, {}),
    ({**MAIN, **WIDER}, dict(seq_len=16, batch_size=4)),
    ({**DENSE, "n_layers": 6}, dict(seq_len=16, accumulation=2)),
    ({**FINE, **WIDER}, dict(seq_len=16, batch_size=4, expert_parallel=2)),
    ({**SMALL, **WIDER}, dict(seq_len=16, batch_size=4, optimizer="adamw8bit", keep_best=False)),
    (FINE, dict(activation_checkpointing=True)),
]
BFLOAT16 = [({**fields, **WIDER}, dict(seq_len=16, batch_size=4, precision="bfloat16")) for fields in (MAIN, FINE)]


@pytest.mark.parametrize(
    ("cases", "processes"),
    [
        (SHARED[:3], 2),
        pytest.param(SHARED, 4, marks=pytest.mark.slow),
        pytest.param(
            BFLOAT16,
            2,
            marks=[
                pytest.mark.slow,
                pytest.mark.skipif(products.product_dtype(torch.bfloat16, "cpu") == torch.float32, reason="emulated"),
            ],
        ),
    ],
)
def test_training_that_is_shared_takes_what_is_planned(cases, processes):
    cases = [(ModelConfig(**fields), TrainConfig(**{**RECIPE, **changes})) for fields, changes in cases]
    for (config, recipe), measured in zip(cases, shared_training_peaks(cases, processes), strict=True):
        how = Numbers(narrow=2 if recipe.precision == "bfloat16" else 4)
        within(training_memory(config, few_steps(recipe), how, gpus=processes).peak, measured)


def test_attention_that_stores_its_probabilities():
    config, recipe = ModelConfig(**{**MAIN, "vocab_size": 64}), TrainConfig(**{**RECIPE, "seq_len": 128})
    with sdpa_kernel(SDPBackend.MATH):
        measured = training_peak(config, recipe, CPU)
    within(training_memory(config, few_steps(recipe), Numbers(flash=False)).peak, measured)
    assert training_memory(config, few_steps(recipe), Numbers()).peak < 0.85 * measured


@pytest.mark.parametrize("fields", [MAIN, FINE])
def test_training_with_checkpointing(fields):
    config, recipe = (
        ModelConfig(**{**fields, "vocab_size": 64, "n_layers": 8}),
        TrainConfig(**{**RECIPE, "seq_len": 128}),
    )
    again = dataclasses.replace(recipe, activation_checkpointing=True)
    planned = training_memory(config, few_steps(again), Numbers())
    within(planned.peak, training_peak(config, again, CPU))
    assert planned.peak < 0.6 * training_memory(config, few_steps(recipe), Numbers()).peak


@pytest.mark.parametrize(
    ("fields", "changes"),
    [
        (MAIN, {}),
        (MAIN, dict(draft_length=4, prompt_tokens=8)),  # recorded steps outweigh the prompt
        (MAIN, dict(rows=3, new_tokens=300, quantize="int8")),
        (DENSE, dict(rows=5, sampled=True)),
        (FINE, dict(prompt_tokens=300)),
        ({**FINE, "router_average": 0.5}, dict(rows=2, new_tokens=400)),
        *((MAIN, dict(rows=4, dtype=dtype)) for dtype in ("bfloat16", "float16")),
        (FINE, dict(rows=2, dtype="bfloat16", quantize="int8")),
        (MAIN, dict(rows=4, dtype="bfloat16", quantize="int4")),
        *(  # recorded, verified in many rows, and many rows
            ({**MAIN, "vocab_size": 10000}, dict(rows=rows, draft_length=drafts, prompt_tokens=8, sampled=sampled))
            for rows, drafts, sampled in ((4, 4, False), (30, 4, False), (100, 0, False), (20, 4, True))
        ),
        ({**MAIN, "sliding_window": 16}, dict(rows=4, prompt_tokens=400)),
    ],
)
def test_decoding_takes_what_is_planned(fields, changes):
    config = ModelConfig(**{**fields, "max_seq_len": 512})
    decoding = Decoding(**{**dict(prompt_tokens=100, new_tokens=20, dtype="float32"), **changes})
    within(decoding_memory(config, decoding, gpu=False).peak, decoding_peak(config, decoding, CPU))


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("fields", [MAIN, DENSE, FINE])
def test_quantised_weights(fields, kind):
    config = ModelConfig(**fields)
    stored = sum(tensor.nbytes for tensor in quantized_state(quantize(MoEDecoder(config), kind))[0].values())
    planned = decoding_memory(config, Decoding(dtype="float32", quantize=kind))
    within(planned.weights, stored, 0.01)


def test_what_is_allocated_is_counted_at_its_most():
    with allocated(CPU) as peak:
        first = torch.empty(1000, dtype=torch.float32)
        second = torch.empty(500, dtype=torch.float32)
        del first
        third = torch.empty(1500, dtype=torch.float32)
        del second, third
        with contextlib.suppress(IndexError):
            torch.empty(1)[5]
    assert 8000 <= peak() < 8100


def test_shards():
    config, recipe = ModelConfig(**MAIN), TrainConfig(**{**RECIPE, "batch_size": 16})
    alone, shared = (memory_plan(config, recipe, gpus=gpus).training for gpus in (1, 4))
    for name in ("weights", "optimizer", "best", "all_gradients"):
        assert getattr(shared, name) == -(-getattr(alone, name) // 4)
    of_its_samples = memory_plan(config, dataclasses.replace(recipe, batch_size=4), gpus=1).training
    assert shared.activations == of_its_samples.activations  # copies of weights in 16 bits are nobody's to divide
    with pytest.raises(ValueError, match="batch_size=16 is shared by 3 processes"):
        memory_plan(config, recipe, gpus=3)


def test_adamw8bit_takes_a_quarter():
    config = ModelConfig(**MAIN)
    full, small = (
        memory_plan(config, TrainConfig(**RECIPE, optimizer=name)).training for name in ("adamw", "adamw8bit")
    )
    within(small.optimizer, full.optimizer / 4, 0.05)
    assert full.peak - small.peak == full.optimizer - small.optimizer


def test_remedies_are_plans_that_differ_in_what_they_say():
    config = ModelConfig(**{**MAIN, "n_layers": 8, "vocab_size": 64})
    recipe = TrainConfig(**{**RECIPE, "batch_size": 64, "seq_len": 128})
    whole = memory_plan(config, recipe)
    assert whole.training_fits is None and whole.remedies == () == whole.decoding_remedies
    roomy = memory_plan(config, recipe, available=2 * whole.training.peak)
    assert roomy.training_fits and roomy.decoding_fits and roomy.remedies == () == roomy.decoding_remedies
    tight = memory_plan(config, recipe, available=whole.training.peak)  # of which a tenth is not for us
    assert tight.training_fits is False
    found = {one.words: one for one in tight.remedies}
    assert {"--optimizer adamw8bit", "--activation-checkpointing", "--no-keep-best", "--gpus 2"} <= set(found)
    assert found["--gpus 2"].peak == memory_plan(config, recipe, gpus=2).training.peak
    smaller = dataclasses.replace(recipe, batch_size=1, accumulation=64)
    assert found["--batch-size 1 --accumulation 64"].peak == memory_plan(config, smaller).training.peak
    assert all(one.fits == (one.peak <= 0.9 * whole.training.peak) for one in tight.remedies)
    together = min(tight.remedies, key=lambda one: one.peak)
    assert together.fits and together.words.count("--") == 5


def test_no_remedy_that_experts_cannot_be_shared_by():
    """An expert's 18 and 10 rows can be halved, by 4 GPUs in 2 columns, and not quartered, by 8, as the batch can."""
    fields = dict(vocab_size=64, n_layers=2, d_model=10, n_heads=1, head_dim=16, d_ff=9, num_experts=4)
    config, recipe = ModelConfig(**fields), TrainConfig(**{**RECIPE, "batch_size": 32, "expert_parallel": 2})
    alone = memory_plan(config, dataclasses.replace(recipe, expert_parallel=1), available=2**10)
    assert not any("--gpus" in one.words for one in alone.remedies)  # none is enough
    least = memory_plan(config, recipe, gpus=4).training.peak
    proposed = memory_plan(config, recipe, gpus=2, available=round(least / 0.9) + 1)
    assert any(one.words == "--gpus 4" for one in proposed.remedies)
    with pytest.raises(ValueError, match="rows cannot be shared evenly by 4 processes"):
        memory_plan(config, recipe, gpus=8)
    tighter = memory_plan(config, recipe, gpus=2, available=round(least * 0.9))
    found = [one.words for one in tighter.remedies if "--gpus" in one.words]
    assert all(words.startswith("--gpus 4 --optimizer") for words in found)


def test_remedies_of_decoding():
    config = ModelConfig(**{**MAIN, "max_seq_len": 4096})
    decoding = Decoding(rows=64, prompt_tokens=1000, new_tokens=3000, dtype="float32")
    whole = memory_plan(config, decoding=decoding)
    tight = memory_plan(config, decoding=decoding, available=whole.decoding.peak // 2)
    assert tight.decoding_fits is False
    fewer = tight.decoding_remedies[-1]
    rows = int(fewer.words.removeprefix("--rows "))
    assert (
        fewer.fits
        and fewer.peak == memory_plan(config, decoding=dataclasses.replace(decoding, rows=rows)).decoding.peak
    )
    more = dataclasses.replace(decoding, rows=2 * rows)
    assert memory_plan(config, decoding=more).decoding.peak > 0.9 * whole.decoding.peak // 2
    assert [one.words for one in tight.decoding_remedies[:3]] == [
        "--dtype bfloat16",
        "--quantize int8",
        "--quantize int4",
    ]


@settings(max_examples=40, deadline=None)
@given(configs(), st.integers(1, 4), st.integers(1, 40), st.sampled_from(["float32", "auto", "float16"]), st.booleans())
def test_any_network_can_be_planned(config, gpus, seq_len, precision, again):
    recipe = TrainConfig(batch_size=12, seq_len=seq_len, precision=precision, layer_dropout_max=0.0)
    recipe = dataclasses.replace(recipe, activation_checkpointing=again)
    how = Numbers(4 if precision == "float32" else 2, gpu=True, flash=precision == "auto")
    taken = training_memory(config, recipe, how, gpus=gpus)
    parts = dataclasses.asdict(taken)
    assert all(value >= 0 for name, value in parts.items() if name != "moment")
    assert taken.peak >= taken.weights + taken.optimizer + taken.best + taken.all_gradients
    longer = training_memory(config, dataclasses.replace(recipe, seq_len=seq_len + 1), how, gpus=gpus)
    assert longer.peak >= taken.peak


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(gpus=-1), "gpus=-1 must be a whole number"),
        (dict(train=TrainConfig(seq_len=2000)), "seq_len=2000 is longer than the model's max_seq_len=1024"),
        (
            dict(decoding=Decoding(prompt_tokens=1000)),
            "prompt_tokens=1000 with new_tokens=128 is past max_seq_len=1024",
        ),
        (dict(train=TrainConfig(exit_weights="drafting", drafting_exit=9)), "drafting_exit=9 must be an early exit"),
        (dict(train=TrainConfig(expert_parallel=2)), "expert_parallel=2 must divide the number of processes, which is"),
        (dict(train=TrainConfig(expert_parallel=8), gpus=8), "expert_parallel=8 must divide num_experts=4"),
        (dict(available=float("nan")), "available=nan must be a number of bytes, above 0"),
        (dict(available=0), "available=0 must be a number of bytes, above 0"),
        (dict(available=-5), "available=-5 must be a number of bytes, above 0"),
        (dict(available="8"), "available='8' must be a number of bytes, above 0"),
    ],
)
def test_what_cannot_be_planned_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        memory_plan(ModelConfig(**MAIN), **arguments)


def test_decoding_of_nothing_is_refused():
    for name, value, least in (("rows", 0, 1), ("new_tokens", 0, 1), ("draft_length", -1, 0)):
        with pytest.raises(ValueError, match=f"{name}={value} must be a whole number, {least} or more"):
            Decoding(**{name: value})


ANYTHING = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 40), st.integers(), st.floats(), st.text(max_size=5), st.just([]),
    st.sampled_from(["float32", "bfloat16", "int8", "int4", "int2", "int3"]),
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(st.sampled_from([field.name for field in dataclasses.fields(Decoding)]), ANYTHING, max_size=3),
    st.dictionaries(st.sampled_from(["gpus", "available"]), ANYTHING),
    st.integers(1, 16),
    st.integers(1, 9),
)
def test_anything_is_planned_for_or_refused(decoded, given_too, batch_size, expert_parallel):
    recipe = TrainConfig(**{**RECIPE, "batch_size": batch_size, "expert_parallel": expert_parallel})
    try:
        plan = memory_plan(ModelConfig(**MAIN), recipe, Decoding(**decoded), **given_too)
    except ValueError as error:
        assert str(error).endswith(".") and "\n" not in str(error)
    else:
        assert plan.training.peak > 0 and plan.decoding.peak > 0
        assert all("--" in one.words for one in (*plan.remedies, *plan.decoding_remedies))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(quantize="int2"), "quantize='int2' is unknown; it is 'int8' or 'int4', or None."),
        (dict(dtype="int3"), "dtype='int3' is unknown; it is one of float32, bfloat16, float16."),
        (dict(sampled="x"), "sampled='x' must be True or False."),
    ],
)
def test_decoding_of_what_is_unknown_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Decoding(**fields)


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        dict(vocab_size=2048, n_layers=12, d_model=192, n_heads=6, n_kv_heads=3, d_ff=384, dense_d_ff=768,
             moe_layers="every other"),
        dict(vocab_size=4096, n_layers=8, d_model=256, n_heads=4, d_ff=1024, num_experts=0, qk_norm=None,
             tie_embeddings=True),
        dict(vocab_size=1024, n_layers=6, d_model=128, n_heads=4, n_kv_heads=2, d_ff=64, num_experts=32, top_k=4,
             shared_expert_d_ff=128, shared_expert_gate=True, qkv_bias=True),
    ],
)  # fmt: skip
def test_three_networks_of_real_sizes(fields):
    config, recipe = ModelConfig(**fields), TrainConfig(batch_size=8, seq_len=128, precision="float32")
    decoding = Decoding(rows=2, prompt_tokens=200, new_tokens=64, dtype="float32")
    plan = memory_plan(config, few_steps(recipe), decoding, gpus=0)
    within(plan.training.peak, training_peak(config, recipe, CPU))
    within(plan.decoding.peak, decoding_peak(config, decoding, CPU))
