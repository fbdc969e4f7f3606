"""Grouped-query attention, with or without a cache, over all earlier positions or a sliding window of them.

B batch, T positions, D width, H query heads, G key-value heads, S cache slots read.
Knows nothing of layers or experts. Next: `rotary.py` (the angles), `cache.py` (what is remembered), `decoder.py`
(who calls).
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerskip_moe.nn import few_rows
from layerskip_moe.nn.cache import KVCache
from layerskip_moe.nn.config import ModelConfig
from layerskip_moe.nn.linear import Linear, linear
from layerskip_moe.nn.norm import RMSNorm
from layerskip_moe.nn.rotary import rotary_table, table_length


class Places(NamedTuple):
    """Where the B x T states of one run stand: made once, used by every layer of the run.

    cos, sin:  [B, T, 1, head_dim] float32, the rotary angles; for few states the whole tables [., head_dim]
    rows:      [B * T] int64, the row of the cache that each state belongs to; None without a cache
    positions: [B * T] int64, its slot there; None without a cache
    length:    S, how many slots of each row are read by many states at once
    mask:      [B, 1, (H / G) * T, S] bool, which of them each query may read; None where it may read all up to
               itself, or where each reads by itself (few states, see `few_rows.py`)
    windowed:  the same for layers with a sliding window; without a cache [1, 1, T, T], None where no query sees
               as far back as the window's end
    few:       whether the states are few; they then stand as [1, N, ...], whatever rows they belong to
    fresh:     whether the states are their rows' first, so that nothing but themselves is read
    """

    cos: Tensor
    sin: Tensor
    rows: Tensor | None = None
    positions: Tensor | None = None
    length: int = 0
    mask: Tensor | None = None
    windowed: Tensor | None = None
    few: bool = False
    fresh: bool = True


def angles(config: ModelConfig, device: torch.device, length: int) -> tuple[Tensor, Tensor]:
    """The network's table of rotary angles, for positions below `length`: cosines and sines [., head_dim]. With a cache
    that is its capacity, so that all that is recorded on it reads one table."""
    positions = table_length(length, config.max_seq_len)
    return rotary_table(config.head_width, config.rope_theta, config.rope_scaling, positions, device)


def locate(positions: Tensor, config: ModelConfig, cache: KVCache | None = None, *, length: int = 0) -> Places:
    """Places of positions [B, T], each below max_seq_len; with a cache, each below `length` too."""
    window, here = config.sliding_window, positions.shape[1]
    fresh = cache is None or (length == here and bool((positions == torch.arange(here, device=positions.device)).all()))
    if cache is not None and not fresh:
        return locate_within(positions, cache.rows_of(positions), config, length, cache.capacity)
    cut = window is not None and window < here
    where = Places(
        *_angles_at(positions, config, here if cache is None else cache.capacity),
        windowed=_may_read(positions[:1], here, window)[:, None] if cut else None,
    )
    return (
        where
        if cache is None
        else where._replace(rows=cache.rows_of(positions), positions=positions.flatten(), length=length)
    )


def locate_within(positions: Tensor, rows: Tensor, config: ModelConfig, length: int, capacity: int) -> Places:
    """Places of positions [B, T] in a cache's rows [B * T], of whose slots `length` are read: as many as there are
    positions, or more. What the positions are decides nothing here but the numbers: a GPU is not waited for."""
    groups, window = config.n_heads // config.kv_heads, config.sliding_window

    def over_groups(mask: Tensor) -> Tensor:
        return mask.repeat(1, groups, 1)[:, None]

    mask = over_groups(_may_read(positions, length))
    cut = window is not None and window < length
    windowed = over_groups(_may_read(positions, length, window)) if cut else mask
    return Places(
        *_angles_at(positions, config, capacity), rows, positions.flatten(), length, mask, windowed, fresh=False
    )


def _angles_at(positions: Tensor, config: ModelConfig, length: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B, T, 1, head_dim] at positions [B, T], each below `length`."""
    cos, sin = angles(config, positions.device, length)
    at = positions[:, :, None]
    return cos[at], sin[at]  # (a view of a result would be one more graph)


def _may_read(positions: Tensor, length: int, window: int | None = None) -> Tensor:
    """[B, T, length] bool: which of the first `length` positions a query at positions [B, T] may read: those up to
    its own, and of them only the last `window`."""
    seen = torch.arange(length, device=positions.device)
    mask = seen <= positions[:, :, None]
    return mask if window is None else mask & (seen > positions[:, :, None] - window)


def rotate(x: Tensor, places: Places) -> Tensor:
    """Turn x [B, T, heads, head_dim] by its positions' angles."""
    if places.few:
        assert places.positions is not None
        return few_rows.rotate(x[0], places.cos, places.sin, places.positions)[None]
    first, second = x.chunk(2, dim=-1)
    return x * places.cos.to(x.dtype) + torch.cat([-second, first], dim=-1) * places.sin.to(x.dtype)


def _norm(norm: RMSNorm, x: Tensor) -> Tensor:
    """Norm in the weight's type: under autocast that is float32, and a mixed call would warn."""
    return norm(x.to(norm.weight.dtype))


