"""Importing torchao, or what imports it, without the warnings that it prints and nobody can act on.

torchao reports each optional CUDA library that it cannot load, and torch reports that torchao registers an enum in a
way that is now superfluous. Knows nothing of what is imported. Used by every room that needs torchao.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_NOISY_LOGGERS = ("torchao", "torch.utils._pytree")


@contextmanager
def quiet_import() -> Iterator[None]:
    """Hide warnings from the noisy loggers and from `warnings`; errors still show. Everything is put back."""
    loggers = [logging.getLogger(name) for name in _NOISY_LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
