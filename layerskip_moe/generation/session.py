"""Session: the state of decoding a batch, shared by every strategy.

Between two rounds each active row holds one token that is chosen but not yet run, the newest; all before
it are in the cache, in every layer. A strategy runs what layers it likes over the newest token and what it
drafts after it, then hands the tokens that the full model chose to `append`.

A active rows (those not finished), T positions, V vocabulary.
Knows nothing of strategies or of clocks. Next: `autoregressive.py`, `self_speculative.py`.
"""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from layerskip_moe.generation.sampling import Sampling, choose, gumbel_noise
from layerskip_moe.generation.statistics import GenerationStats
from layerskip_moe.nn import KVCache, MoEDecoder


class Session:
    """Cache, positions and finished rows of one batch.

    rows:    [A] int64, which prompt each active row is: the `row` of the sampling noise
    newest:  [A, 1] int64, each active row's last token, not yet run
    outputs: new tokens of every row (finished ones too); stats: its counts
    """

    def __init__(
        self,
        model: MoEDecoder,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        max_new_tokens: int,
        stop_tokens: Collection[int] = (),
        first_row: int = 0,
    ) -> None:
        self.model, self.sampling = model, sampling
        self.max_new_tokens, self.stop_tokens = max_new_tokens, frozenset(stop_tokens)
        device = model.device
        self.outputs: list[list[int]] = [[] for _ in prompts]
        self.stats = [GenerationStats() for _ in prompts]
        self.rows = torch.arange(first_row, first_row + len(prompts), device=device)
        self._active = list(range(len(prompts)))  # the same rows, counted within this batch
        self.newest = torch.tensor([[prompt[-1]] for prompt in prompts], device=device)
        longest = max(len(prompt) for prompt in prompts) + max_new_tokens
        self.cache = KVCache(model.config, len(prompts), longest, dtype=model.dtype, device=device)
        # The last token a row may get is never run, so its slot is where overhanging drafts may write.
        self._last_slot = torch.tensor([len(prompt) + max_new_tokens - 1 for prompt in prompts], device=device)
        self._prefill(prompts)

    def _prefill(self, prompts: Sequence[Sequence[int]]) -> None:
        """Run every prompt but its last token, padded on the right: a slot past a row's end is overwritten
        before any of its queries can read it."""
        length = max(len(prompt) for prompt in prompts) - 1
        if length:
            padded = [[*prompt[:-1], *[0] * (length + 1 - len(prompt))] for prompt in prompts]
            tokens = torch.tensor(padded, device=self.model.device)
            positions = torch.arange(length, device=tokens.device).expand(tokens.shape)
            layers = range(self.model.config.n_layers)
            self.model.run(self.model.embed(tokens), layers, positions=positions, cache=self.cache)
        self.cache.extend(torch.tensor([len(prompt) - 1 for prompt in prompts], device=self.model.device))

    @property
    def finished(self) -> bool:
        """Whether every row is."""
        return not self._active

    @property
    def remaining(self) -> list[int]:
        """How many more tokens each active row may get: 1 or more."""
        return [self.max_new_tokens - len(self.outputs[row]) for row in self._active]

    def positions(self, count: int) -> Tensor:
        """[A, count]: the newest token's position and those after it.

        Drafts that overhang what a row may still get are given its one slot that nothing reads.
        """
        offsets = torch.arange(count, device=self.newest.device)
        return torch.minimum(self.cache.lengths[:, None] + offsets, self._last_slot[:, None])

    def run(self, hidden: Tensor, layers: range, positions: Tensor) -> Tensor:
        """Some layers over hidden [A, T, D] at positions [A, T], on this session's cache -> [A, T, D]."""
        return self.model.run(hidden, layers, positions=positions, cache=self.cache).hidden

    def noise(self, count: int, *, stream: int = 0) -> Tensor | None:
        """Noise [A, count, V] for choosing the next `count` tokens of each row; None when greedy."""
        if self.sampling.greedy:
            return None
        offsets = torch.arange(1, count + 1, device=self.newest.device)
        places = self.cache.lengths[:, None] + offsets
        return gumbel_noise(self.sampling.seed, self.rows, places, self.model.config.vocab_size, stream=stream)

    def choose(self, logits: Tensor, noise: Tensor | None) -> Tensor:
        """Tokens [A, T] for logits [A, T, V] under this session's sampling."""
        return choose(logits, self.sampling, noise)

    def append(self, tokens: Tensor, counts: Tensor, *, drafted: list[int] | None = None) -> None:
        """End a round: row r's next counts[r] tokens are tokens[r, :counts[r]], as the full model chose them.

        All but the last of them are in the cache in every layer; the last becomes the newest. counts [A] is
        1 or more and at most `remaining`. drafted: how many tokens were proposed for each row in this round;
        counts - 1 of them were accepted. Rows that met a stop token or their last token leave the session.
        """
        self.cache.extend(counts)
        self.newest = tokens.gather(1, counts[:, None] - 1)
        stays = []
        for index, (row, chosen, count) in enumerate(zip(self._active, tokens.tolist(), counts.tolist(), strict=True)):
            new = chosen[:count]
            stop = next((i for i, token in enumerate(new) if token in self.stop_tokens), None)
            new = new if stop is None else new[:stop]
            self.outputs[row].extend(new)
            if stop is None and len(self.outputs[row]) < self.max_new_tokens:
                stays.append(index)
            stats = self.stats[row]
            stats.generated += len(new)
            stats.rounds += 1
            if drafted is not None:
                stats.drafted += drafted[index]
                stats.accepted += count - 1
        if len(stays) < len(self._active):
            self._keep(stays)

    def _keep(self, stays: list[int]) -> None:
        """Drop the finished rows, so that no work is spent on them."""
        self._active = [self._active[index] for index in stays]
        kept = torch.tensor(stays, dtype=torch.int64, device=self.newest.device)
        self.rows, self.newest, self._last_slot = self.rows[kept], self.newest[kept], self._last_slot[kept]
        self.cache.select(kept)
