"""KVCache: what is remembered of past positions, their keys and values, in static buffers.

A token at position p lives in slot p of its row, and a query at position p reads slots 0..p. That one rule
carries everything decoding needs: rows of different lengths need no padding mask, several rows can be
verified at once, and taking back drafted tokens is forgetting that they were there; what lies beyond a
row's length is overwritten before any query can read it. Where routers look back (`router_memory.py`), their logits
are kept by the same rule.

Knows nothing of who writes or why. Next: `attention.py`, which writes and reads it.
"""

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from layerskip_moe.nn.config import ModelConfig

if TYPE_CHECKING:
    from layerskip_moe.nn.drafts import RecordedRound
    from layerskip_moe.nn.graphs import Graph
    from layerskip_moe.nn.replay import Recording


class KVCache:
    """Keys and values of the first `n_layers` layers (default: all) for B rows of up to `capacity` positions.

    keys, values:  [n_layers, B, G, capacity, head_dim]: what one head reads lies together
    router_logits: [layers with experts, B, capacity, E] float32, None unless routers look back
    lengths:       [B] int64, how many leading positions of each row are decided. `run` does not move them (a
                   draft fills early layers only); who decodes does, by `extend`, and may take some back by
                   `crop`.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        capacity: int,
        *,
        n_layers: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        n_layers = n_layers or config.n_layers
        shape = (n_layers, batch_size, config.kv_heads, capacity, config.head_width)
        # Zeros, not `empty`: a masked slot still enters a product with weight 0, and 0 * NaN is NaN.
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.router_logits: Tensor | None = None
        if config.router_remembers:
            self._moe_layers = [layer for layer in range(n_layers) if config.is_moe(layer)]
            sizes = (len(self._moe_layers), batch_size, capacity, config.num_experts)
            self.router_logits = torch.zeros(sizes, dtype=torch.float32, device=device)
        self.lengths = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.rows = torch.arange(batch_size, device=device)
        self.recordings: dict[Any, Recording | Graph | RecordedRound] = {}  # steps over these buffers, see `steps.py`

    @property
    def capacity(self) -> int:
        """Positions each row has room for."""
        return self.keys.shape[3]

    def memory(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values [B, G, capacity, head_dim] of one layer: what `Attention` writes and reads, at `rows`."""
        return self.keys[layer], self.values[layer]

    def router_memory(self, layer: int) -> Tensor | None:
        """The router's logits [B, capacity, E] of one layer, at `rows` too; None where there is nothing to keep."""
        if self.router_logits is None or layer not in self._moe_layers:
            return None
        return self.router_logits[self._moe_layers.index(layer)]

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        return sum(buffer.nbytes for buffer in (self.keys, self.values, self.router_logits) if buffer is not None)

    def rows_of(self, positions: Tensor) -> Tensor:
        """The buffers' row of each of positions [B, T], flat: [B * T]."""
        if positions.shape[1] == 1:
            return self.rows
        return self.rows[:, None].expand(positions.shape).flatten().contiguous()

    def subset(self, rows: Tensor) -> "KVCache":
        """Some rows (int64 indices) of this cache as a cache of its own, over the same buffers: what is written to
        it is written here. For rows that go deeper than the others of their batch."""
        part = copy.copy(self)
        part.select(rows)
        return part

    def __deepcopy__(self, memo: dict[int, Any]) -> "KVCache":
        """A cache of its own, with nothing recorded on it."""
        other = copy.copy(self)
        other.keys, other.values, other.recordings = self.keys.clone(), self.values.clone(), {}
        if self.router_logits is not None:
            other.router_logits = self.router_logits.clone()
        return other

    def extend(self, counts: Tensor | int) -> None:
        """Count the next counts [B] positions of each row as complete, or as many of every row."""
        self.lengths = self.lengths + counts

    def crop(self, lengths: Tensor) -> None:
        """Forget every position at or beyond lengths [B]; no row can grow by it."""
        assert bool((lengths <= self.lengths).all()), "crop cannot lengthen a row"
        self.lengths = lengths

    def select(self, rows: Tensor) -> None:
        """Keep only the given rows (int64 indices), in that order. The buffers stay as they are, and with them what is
        recorded over them."""
        self.lengths, self.rows = self.lengths[rows], self.rows[rows]

    def clear(self) -> None:
        """Forget everything, dropped rows included."""
        self.keys.zero_()
        self.values.zero_()
        if self.router_logits is not None:
            self.router_logits.zero_()
        self.rows = torch.arange(self.keys.shape[1], device=self.rows.device)
        self.lengths = torch.zeros_like(self.rows)
