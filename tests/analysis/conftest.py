"""What the analysis tests share: a tiny decoder whose layers all matter, and a report with every section."""

import copy
import json

import pytest
import torch

from layerskip_moe.analysis import report as report_room
from layerskip_moe.analysis import write_report
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
        name=name, exit_layer=exit_layer, draft_length=draft_length, threshold=None, tokens_per_second=61.25 * speed_up,
        prefill_seconds=0.0123, speed_up=speed_up, speed_up_quartiles=[speed_up - 0.11, speed_up + 0.13],
        mean_layers=3.0, drafted=1000, accepted=617, acceptance_rate=0.617, drafted_by_position=[400, 350, 250],
        accepted_by_position=[297, 203, 117], tokens_per_verification=2.71, perplexity=12.34, agreement=0.998,
        distinct_4grams=0.873, identical=20, first_differences={},
    )  # fmt: skip
    return {**row, **fields}


_NO_DRAFTS = dict(
    drafted=0, accepted=0, acceptance_rate=None, drafted_by_position=[], accepted_by_position=[],
    tokens_per_verification=1.0,
)  # fmt: skip


def _lossy(name, speed_up, *, exit_layer=None, threshold=None, **fields):
    changed = dict(threshold=threshold, identical=1, first_differences={"0": 5}, **_NO_DRAFTS)
    return _strategy(name, exit_layer, None, speed_up, **{**changed, **fields})


def _comparison(temperature, speed_ups, more=()):
    rows = [_strategy("plain", None, None, 1.0, **_NO_DRAFTS)]
    rows += [_strategy(f"exit {e}, draft {d}", e, d, speed_up) for (e, d), speed_up in speed_ups.items()]
    rows += more
    return dict(temperature=temperature, top_p=None, max_new_tokens=128, prompts=20, seed=7, strategies=rows)


def _typical(*tokens):
    return [dict(text=text, share=share, lift=3.3 * share, count=41) for text, share in tokens]


