"""What the analysis tests share: a tiny decoder whose layers all matter, and a report with every section."""

import copy

import pytest
import torch

from layerskip_moe.nn import ModelConfig, MoEDecoder


@pytest.fixture
def decoder():
    """decoder(dtype=float64, **ModelConfig fields) -> a new tiny MoEDecoder, in training mode."""

    def build(*, dtype=torch.float64, **fields):
        sizes = dict(
            vocab_size=17, n_layers=3, d_model=8, n_heads=2, n_kv_heads=1, d_ff=8, num_experts=4, top_k=2,
            max_seq_len=32, init_std=0.4,
        )  # fmt: skip
        return MoEDecoder(ModelConfig(**{**sizes, **fields})).to(dtype)

    return build


@pytest.fixture
def tokens():
    """tokens(n) -> n token ids below 17."""
    return lambda n: torch.randint(17, (n,), generator=torch.Generator().manual_seed(5))


def _strategy(name, exit_layer, draft_length, speed_up, **fields):
    row = dict(
        name=name, exit_layer=exit_layer, draft_length=draft_length, tokens_per_second=61.25 * speed_up,
        prefill_seconds=0.0123, speed_up=speed_up, speed_up_quartiles=[speed_up - 0.11, speed_up + 0.13],
        drafted=1000, accepted=617, acceptance_rate=0.617, tokens_per_verification=2.71, distinct_4grams=0.873,
        identical=20, first_differences={},
    )  # fmt: skip
    return {**row, **fields}


_PLAIN = dict(drafted=0, accepted=0, acceptance_rate=None, tokens_per_verification=1.0)


def _comparison(temperature, speed_ups):
    rows = [_strategy("plain", None, None, 1.0, **_PLAIN)]
    rows += [_strategy(f"exit {e}, draft {d}", e, d, speed_up) for (e, d), speed_up in speed_ups.items()]
    return dict(temperature=temperature, top_p=None, max_new_tokens=128, prompts=20, seed=7, strategies=rows)


_FULL = dict(
    command="python main.py --n_layers 3 --dataset 'a|b'",
    constants={"dataset": "a|b", "n_layers": 3, "learning_rate": 0.0015, "max_steps": None},
    machine={"cpu": "Some CPU @ 2.1", "cores": 2, "accelerator": None, "versions": {"torch": "2.13.0"}},
    model={"parameters": 1234567, "active_parameters": 765432, "config": {"d_model": 192, "top_k": 2}},
    corpus={"name": "python-stdlib", "train_tokens": 2400000, "validation_tokens": 131072, "vocab_size": 2048},
    training={
        "steps": 431,
        "seconds": 187.46,
        "tokens_per_second": 9413.2,
        "final_losses": {"1": 4.3217, "2": 3.9871, "3": 3.8124},
        "best_validation": {"step": 400, "perplexity": 44.315},
    },
    exits={"perplexity": [81.517, 50.254, 44.315], "agreement": [0.5123, 0.7391, 1.0], "tokens": 32768},
    decoding=[
        _comparison(0.0, {(1, 3): 1.214, (1, 6): 1.107, (2, 4): 1.387}),
        _comparison(0.8, {(1, 3): 1.093, (2, 4): 0.962}),
    ],
    experts={
        "load": {"1": [9, 11, 13, 7], "2": [20, 0, 8, 12]},
        "metrics": {
            "1": {"max_violation": 0.3, "normalized_entropy": 0.981, "coefficient_of_variation": 0.224},
            "2": {"max_violation": 1.0, "normalized_entropy": 0.742, "coefficient_of_variation": 0.721},
        },
        "tokens": 20,
    },
    continuations=[
        {"prompt": "def f(", "plain": "x):\n    return x", "self_speculative": "x):\n    return x"},
        {"prompt": "````", "plain": "one", "self_speculative": "two"},
    ],
    seconds={"text": 11.3, "training": 187.46},
)


@pytest.fixture
def full_report():
    """A report with every section, a copy of its own for each test."""
    return copy.deepcopy(_FULL)
