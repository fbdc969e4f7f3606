"""Decoding a trained network. Start at `generate.py`; strategies are small files over one `session.py`."""

from layerskip_moe.generation.autoregressive import Autoregressive
from layerskip_moe.generation.generate import Generation, Strategy, check_prompts, generate
from layerskip_moe.generation.sampling import Sampling
from layerskip_moe.generation.self_speculative import SelfSpeculative
from layerskip_moe.generation.session import Session
from layerskip_moe.generation.statistics import GenerationStats

__all__ = [
    "Autoregressive",
    "Generation",
    "GenerationStats",
    "Sampling",
    "SelfSpeculative",
    "Session",
    "Strategy",
    "check_prompts",
    "generate",
]
