"""Text -> tokens -> batches.

`load_corpus` turns a name, a file, a folder or a hub dataset into two token streams and their tokenizer;
`batches` and `windows` cut a stream into training and evaluation examples. This room knows nothing of
models. Start reading at `corpus.py`.
"""

from layerskip_moe.data.batching import ahead, batches, steps_per_epoch, windows
from layerskip_moe.data.corpus import Corpus, load_corpus

__all__ = ["Corpus", "ahead", "batches", "load_corpus", "steps_per_epoch", "windows"]
