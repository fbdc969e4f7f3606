"""Block: one layer of the network, attention and then an MLP or experts.

B batch, T positions, D width, F hidden width. Knows nothing of other layers. Next: `attention.py`, `router.py` and
`experts.py` (its parts), `decoder.py` (who runs it).
"""

from collections.abc import Callable

from torch import Tensor, nn

from layerskip_moe.nn import few_rows
from layerskip_moe.nn.attention import Attention, Places
from layerskip_moe.nn.config import ModelConfig
from layerskip_moe.nn.experts import Experts
from layerskip_moe.nn.linear import Linear
from layerskip_moe.nn.norm import RMSNorm
from layerskip_moe.nn.products import swiglu
from layerskip_moe.nn.router import Router, Routing
from layerskip_moe.nn.router_memory import recall_text, window_weights


class DenseMLP(nn.Module):
    """SwiGLU with fused weights: gate_up [2F, D] (gate first), down [D, F]."""

    def __init__(self, width: int, hidden: int, *, bias: bool = False) -> None:
        super().__init__()
        self.gate_up = Linear(width, 2 * hidden, bias=bias)
        self.down = Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        hidden = self.gate_up(x)
        if few_rows.are_few(hidden):
            return self.down(few_rows.swiglu(hidden.flatten(0, -2)).view(*x.shape[:-1], hidden.shape[-1] // 2))
        return self.down(swiglu(hidden))


class MoEMLP(nn.Module):
    """Router and experts, and a shared expert that every token passes through where there is one."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.router = Router(config)
        self.experts = Experts(config)
        self.shared = DenseMLP(config.d_model, config.shared_expert_d_ff) if config.shared_expert_d_ff else None
        self.shared_gate = Linear(config.d_model, 1, bias=False) if config.shared_expert_gate else None
        self.average, self.hold, self.remembers = config.router_average, config.router_hold, config.router_remembers

    def forward(
        self, x: Tensor, places: Places, memory: Tensor | None, expert_mask: Tensor | None, top_k: int | None
    ) -> tuple[Tensor, Routing]:
        """x [B, T, D] -> [B, T, D] and the routing of its B * T tokens. memory: the cache's router logits of this
        layer, where routers look back; without a cache they look back over x."""
        tokens = x.flatten(0, 1)
        how = {"recall": self._recall(x, places, memory)} if self.remembers else {}
        routing = self.router(tokens, expert_mask=expert_mask, top_k=top_k, **how)
        out = self.experts(tokens, routing)
        if self.shared is not None:
            shared = self.shared(tokens)
            if self.shared_gate is not None:
                opened = self.shared_gate(tokens)
                shared = few_rows.gate(shared, opened) if few_rows.are_few(shared) else opened.sigmoid() * shared
            out = few_rows.add(out, shared) if few_rows.are_few(out) else out + shared
        return out.view(x.shape), routing

    def _recall(self, x: Tensor, places: Places, memory: Tensor | None) -> Callable[[Tensor], Tensor]:
        """What makes of the logits [N, E] of x [B, T, D] those that it is routed by (`router_memory.py`)."""
        weights, hold = window_weights(self.average), self.hold

        def recall(logits: Tensor) -> Tensor:
            if memory is None:
                return recall_text(logits.view(*x.shape[:2], logits.shape[-1]), weights, hold).flatten(0, 1)
            assert places.rows is not None and places.positions is not None
            where = {"rows": places.rows, "positions": places.positions}
            return few_rows.remember(logits, memory, **where, weights=weights, hold=hold)

        return recall


class Block(nn.Module):
    """One layer, pre-norm: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model, eps=config.norm_eps)
        self.attention = Attention(config, windowed=config.is_windowed(layer))
        self.mlp_norm = RMSNorm(config.d_model, eps=config.norm_eps)
        dense = config.dense_d_ff or config.expert_d_ff
        self.mlp: MoEMLP | DenseMLP = (
            MoEMLP(config) if config.is_moe(layer) else DenseMLP(config.d_model, dense, bias=config.mlp_bias)
        )
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        places: Places,
        *,
        memory: tuple[Tensor, Tensor] | None = None,
        router_memory: Tensor | None = None,
        expert_rows: Tensor | None = None,
        expert_mask: Tensor | None = None,
        top_k: int | None = None,
    ) -> tuple[Tensor, Routing | None]:
        """x [B, T, D] -> its output [B, T, D], and the routing where there was any.

        memory: the cache's keys and values of this layer, see `Attention`; None: no cache.
        router_memory: the cache's router logits of this layer, where there are any.
        expert_rows: the samples the second sublayer runs for (None: all); the others pass it by.
        """
        x = self._add(x, self.attention(self.attention_norm(x), places, memory))
        if expert_rows is None:
            return self._transform(x, places, router_memory, expert_mask, top_k)
        transformed, routing = self._transform(x[expert_rows], places, router_memory, expert_mask, top_k)
        return x.index_copy(0, expert_rows, transformed), routing

    def _add(self, x: Tensor, update: Tensor) -> Tensor:
        if self.training:
            update = self.dropout(update)
        return few_rows.add(x.flatten(0, 1), update.flatten(0, 1)).view(x.shape) if few_rows.are_few(x) else x + update

    def fill(
        self, x: Tensor, places: Places, *, memory: tuple[Tensor, Tensor], router_memory: Tensor | None = None
    ) -> None:
        """Only write what the cache keeps of x [B, T, D]; neither sublayer is computed, and x is routed as if attention
        had added nothing to it."""
        self.attention.fill(self.attention_norm(x), places, memory)
        if router_memory is not None:
            assert isinstance(self.mlp, MoEMLP)
            logits = self.mlp.router.score(self.mlp_norm(x).flatten(0, 1))
            router_memory[places.rows, places.positions] = logits

    def _transform(
        self,
        x: Tensor,
        places: Places,
        router_memory: Tensor | None,
        expert_mask: Tensor | None,
        top_k: int | None,
    ) -> tuple[Tensor, Routing | None]:
        normed = self.mlp_norm(x)
        if isinstance(self.mlp, MoEMLP):
            out, routing = self.mlp(normed, places, router_memory, expert_mask, top_k)
            return self._add(x, out), routing
        return self._add(x, self.mlp(normed)), None