class Attention(nn.Module):
    """Causal grouped-query attention (arXiv 2305.13245) with optional query/key norm.

    qkv: [(H + 2 G) * head_dim, D], the query rows first, then key, then value.
    output: [D, H * head_dim]
    windowed: whether a query reads only the last `sliding_window` positions
    """

    def __init__(self, config: ModelConfig, *, windowed: bool = False) -> None:
        super().__init__()
        self.window = config.sliding_window or 0 if windowed else 0
        self.clip = config.clip_qkv
        self.n_heads, self.n_kv_heads, self.head_dim = config.n_heads, config.kv_heads, config.head_width
        self.qk_norm = config.qk_norm
        width = (self.n_heads + 2 * self.n_kv_heads) * self.head_dim
        self.qkv = Linear(config.d_model, width, bias=config.qkv_bias)
        self.output = Linear(self.n_heads * self.head_dim, config.d_model, bias=config.output_bias)
        if config.qk_norm is not None:
            heads = (self.n_heads, self.n_kv_heads) if config.qk_norm == "full" else (1, 1)
            self.query_norm = RMSNorm(heads[0] * self.head_dim, eps=config.norm_eps)
            self.key_norm = RMSNorm(heads[1] * self.head_dim, eps=config.norm_eps)

    def _split_heads(self, x: Tensor, heads: int) -> Tensor:
        return x.unflatten(-1, (heads, self.head_dim))

    def _clipped(self, x: Tensor) -> Tensor:
        return x if self.clip is None else x.clamp(-self.clip, self.clip)

    def _values(self, v: Tensor) -> Tensor:
        """Projected values [B, T, G * head_dim] -> [B, T, G, head_dim]."""
        return self._split_heads(self._clipped(v), self.n_kv_heads)

    def _queries(self, q: Tensor, places: Places) -> Tensor:
        """Projected queries [B, T, H * head_dim] -> normed and rotated [B, T, H, head_dim]."""
        return self._norm_and_rotate(q, self.n_heads, self.query_norm if self.qk_norm else None, places)

    def _keys(self, k: Tensor, places: Places) -> Tensor:
        """Projected keys [B, T, G * head_dim] -> normed and rotated [B, T, G, head_dim]."""
        return self._norm_and_rotate(k, self.n_kv_heads, self.key_norm if self.qk_norm else None, places)

    def _norm_and_rotate(self, x: Tensor, heads: int, norm: RMSNorm | None, places: Places) -> Tensor:
        if norm is not None and self.qk_norm == "full":
            x = _norm(norm, x)
        x = self._split_heads(self._clipped(x), heads)
        if norm is not None and self.qk_norm == "head":
            x = _norm(norm, x)
        return rotate(x, places)

    def forward(self, x: Tensor, places: Places, memory: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """x [B, T, D] -> [B, T, D].

        memory: the cache's keys and values of this layer, [rows, G, capacity, head_dim] each. Without one the T
        positions attend causally among themselves. With one they are written to it first, then attend to every slot
        up to their own position, or to the window's.
        """
        queries, keys = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        q, k, v = self.qkv(x).split([queries, keys, keys], dim=-1)
        q, k, v = self._queries(q, places), self._keys(k, places), self._values(v)
        if memory is not None and places.few:
            assert places.rows is not None and places.positions is not None
            mixed = few_rows.attend(
                q[0], k[0], v[0], *memory, rows=places.rows, positions=places.positions, window=self.window
            )
            return self.output(mixed[None])
        if memory is not None:
            write(memory, places, k, v)
        if places.fresh:
            # The norms of queries and keys run in float32 under autocast; attention wants one type.
            q, k, v = (part.transpose(1, 2) for part in (q.to(v.dtype), k.to(v.dtype), v))
            mask, grouped = places.windowed if self.window else None, self.n_heads != self.n_kv_heads
            causal = mask is None
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped)
        else:
            assert memory is not None
            mixed = self._attend_to_cache(q.transpose(1, 2), *read(memory, places), places)
        return self.output(mixed.transpose(1, 2).flatten(2))

    def _attend_to_cache(self, q: Tensor, keys: Tensor, values: Tensor, places: Places) -> Tensor:
        """Queries over more slots than their own: [B, H, T, .] x [B, G, S, .] -> [B, H, T, .].

        The queries that share a key-value head are laid along T, so that the cache is read as it lies
        instead of being repeated H / G times.
        """
        stacked = q.reshape(q.shape[0], self.n_kv_heads, -1, self.head_dim).to(keys.dtype)
        mask, scale = places.windowed if self.window else places.mask, 1.0 / math.sqrt(self.head_dim)
        mixed = F.scaled_dot_product_attention(stacked, keys, values, attn_mask=mask, scale=scale)
        return mixed.reshape(q.shape).to(q.dtype)

    def fill(self, x: Tensor, places: Places, memory: tuple[Tensor, Tensor]) -> None:
        """Only write the keys and values of x [B, T, D]; no query is computed."""
        queries = self.n_heads * self.head_dim
        bias = None if self.qkv.bias is None else self.qkv.bias[queries:]
        k, v = linear(x, self.qkv.weight[queries:], bias).chunk(2, dim=-1)
        write(memory, places, self._keys(k, places), self._values(v))


def write(memory: tuple[Tensor, Tensor], places: Places, keys: Tensor, values: Tensor) -> None:
    """Store keys and values [B, T, G, head_dim] where the places say."""
    assert places.rows is not None and places.positions is not None
    for buffer, new in zip(memory, (keys, values), strict=True):
        buffer[places.rows, :, places.positions] = new.flatten(0, 1).to(buffer.dtype)


def read(memory: tuple[Tensor, Tensor], places: Places) -> tuple[Tensor, Tensor]:
    """Keys and values [B, G, S, head_dim] of the rows that the places are in."""
    assert places.rows is not None
    rows = places.rows.view(places.cos.shape[:2])[:, 0]
    keys, values = (buffer[rows, :, : places.length] for buffer in memory)
    return keys, values
