"""Checkpoints on disk. `checkpoint.py` has our own layout: save_model, load_model, load_tokenizer."""

from layerskip_moe.pretrained.checkpoint import load_model, load_tokenizer, save_model

__all__ = ["load_model", "load_tokenizer", "save_model"]
