"""Checkpoints on disk, ours and other people's: `checkpoint.py` has the folder as a whole."""

from layerskip_moe.pretrained.checkpoint import load_model, read_recipe, save_model
from layerskip_moe.pretrained.model_card import has_other_card, write_model_card
from layerskip_moe.pretrained.quantize import quantize
from layerskip_moe.pretrained.tokenizer import load_tokenizer, stop_tokens

__all__ = [
    "has_other_card",
    "load_model",
    "load_tokenizer",
    "quantize",
    "read_recipe",
    "save_model",
    "stop_tokens",
    "write_model_card",
]
