"""MoEDecoder: embed, run any range of layers, one shared norm and head at any depth.

B batch, T positions, D width, E experts, L layers, V vocabulary. There is one way through the network: training,
prefill, drafting, verification, early exit and layer skipping are `run`, of different layers; `decode` and `draft` are
several of its calls as one.
Knows nothing of losses, sampling, or files. Next: `training/loop.py`, `generation/session.py`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from layerskip_moe.nn.attention import locate
from layerskip_moe.nn.block import Block
from layerskip_moe.nn.cache import KVCache
from layerskip_moe.nn.checks import check_positions, check_run
from layerskip_moe.nn.compiling import is_compiled
from layerskip_moe.nn.config import ModelConfig
from layerskip_moe.nn.drafts import draft_places, repeat_draft
from layerskip_moe.nn.experts import Experts
from layerskip_moe.nn.linear import Linear, linear
from layerskip_moe.nn.norm import RMSNorm
from layerskip_moe.nn.run_blocks import RunOutput, block_of, recordable, run_blocks
from layerskip_moe.nn.steps import can_repeat, lay, repeat

if TYPE_CHECKING:
    from tokenizers import Tokenizer


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
            return run_blocks(self, hidden, layers, places, cache, keep, keep_experts, expert_mask, top_k, collect)
        if expert_mask is None and self._repeats(hidden.dtype, positions):
            return self._repeat(hidden, layers, positions, cache, top_k, collect, choices, heads=False)[0]
        states, places = lay(hidden, positions, self.config, cache, length=length)
        output = run_blocks(self, states, layers, places, cache, None, None, expert_mask, top_k, collect)
        output.hidden = output.hidden.view(hidden.shape)
        output.collected = {layer: states.view(hidden.shape) for layer, states in output.collected.items()}
        return output

    def decode(
        self,
        start: Tensor,
        layers: Sequence[int],
        *,
        positions: Tensor,
        cache: KVCache,
        top_k: int | None = None,
        collect: Sequence[int] = (),
        choices: bool = False,
    ) -> tuple[RunOutput, Tensor]:
        """A step of decoding: `embed` where start holds token ids, `run`, `unembed`; of few rows, compiled, one call.

        start: token ids [B, T] int64, or hidden states [B, T, D]; the rest as in `run`
        -> `run`'s output, and the logits [B, T, V] after the last of the layers
        """
        layers = list(layers)
        if not self._repeats(self.dtype, positions):
            hidden = start if start.is_floating_point() else self.embed(start)
            how: dict[str, Any] = {"top_k": top_k, "collect": collect, "choices": choices}
            output = self.run(hidden, layers, positions=positions, cache=cache, **how)
            return output, self.unembed(output.hidden)
        return self._repeat(start, layers, positions, cache, top_k, collect, choices, heads=True)

    def _repeat(
        self,
        start: Tensor,
        layers: list[int],
        positions: Tensor,
        cache: KVCache,
        top_k: int | None,
        collect: Sequence[int],
        choices: bool,
        *,
        heads: bool,
    ) -> tuple[RunOutput, Tensor]:
        """`run`, and with heads `unembed` (else no logits), from a recording where there is one."""
        length = check_positions(positions, self.config, cache)
        check_run(layers, self.config, len(positions), cache, top_k=top_k, collect=collect)
        step, key = recordable(self, layers, cache, top_k, collect, choices=choices, heads=heads)
        outputs = repeat(self, step, start, positions, cache, length=length, key=key)
        logits = outputs.pop(0) if heads else start
        hidden, collected, chosen = outputs[0], outputs[1 : 1 + len(collect)], outputs[1 + len(collect) :]
        routed = [layer for layer in layers if choices and self.config.is_moe(layer)]
        result = RunOutput(hidden, dict(zip(collect, collected, strict=True)))
        result.chosen = {layer: experts.flatten(0, 1) for layer, experts in zip(routed, chosen, strict=True)}
        return result, logits

    def draft(
        self,
        newest: Tensor,
        layers: Sequence[int],
        *,
        positions: Tensor,
        cache: KVCache,
        noise: Tensor | None = None,
        top_k: int | None = None,
        collect: Sequence[int] = (),
    ) -> tuple[Tensor, list[Tensor]]:
        """Draft tokens one after another by some layers and the head; of few rows, compiled, one call.

        newest: [A, 1] int64; positions: [A, n + 1] int64, where it stands and where n drafts will; layers, cache,
            top_k, collect: as in `run`
        noise: [A, n, V] float64, added to the logits; a draft is where they are largest
        -> drafts [A, n]; states [A, n + 1, D] of newest and drafts, after the last of the layers and after each of
            `collect`
        """
        layers = list(layers)
        if self._repeats(self.dtype, positions[:, :1]):
            length = check_positions(positions, self.config, cache)
            check_run(layers, self.config, len(positions), cache, top_k=top_k, collect=collect)
            states_of, key = recordable(self, layers, cache, top_k, collect)
            return repeat_draft(self, states_of, newest, positions, cache, noise, length=length, key=key)

        def states_at(token: Tensor, place: int) -> list[Tensor]:
            at = positions[:, place : place + 1]
            output = self.run(self.embed(token), layers, positions=at, cache=cache, top_k=top_k, collect=collect)
            return [output.hidden, *(output.collected[layer] for layer in collect)]

        return draft_places(self, states_at, newest, positions.shape[1] - 1, noise)

    def _repeats(self, dtype: torch.dtype, positions: Tensor) -> bool:
        """Whether a step of states at positions [B, T] is recorded, and repeated after that."""
        return self.compiled and can_repeat(positions.numel(), dtype, positions.device)

    def fill(self, hidden: Tensor, layers: Sequence[int], *, positions: Tensor, cache: KVCache) -> None:
        """Write only what the cache keeps of skipped layers, all from the same exit state hidden [B, T, D]
        (CALM's state propagation, arXiv 2207.07061). Raises ValueError for positions past the end, as `run`."""
        length = check_positions(positions, self.config, cache)
        hidden, places = lay(hidden, positions, self.config, cache, length=length)
        for layer in layers:
            memory, router_memory = cache.memory(layer), cache.router_memory(layer)
            block_of(self, layer).fill(hidden, places, memory=memory, router_memory=router_memory)

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
