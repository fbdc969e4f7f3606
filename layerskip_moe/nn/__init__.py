"""The network, and nothing about training or decoding. Start at `decoder.py`; `config.py` has the switches."""

from layerskip_moe.nn.cache import KVCache
from layerskip_moe.nn.config import ModelConfig, RopeScaling
from layerskip_moe.nn.decoder import MoEDecoder
from layerskip_moe.nn.router import Routing
from layerskip_moe.nn.run_blocks import RunOutput

__all__ = ["KVCache", "MoEDecoder", "ModelConfig", "RopeScaling", "Routing", "RunOutput"]
