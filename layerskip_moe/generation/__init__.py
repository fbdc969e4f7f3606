"""Decoding a trained network. Start at `generate.py`; strategies are small files over one `session.py`."""

from layerskip_moe.generation.autoregressive import Autoregressive
from layerskip_moe.generation.early_exit import EarlyExit
from layerskip_moe.generation.generate import Generation, Strategy, check_prompts, generate
from layerskip_moe.generation.layer_sets import search_layers
from layerskip_moe.generation.layer_skipping import LayerSkipping
from layerskip_moe.generation.lookup_speculative import LookupSpeculative
from layerskip_moe.generation.prompt_lookup import PromptLookup
from layerskip_moe.generation.sampling import Sampling
from layerskip_moe.generation.self_speculative import SelfSpeculative
from layerskip_moe.generation.session import Session
from layerskip_moe.generation.sparse_speculative import SparseSpeculative
from layerskip_moe.generation.speculative import Speculative
from layerskip_moe.generation.statistics import GenerationStats
from layerskip_moe.generation.text import TextStream

__all__ = [
    "Autoregressive",
    "EarlyExit",
    "Generation",
    "GenerationStats",
    "LayerSkipping",
    "LookupSpeculative",
    "PromptLookup",
    "Sampling",
    "SelfSpeculative",
    "Session",
    "SparseSpeculative",
    "Speculative",
    "Strategy",
    "TextStream",
    "check_prompts",
    "generate",
    "search_layers",
]
