"""What the ablation tests share: a small text, a base to change, and results made by hand."""

import sys

import pytest

from layerskip_moe import ModelConfig, TrainConfig, load_corpus


@pytest.fixture(autouse=True)
def without_tensorboard(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for index in range(12):
        (folder / f"{index}.txt").write_text(f"The {index} brown foxes jump over the lazy dogs, again.\n" * 60)
    return load_corpus(folder, vocab_size=300, cache_dir=folder / "cache", progress=False)


@pytest.fixture
def network(corpus):
    return ModelConfig(
        corpus.vocab_size, n_layers=4, d_model=16, n_heads=2, d_ff=16, num_experts=4, top_k=2, max_seq_len=64
    )


@pytest.fixture
def recipe():
    """Four steps in float32, without layer dropout (torchtune is slow to import), a checkpoint after each."""
    return TrainConfig(
        max_steps=4, seq_len=16, batch_size=4, layer_dropout_max=0.0, precision="float32", checkpoint_every=1,
        validate_every=0, validation_windows=2,
    )  # fmt: skip


@pytest.fixture
def result():
    """result(variant, seed, perplexity=20.0, speed_up=1.2, tokens_per_second=100.0, **fields) -> a run's result, with
    what it is compared by."""

    def build(
        variant,
        seed,
        *,
        perplexity=20.0,
        speed_up=1.2,
        tokens_per_second=100.0,
        union=(1.5, 2.0),
        network=None,
        **fields,
    ):
        sizes = {"top_k": 2, "d_ff": 16, "shared_expert_d_ff": 0} | (network or {})
        decoding = {"acceptance_rate": 0.75, "plain_tokens_per_second": 80.0, "distinct_4grams": 0.25}
        whole = {
            "variant": variant, "seed": seed, "changes": {"network": {}, "recipe": {}},
            "parameters": 2_340_000, "active_parameters": 1_230_000, "failed": None,
            "steps": 4, "tokens": 256, "training_seconds": 60.0, "measuring_seconds": 15.0,
            "exits": {
                "perplexity": [perplexity + 30, perplexity + 20, perplexity + 10, perplexity],
                "agreement": [0.4, 0.6, 0.8, 1.0], "tokens": 100,
            },
            "union": {"spans": [2, 4], "over_top_k": list(union), "independent": [1.75, 2.734375]},
            "decoding": [
                {"temperature": 0.0, "speed_up": speed_up, "tokens_per_second": tokens_per_second, **decoding},
                {"temperature": 0.8, "speed_up": speed_up - 0.3, "tokens_per_second": tokens_per_second, **decoding},
            ],
            "timed_on": {"cpu": "A CPU", "cores": 2, "accelerator": None, "versions": {"torch": "2.13"}},
            "setting": {"network": sizes},
        }  # fmt: skip
        return whole | fields

    return build


@pytest.fixture
def is_one_sentence():
    """is_one_sentence(message): one line that is no flood and ends as sentences do."""
    return lambda message: "\n" not in message and len(message) < 800 and message.endswith(".")
