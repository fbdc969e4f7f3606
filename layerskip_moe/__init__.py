"""layerskip_moe: Mixture-of-Experts decoders trained with the LayerSkip recipe and decoded faster, with the
same answers.

Rooms: `nn` the network, `data` text to batches, `training` the recipe, `generation` decoding, `pretrained`
checkpoints on disk, `analysis` what a trained model does, `bench` timings. Start at `main.py` for the story.
"""

import os

# Pages of 2 MiB instead of 4 KiB under large tensors, where the system grants them: weights are read a quarter faster,
# and a training step does not wait for pages. PyTorch asks once, at its first tensor, so this stands before it.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

from layerskip_moe.data import Corpus, load_corpus
from layerskip_moe.generation import (
    Autoregressive,
    EarlyExit,
    Generation,
    LayerSkipping,
    LookupSpeculative,
    PromptLookup,
    SelfSpeculative,
    SparseSpeculative,
    Speculative,
    generate,
)
from layerskip_moe.nn import KVCache, ModelConfig, MoEDecoder, RopeScaling
from layerskip_moe.training import TrainConfig, TrainResult, train

__version__ = "0.1.0"

__all__ = [
    "Autoregressive",
    "Corpus",
    "EarlyExit",
    "Generation",
    "KVCache",
    "LayerSkipping",
    "LookupSpeculative",
    "MoEDecoder",
    "ModelConfig",
    "PromptLookup",
    "RopeScaling",
    "SelfSpeculative",
    "SparseSpeculative",
    "Speculative",
    "TrainConfig",
    "TrainResult",
    "generate",
    "load_corpus",
    "train",
]