def _balance(max_violation, normalized_entropy):
    return dict(
        max_violation=max_violation, normalized_entropy=normalized_entropy, coefficient_of_variation=0.224,
        dead_experts=0.0,
    )  # fmt: skip


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
        "seconds_by_part": {
            "batches": 0.0011, "forward": 0.1427, "exit loss": 0.0613, "backward": 0.2219, "optimizer": 0.0087,
        },
    },
    recipe={
        "steps": 431,
        "n_layers": 3,
        "train_config": {
            "layer_dropout_max": 0.125, "layer_dropout_depth": "exp", "layer_dropout_time": "exp",
            "layer_dropout_part": "block", "exit_weights": "equal", "exit_loss_scale": 0.75,
            "exit_curriculum": "rotational", "exit_rotation": 4, "learning_rate": 0.0015,
        },
    },
    exits={"perplexity": [81.517, 50.254, 44.315], "agreement": [0.5123, 0.7391, 1.0], "tokens": 32768},
    decoding=[
        _comparison(0.0, {(1, 3): 1.214, (1, 6): 1.107, (2, 4): 1.387}),
        _comparison(0.8, {(1, 3): 1.093, (2, 4): 0.962}),
    ],
    strategies=[
        _comparison(
            0.0,
            {(2, 4): 1.387},
            [
                _lossy("layers 1-2", 1.512, exit_layer=2, mean_layers=2.0, perplexity=29.71, agreement=0.731),
                _lossy("every 2nd", 0.913, mean_layers=1.5, perplexity=12.41, agreement=0.41, distinct_4grams=0.312),
            ],
        )
    ],
    sweep={
        "temperature": 0.8, "top_p": None, "prompts": 6, "max_new_tokens": 64, "exit_layers": [1, 2],
        "draft_lengths": [3, 4, 6], "speed_up": [[1.081, 1.042, 0.973], [1.124, 1.231, 1.153]],
        "acceptance_rate": [[0.513, 0.482, 0.421], [0.674, 0.633, 0.561]],
        "chosen": {"exit_layer": 2, "draft_length": 4}, "identical": 36, "outputs": 36,
        "by_position": [
            {
                "exit_layer": layer, "draft_length": 6, "drafted_by_position": [80, 75, 72, 70, 66, 61],
                "accepted_by_position": accepted,
            }
            for layer, accepted in ((1, [45, 30, 21, 14, 9, 6]), (2, [58, 47, 36, 29, 22, 17]))
        ],
    },
    early_exit={
        "confidence": "softmax_diff",
        "min_layer": 1,
        "cache": "propagate",
        "held_out": {
            "thresholds": [0.5, 0.9, 1.0], "mean_layers": [1.81, 2.64, 3.0], "perplexity": [61.42, 45.03, 44.315],
            "agreement": [0.842, 0.973, 1.0],
            "exits": [[15000, 9000, 8768], [3000, 5768, 24000], [0, 0, 32768]],
            "confidence_mean": [0.412, 0.538, None], "confidence_low": [0.121, 0.217, None],
            "confidence_high": [0.634, 0.823, None], "tokens": 32768,
        },
        "decoding": _comparison(
            0.0,
            {},
            [
                _lossy("threshold 0.5", 1.263, threshold=0.5, mean_layers=1.92, perplexity=21.03, agreement=0.812),
                _lossy("threshold 0.9", 0.941, threshold=0.9, mean_layers=2.71, perplexity=13.55, agreement=0.961),
            ],
        ),
        "by_prompt": {"threshold": 0.9, "exits": [[30, 40, 58], [11, 22, 95]]},
    },
    experts={
        "load": {"1": [9, 11, 13, 7], "2": [20, 0, 8, 12]},
        "metrics": {
            "1": _balance(0.3, 0.981),
            "2": {**_balance(1.0, 0.742), "dead_experts": 0.25},
        },
        "tokens": 20,
    },
    expert_choice={
        "layers": {
            "1": {
                "token_dependence": 0.713,
                "chance": 0.542,
                "experts": [
                    _typical(("\n", 0.93), ("a|b", 0.81)), _typical((" `x`", 0.77)), [], _typical(("def", 0.62)),
                ],
            },
            "2": {"token_dependence": 0.561, "chance": 0.583, "experts": [[], [], [], _typical(("é\\", 0.512))]},
        },
        "tokens": 32768,
    },
    comparison={
        "steps": 431,
        "seed": 7,
        "runs": [
            {
                "name": "LayerSkip", "perplexity": [81.517, 50.254, 44.315], "agreement": [0.512, 0.739, 1.0],
                "best_step": 400, "experts": {"1": _balance(0.3, 0.981), "2": _balance(1.0, 0.742)},
                "decoding": [_comparison(0.0, {(1, 3): 1.214, (2, 4): 1.387})], "seconds": 187.4,
            },
            {
                "name": "plain", "perplexity": [1893.2, 391.7, 43.108], "agreement": [0.021, 0.114, 1.0],
                "best_step": 420, "experts": {"1": _balance(0.4, 0.962), "2": _balance(0.7, 0.811)},
                "decoding": [_comparison(0.0, {(1, 3): 0.571, (2, 4): 0.683})], "seconds": 142.9,
            },
        ],
    },
    continuations=[
        {"prompt": "def f(", "plain": "x):\n    return x", "self_speculative": "x):\n    return x"},
        {"prompt": "````", "plain": "one", "self_speculative": "two"},
    ],
    seconds={"text": 11.3, "training": 187.46},
)  # fmt: skip


@pytest.fixture
def train_records():
    """Train records of metrics.jsonl: the last of 10, 20 and 25 steps, of a network with two MoE layers."""
    loads = ([9, 11, 13, 7], [16, 8, 8, 8], [10, 10, 10, 10])
    return [
        {
            "split": "train", "step": step, "exit_losses": {"3": loss}, "load": {"1": load, "2": [10, 10, 10, 10]},
            "seconds": {"batches": 0.001, "forward": seconds, "backward": 2 * seconds},
        }
        for step, loss, load, seconds in zip((9, 19, 24), (6.1, 5.2, 4.9), loads, (0.3, 0.2, 0.1), strict=True)
    ]  # fmt: skip


@pytest.fixture
def full_report():
    """A report with every section, a copy of its own for each test."""
    return copy.deepcopy(_FULL)


@pytest.fixture
def written(tmp_path, monkeypatch):
    """written(report, draw=False) -> (Markdown, JSON), figures drawn only if wanted: they take the time."""

    def write(report, draw=False):
        with monkeypatch.context() as patch:
            if not draw:
                patch.setattr(report_room, "draw_figures", lambda *data: {})
            path = write_report(tmp_path, report)
        return path.read_text(encoding="utf-8"), json.loads((tmp_path / "report.json").read_text())

    return write
