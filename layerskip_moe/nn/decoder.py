"""MoEDecoder: embed, run any range of layers, one shared norm and head at any depth.

B batch, T positions, D width, E experts, L layers, V vocabulary. There is one way through the network: training,
prefill, drafting, verification, early exit and layer skipping are `run`, of different layers; `decode` and `draft` are
several of its calls as one.
Knows nothing of losses, sampling, or files. Next: `training/loop.py`, `generation/session.py`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from layerskip_moe.nn import few_rows
from layerskip_moe.nn.attention import Places, locate
from layerskip_moe.nn.block import Block
from layerskip_moe.nn.cache import KVCache
from layerskip_moe.nn.checks import check_positions, check_run
from layerskip_moe.nn.compiling import compiled, is_compiled
from layerskip_moe.nn.config import ModelConfig
from layerskip_moe.nn.experts import Experts
from layerskip_moe.nn.linear import Linear, linear
from layerskip_moe.nn.norm import RMSNorm
from layerskip_moe.nn.products import is_quantized
from layerskip_moe.nn.router import Routing
from layerskip_moe.nn.steps import can_repeat, lay, repeat, repeat_draft

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass
class RunOutput:
    """What a range of layers gave.

    hidden:    [B, T, D], after the last layer that ran
    collected: layer index -> its output [B, T, D], for the layers asked for
    routing:   layer index -> that MoE layer's Routing, for the tokens that reached it; empty where a recorded run was
               repeated (`compiled`, few rows)
    chosen:    layer index -> the experts that each of those N tokens was sent to, [N, K] int64; of a recorded run too
               where `run` was asked for `choices`
    """

    hidden: Tensor
    collected: dict[int, Tensor] = field(default_factory=dict)
    routing: dict[int, Routing] = field(default_factory=dict)
    chosen: dict[int, Tensor] = field(default_factory=dict)


class MoEDecoder(nn.Module):
    """A decoder whose layers hold experts, and whose every layer can be followed by the head.

    Weights start as normal(0, init_std); `attention.output` and every `down`, which write into the residual
    stream, as normal(0, init_std / sqrt(2 L)); norms at 1, biases at 0. The draws come from `seed`.
    """

    def __init__(self, config: ModelConfig, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        # Not nn.Embedding(V, D): its own normal draw would be thrown away, and on the meta device, where a
        # checkpoint is loaded, it costs the import of half of torch.
        weight = torch.empty(config.vocab_size, config.d_model)
        self.embedding = nn.Embedding.from_pretrained(weight, freeze=False)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = RMSNorm(config.d_model, eps=config.norm_eps)
        self.head = None if config.tie_embeddings else Linear(config.d_model, config.vocab_size, bias=False)
        self.initialize(seed)

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """Draw all weights anew, as the class docstring says; without memory (meta device) there are none."""
        if self.device.type == "meta":
            return
        generator = torch.Generator("cpu").manual_seed(seed % 2**63)  # the same weights on every device
        std = self.config.init_std
        assert std is not None, "ModelConfig fills it in"
        into_stream = std / (2 * self.config.n_layers) ** 0.5
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            elif name.endswith("bias"):
                parameter.zero_()
            else:
                writes = name.endswith(("attention.output.weight", ".down.weight", ".down"))
                drawn = torch.empty(parameter.shape, device="cpu")
                drawn.normal_(0.0, into_stream if writes else std, generator=generator)
                parameter.copy_(drawn)

    @property
    def head_weight(self) -> Tensor:
        """The head's weight [V, D]: the embedding's own when they are tied."""
        return self.embedding.weight if self.head is None else self.head.weight

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The weights' type."""
        return self.embedding.weight.dtype

    @property
    def compiled(self) -> bool:
        """Whether steps are recorded and blocks compiled, as `compiling` says."""
        return is_compiled(self)

    def parameter_counts(self) -> tuple[int, int]:
        """(all parameters, those one token uses: K of the E experts in each MoE layer)."""
        total = sum(p.numel() for p in self.parameters())
        share = 1 - self.config.top_k / max(self.config.num_experts, 1)
        idle = sum(p.numel() for m in self.modules() if isinstance(m, Experts) for p in m.parameters()) * share
        return total, total - round(idle)

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids [B, T] -> hidden states [B, T, D]."""
        return self.embedding(tokens)

    def unembed(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., D] after any layer -> logits [..., V], through the one norm and head."""
        return linear(self.norm(hidden), self.head_weight)

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids [B, T] -> logits [B, T, V] of the whole model, without a cache."""
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
        return self.unembed(self.run(self.embed(tokens), range(self.config.n_layers), positions=positions).hidden)

    def run(
        self,
        hidden: Tensor,
        layers: Sequence[int],
        *,
        positions: Tensor,
        cache: KVCache | None = None,
        keep: Tensor | None = None,
        keep_experts: Tensor | None = None,
        expert_mask: Tensor | None = None,
        top_k: int | None = None,
        collect: Sequence[int] = (),
        choices: bool = False,
    ) -> RunOutput:
        """Run some layers over hidden states: the one way through the network.

        hidden:       [B, T, D]
        layers:       indices 0..L-1 in rising order, gaps allowed; empty gives hidden back
        positions:    [B, T] int64, where each state stands in its row. Without a cache they are 0..T-1.
        cache:        written at `positions` in each layer that runs; a state reads every slot up to its own
                      position, so those must have been written before, by this call or an earlier one
        keep:         [len(layers), B] bool on the CPU: the samples that stay; the others pass a layer by
                      and cost nothing (layer dropout)
        keep_experts: the same for the MLP or expert sublayer alone
        expert_mask:  [E] or [len(layers), E] bool: the active experts (expert dropout)
        top_k:        fewer experts per token than the model was built with, for drafting
        collect:      layers (among `layers`) whose output is wanted
        choices:      whether `RunOutput.chosen` is wanted of a recorded run too

        Raises ValueError for layers that do not rise or do not exist, for positions past max_seq_len or the
        cache's end, for masks of another number of layers, and for a mask or top_k that leaves a token without
        experts.
        """
        layers = list(layers)
        length = check_positions(positions, self.config, cache)
        check_run(layers, self.config, hidden.shape[0], cache, keep, keep_experts, expert_mask, top_k, collect)
        if cache is None or keep_experts is not None:
            places = locate(positions, self.config, cache, length=length)
            return self._run_blocks(hidden, layers, places, cache, keep, keep_experts, expert_mask, top_k, collect)
        if expert_mask is None and self._repeats(hidden.dtype, positions):

            def step(states: Tensor, places: Places) -> list[Tensor]:
                output = self._run_blocks(states, layers, places, cache, top_k=top_k, collect=collect)
                chosen = output.chosen.values() if choices else ()
                return [output.hidden, *(output.collected[layer] for layer in collect), *chosen]

            key = "run", tuple(layers), top_k, tuple(collect), choices
            last, *others = repeat(self, step, hidden, positions, cache, length=length, key=key)
            collected, chosen = others[: len(collect)], [experts.flatten(0, 1) for experts in others[len(collect) :]]
            routed = [layer for layer in layers if choices and self.config.is_moe(layer)]
            result = RunOutput(last, dict(zip(collect, collected, strict=True)))
            result.chosen = dict(zip(routed, chosen, strict=True))
            return result
        states, places = lay(hidden, positions, self.config, cache, length=length)
        output = self._run_blocks(states, layers, places, cache, None, None, expert_mask, top_k, collect)
        output.hidden = output.hidden.view(hidden.shape)
        output.collected = {layer: states.view(hidden.shape) for layer, states in output.collected.items()}
        return output

    def decode(
        self, start: Tensor, layers: Sequence[int], *, positions: Tensor, cache: KVCache, top_k: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """A step of decoding: `embed` where start holds token ids, `run`, `unembed`; of few rows, compiled, one call.

        start: token ids [B, T] int64, or hidden states [B, T, D]; layers, positions, cache, top_k: as in `run`
        -> hidden states [B, T, D] after the last of the layers, and their logits [B, T, V]
        """
        embeds, layers = not start.is_floating_point(), list(layers)
        if not self._repeats(self.dtype, positions):
            hidden = self.embed(start) if embeds else start
            hidden = self.run(hidden, layers, positions=positions, cache=cache, top_k=top_k).hidden
            return hidden, self.unembed(hidden)
        length = check_positions(positions, self.config, cache)
        check_run(layers, self.config, len(positions), cache, top_k=top_k)

        key = "decode", embeds, tuple(layers), top_k
        states_of = self._states_of(layers, cache, top_k)

        def step(start: Tensor, places: Places) -> list[Tensor]:
            hidden = states_of(start, places)
            return [hidden, self.unembed(hidden)]

        hidden, logits = repeat(self, step, start, positions, cache, length=length, key=key)
        return hidden, logits

    def draft(
        self,
        newest: Tensor,
        layers: Sequence[int],
        *,
        positions: Tensor,
        cache: KVCache,
        noise: Tensor | None = None,
        top_k: int | None = None,
        shared: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Draft tokens one after another by some layers and the head; of few rows, compiled, one call.

        newest: [A, 1] int64; positions: [A, n + 1] int64, where it stands and where n drafts will; layers, cache,
        top_k: as in `run`; noise: [A, n, V] float64, added to the logits; a draft is where they are largest
        shared: after how many of the layers the states are wanted, by default all; the last draft runs only these
        -> drafts [A, n], and the states [A, n + 1, D] of newest and all drafts after the `shared` first of the layers
        """
        layers, count = list(layers), positions.shape[1] - 1
        check_run(layers, self.config, len(positions), cache, top_k=top_k)
        first, rest = layers[:shared], [] if shared is None else layers[shared:]
        if self._repeats(self.dtype, positions[:, :1]):
            length = check_positions(positions, self.config, cache)
            key = "draft", tuple(first), tuple(rest), top_k
            steps = self._states_of(first, cache, top_k), self._states_of(rest, cache, top_k)
            return repeat_draft(self, *steps, newest, positions, cache, length=length, noise=noise, key=key)
        token, drafts, states = newest, [], []
        for place in range(count + 1):
            how: dict[str, Any] = {"positions": positions[:, place : place + 1], "cache": cache, "top_k": top_k}
            states.append(self.run(self.embed(token), first, **how).hidden)
            if place < count:
                last = self.run(states[-1], rest, **how).hidden if rest else states[-1]
                drawn = None if noise is None else noise[:, place]
                token = few_rows.choose(self.unembed(last)[:, 0], drawn)[:, None]
                drafts.append(token)
        return torch.cat([newest[:, :0], *drafts], dim=1), torch.cat(states, dim=1)

    def _states_of(self, layers: list[int], cache: KVCache, top_k: int | None) -> Callable[[Tensor, Places], Tensor]:
        """From token ids or states at some places to states after some layers."""

        def states_of(start: Tensor, places: Places) -> Tensor:
            if not start.is_floating_point():  # on a CPU by an operator that can be recorded
                start = few_rows.embed(start[0], self.embedding.weight)[None] if places.few else self.embed(start)
            return self._run_blocks(start, layers, places, cache, top_k=top_k).hidden

        return states_of

    def _repeats(self, dtype: torch.dtype, positions: Tensor) -> bool:
        """Whether a step of states at positions [B, T] is recorded, and repeated after that."""
        return self.compiled and can_repeat(positions.numel(), dtype, positions.device)

    def _run_blocks(
        self,
        hidden: Tensor,
        layers: list[int],
        places: Places,
        cache: KVCache | None,
        keep: Tensor | None = None,
        keep_experts: Tensor | None = None,
        expert_mask: Tensor | None = None,
        top_k: int | None = None,
        collect: Sequence[int] = (),
    ) -> RunOutput:
        output = RunOutput(hidden)
        for index, layer in enumerate(layers):
            rows = _rows(keep, index, hidden.device)  # the samples that stay; None: all of them
            if rows is None or len(rows):
                output.hidden, routing = self._run_block(
                    layer,
                    output.hidden,
                    places,
                    rows=rows,
                    memory=None if cache is None else cache.memory(layer),
                    expert_rows=_rows(keep_experts, index, hidden.device, among=rows),
                    expert_mask=expert_mask if expert_mask is None or expert_mask.dim() == 1 else expert_mask[index],
                    top_k=top_k,
                )
                if routing is not None:
                    output.routing[layer], output.chosen[layer] = routing, routing.chosen
            if layer in collect:
                output.collected[layer] = output.hidden
        return output

    def _run_block(
        self, layer: int, hidden: Tensor, places: Places, *, rows: Tensor | None, **how: Any
    ) -> tuple[Tensor, Routing | None]:
        block = self._block(layer)
        # Quantised weights are unpacked in a way that cannot be traced; a CPU's decoding has kernels and recordings.
        compiles = self.compiled and (
            how["memory"] is None or (hidden.is_cuda and not is_quantized(block.attention.qkv.weight))
        )
        forward = compiled(Block.forward) if compiles else Block.__call__
        if rows is None:
            return forward(block, hidden, places, **how)
        # There is no cache where samples are dropped, and the window's mask is the same for all rows.
        part = places._replace(cos=places.cos[rows], sin=places.sin[rows])
        ran, routing = forward(block, hidden[rows], part, **how)
        return hidden.index_copy(0, rows, ran), routing

    def fill(self, hidden: Tensor, layers: Sequence[int], *, positions: Tensor, cache: KVCache) -> None:
        """Write only the keys and values of skipped layers, all from the same exit state hidden [B, T, D]
        (CALM's state propagation, arXiv 2207.07061). Raises ValueError for positions past the end, as `run`."""
        length = check_positions(positions, self.config, cache)
        hidden, places = lay(hidden, positions, self.config, cache, length=length)
        for layer in layers:
            block = self._block(layer)
            block.attention.fill(block.attention_norm(hidden), places, cache.memory(layer))

    def _block(self, layer: int) -> Block:
        block = self.blocks[layer]
        assert isinstance(block, Block)
        return block

    @classmethod
    def from_pretrained(
        cls,
        folder_or_id: str | Path,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        revision: str | None = None,
        token: str | None = None,
    ) -> "MoEDecoder":
        """A checkpoint of ours or of Mixtral, OLMoE, Qwen-MoE, Qwen3 or Llama; see `pretrained/checkpoint.py`."""
        from layerskip_moe.pretrained.checkpoint import load_model

        return load_model(folder_or_id, dtype=dtype, device=device, revision=revision, token=token)

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        tokenizer: "Tokenizer | str | Path | None" = None,
        recipe: Mapping[str, Any] | None = None,
        max_shard_bytes: int = 5 * 10**9,
    ) -> None:
        """Write a checkpoint that transformers opens, where one of its architectures expresses this network; see
        `pretrained/checkpoint.py`."""
        from layerskip_moe.pretrained.checkpoint import save_model

        save_model(self, folder, tokenizer=tokenizer, recipe=recipe, max_shard_bytes=max_shard_bytes)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        tokenizer: "Tokenizer | str | Path | None" = None,
        recipe: Mapping[str, Any] | None = None,
        report: Mapping[str, Any] | None = None,
        private: bool | None = None,
        token: str | None = None,
    ) -> str:
        """Save, and upload to the Hugging Face hub; its address there. See `pretrained/hub.py`."""
        from layerskip_moe.pretrained.hub import push

        return push(self, repo_id, tokenizer=tokenizer, recipe=recipe, report=report, private=private, token=token)


def _rows(keep: Tensor | None, index: int, device: torch.device, among: Tensor | None = None) -> Tensor | None:
    """Samples that keep[index] lets stay, counted within `among`; None when all do (nothing is gathered then)."""
    if keep is None:
        return None
    mask = keep[index] if among is None else keep[index][among.cpu()]
    return None if bool(mask.all()) else mask.nonzero()[:, 0].to(device)
