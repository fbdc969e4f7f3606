"""What the processes of a step send: what is counted is what is needed on paper, to the byte."""

import pytest
import torch

from layerskip_moe.bench.communication import KINDS, CommunicationSettings, communication, on_paper
from layerskip_moe.nn import ModelConfig

SMALL = ModelConfig(
    vocab_size=31, n_layers=3, d_model=12, n_heads=2, n_kv_heads=1, d_ff=8, num_experts=4, top_k=2, max_seq_len=32,
    moe_layers=(0, 2),
)  # fmt: skip


@pytest.mark.parametrize(
    "settings",
    [
        CommunicationSettings(processes=2, accumulation=2, seq_len=8),
        CommunicationSettings(processes=2, expert_parallel=2, seq_len=8, precision="bfloat16"),
        pytest.param(CommunicationSettings(processes=4, expert_parallel=2, seq_len=8), marks=pytest.mark.slow),
    ],
)
def test_a_step_sends_what_is_needed_on_paper(settings):
    result = communication(SMALL, settings)
    assert result["measured"] == result["paper"]
    assert all(result["paper"][kind]["calls"] > 0 for kind in KINDS if kind != "all-to-all")
    assert (result["paper"]["all-to-all"]["calls"] > 0) is (settings.expert_parallel > 1)


def test_the_paper_by_hand():
    config = ModelConfig(
        vocab_size=10, n_layers=1, d_model=4, n_heads=1, n_kv_heads=1, d_ff=2, num_experts=2, top_k=1, max_seq_len=8
    )
    # Attention 4 x 4 to queries, keys, values and back, experts 2 x 3 x 2 x 4; embedding, norms 5 x 4, router 2 x 4.
    block, rest = 4 * (4 * 16 + 48), 4 * (10 * 4 + 20 + 8)
    head = 0 if config.tie_embeddings else 4 * 10 * 4
    paper = on_paper(config, CommunicationSettings(processes=2, batch_size=2, seq_len=3, accumulation=3))
    assert paper["all-gather"] == {"calls": 2 * 3 * (2 + 1), "bytes": 2 * 3 * (2 * block + rest + head)}
    assert paper["reduce-scatter"] == {"calls": 2 * 3 * 2, "bytes": 2 * 3 * (block + rest + head)}
    assert paper["all-to-all"] == {"calls": 0, "bytes": 0}
    together = on_paper(config, CommunicationSettings(processes=2, expert_parallel=2, batch_size=2, seq_len=3))
    pairs = 2 * 3 * 1
    assert together["all-to-all"] == {"calls": 2 * 5, "bytes": 4 * 4 * pairs * 4 + 2 * 2 * 8}
    assert together["all-gather"]["bytes"] == 2 * (2 * (block - 4 * 48) + rest + head)
    half = on_paper(config, CommunicationSettings(2, 2, batch_size=2, seq_len=3, precision="float16"))
    assert half["all-gather"]["bytes"] == 2 * (block - 4 * 48 + rest + head)
    assert half["all-to-all"] == {"calls": 2 * 5, "bytes": 4 * 2 * pairs * 4 + 2 * 2 * 8}
    assert (
        half["reduce-scatter"] == together["reduce-scatter"] == {"calls": 4, "bytes": 2 * (block - 192 + rest + head)}
    )


def test_what_cannot_be_divided_is_refused_before_a_process_is_started():
    with pytest.raises(ValueError, match="batch_size=4 is shared by 3 processes"):
        communication(SMALL, CommunicationSettings(processes=3))
    with pytest.raises(ValueError, match="expert_parallel=3 must divide"):
        communication(SMALL, CommunicationSettings(processes=4, expert_parallel=3))
    with pytest.raises(ValueError, match="processes=1 must be 2 or more"):
        communication(SMALL, CommunicationSettings(processes=1))
    assert not torch.distributed.is_initialized()
