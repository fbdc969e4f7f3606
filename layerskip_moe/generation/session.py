"""Session: the state of decoding a batch, shared by every strategy.

Between two rounds each active row holds one token that is chosen but not yet run, the newest; all before it
have been. A strategy runs what layers it likes over the newest token and what it drafts after it, then hands
the tokens that it chose to `append`.

A active rows (those not finished), T positions, V vocabulary.
Knows nothing of strategies. Next: `autoregressive.py`, `self_speculative.py`.
"""

import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from layerskip_moe.generation.kept_caches import keep_cache, take_cache
from layerskip_moe.generation.prompt_agreement import prompt_agreement
from layerskip_moe.generation.sampling import Sampling, choose, gumbel_noise, penalize
from layerskip_moe.generation.statistics import GenerationStats
from layerskip_moe.generation.text import TextStream
from layerskip_moe.nn import KVCache, MoEDecoder, RunOutput
from layerskip_moe.nn.ragged import Judged

MOST_AHEAD, MOST_NOISE = 16, 2**20  # places, and numbers, of noise drawn at a time
_KEPT = 64  # last positions of prompts whose states are kept


class Session:
    """Cache, positions and finished rows of one batch.

    capacity: positions of the longest text there may be
    rows:    [A] int64, which prompt each active row is: the `row` of the sampling noise
    newest:  [A, 1] int64, each active row's last token, not yet run
    tokens:  [A, capacity] int64, each active row's text so far, a token at its position; the newest is the last
    state:   what the strategy keeps from round to round, such as a second cache; where it is not None it has
             `select(rows)`, called with the indices of the rows that stay when some have finished
    prompt:  the first position, and what `run` gave, of the end of the prompts, where `prefill` was asked for states
    outputs, layers_run: new tokens of every row (finished ones too), and how many layers ran to choose each
    stats:   the counts of every row
    telling_seconds: how long `on_token` took until now
    resting: steps of plain decoding until a policy is asked again; 0 as soon as a row ends
    one_call: whether rounds of self-speculation may be one call: sampling has no filters, and the strategy, which may
        say otherwise, accepts by shared noise
    """

    def __init__(
        self,
        model: MoEDecoder,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        max_new_tokens: int,
        stop_tokens: Collection[int] = (),
        texts: Sequence[TextStream] | None = None,
        on_token: Callable[[int, int], None] | None = None,
        first_row: int = 0,
    ) -> None:
        """texts: a stream for each prompt, in which stop strings are looked for; on_token: see `generate`;
        first_row: the number of the first prompt. The prompts wait to be run, by `prefill`."""
        self.model, self.sampling = model, sampling
        self.max_new_tokens, self.stop_tokens = max_new_tokens, frozenset(stop_tokens)
        self._texts, self._on_token, self._first_row = texts, on_token, first_row
        device = model.device
        self.outputs: list[list[int]] = [[] for _ in prompts]
        self.layers_run: list[list[int]] = [[] for _ in prompts]
        self.stats = [GenerationStats() for _ in prompts]
        self.prompt: tuple[int, RunOutput] | None = None
        self.state: Any = None
        self.telling_seconds = 0.0
        self.resting = 0
        self.one_call = not sampling.filters
        self.rows = torch.arange(first_row, first_row + len(prompts), device=device)
        self._active = list(range(len(prompts)))  # the same rows, counted within this batch
        self._prompt_lengths = [len(prompt) for prompt in prompts]
        self.newest = torch.tensor([[prompt[-1]] for prompt in prompts], device=device)
        self.capacity = max(map(len, prompts)) + max_new_tokens
        self._caches: list[tuple[MoEDecoder, KVCache]] = []
        self.cache = self.new_cache(model)
        self.cache.extend(torch.tensor([len(prompt) - 1 for prompt in prompts], device=device))
        padded = [[*prompt, *[0] * (self.capacity - len(prompt))] for prompt in prompts]
        self.tokens = torch.tensor(padded, device=device)
        # The last token a row may get is never run, so its slot is where overhanging drafts may write.
        self._last_slot = torch.tensor([len(prompt) + max_new_tokens - 1 for prompt in prompts], device=device)

        # By stream: how many tokens each active row had when noise was drawn, and that noise [A, some, V].
        self._noise: dict[int, tuple[list[int], Tensor]] = {}
        self._seen: Tensor | None = None  # [A, V] bool: the tokens a repetition penalty weighs down
        if sampling.repetition_penalty != 1.0:
            self._seen = torch.zeros(len(prompts), model.config.vocab_size, dtype=torch.bool, device=device)
            firsts = self.tokens[:, :1]  # padding counts as one more of the row's own first token
            inside = torch.arange(self.capacity, device=device) <= self.cache.lengths[:, None]
            self._seen.scatter_(1, torch.where(inside, self.tokens, firsts), True)

    def prefill(
        self,
        layers: Sequence[int] | None = None,
        *,
        model: MoEDecoder | None = None,
        cache: KVCache | None = None,
        collect: Sequence[int] = (),
    ) -> None:
        """Run every prompt but its last token through some layers (all by default), before the first round; of this
        session's model on its cache, or of another.

        collect: layers whose states at the prompts' last positions `prompt` is to have, beside those after all layers
        Prompts are padded on the right: a slot past a row's end is overwritten before any query can read it.
        """
        model, cache = model or self.model, cache or self.cache
        length = int(self.cache.lengths.max())
        if not length:
            return
        tokens = self.tokens[:, :length]
        positions = torch.arange(length, device=tokens.device).expand(tokens.shape)
        layers = range(model.config.n_layers) if layers is None else layers
        output = model.run(model.embed(tokens), layers, positions=positions, cache=cache, collect=collect)
        if collect:
            first = max(length - _KEPT, 0)  # a long prompt's states are not all kept
            ends = {layer: states[:, first:].clone() for layer, states in output.collected.items()}
            self.prompt = first, RunOutput(output.hidden[:, first:].clone(), ends)

    def prompt_agreement(self, exits: Sequence[int]) -> list[dict[int, list[Judged]]]:
        """For each row, by exit layer, its margin at the prompt's last places, and whether it would have said there
        what the full model would. For the exits whose states `prefill` kept, before the first round; [] where there
        are none."""
        return prompt_agreement(self, exits)

    def new_cache(self, model: MoEDecoder, *, n_layers: int | None = None) -> KVCache:
        """An empty cache for this session's rows and the first `n_layers` layers of a model, by default all."""
        cache = take_cache(model, len(self.rows), self.capacity, n_layers=n_layers)
        self._caches.append((model, cache))
        return cache

    def close(self) -> None:
        """Leave the caches to a later session. This one must not be used after that."""
        for model, cache in reversed(self._caches):
            keep_cache(model, cache)

    @property
    def finished(self) -> bool:
        """Whether every row is."""
        return not self._active

    @property
    def remaining(self) -> list[int]:
        """How many more tokens each active row may get: 1 or more."""
        return [self.max_new_tokens - len(self.outputs[row]) for row in self._active]

    @property
    def new_tokens(self) -> list[list[int]]:
        """The new tokens of each active row."""
        return [self.outputs[row] for row in self._active]

    def texts(self) -> list[list[int]]:
        """The tokens of each active row, prompt and new ones."""
        rows = zip(self._active, self.tokens.tolist(), strict=True)
        return [tokens[: self._prompt_lengths[row] + len(self.outputs[row])] for row, tokens in rows]

    @property
    def row_numbers(self) -> list[int]:
        """`rows` as plain numbers, which no device is asked for."""
        return [self._first_row + row for row in self._active]

    def positions(self, count: int) -> Tensor:
        """[A, count]: the newest token's position and those after it.

        Drafts that overhang what a row may still get are given its one slot that nothing reads.
        """
        if count == 1:  # the last token a row may get is never run
            return self.cache.lengths[:, None]
        offsets = torch.arange(count, device=self.newest.device)
        return torch.minimum(self.cache.lengths[:, None] + offsets, self._last_slot[:, None])

    def run(self, hidden: Tensor, layers: Sequence[int], positions: Tensor) -> Tensor:
        """Some layers over hidden [A, T, D] at positions [A, T], on this session's cache -> [A, T, D]."""
        return self.model.run(hidden, layers, positions=positions, cache=self.cache).hidden

    def decode(self, start: Tensor, layers: Sequence[int], positions: Tensor) -> Tensor:
        """Token ids [A, T] or hidden [A, T, D] through some layers and the head: logits [A, T, V]."""
        return self.model.decode(start, layers, positions=positions, cache=self.cache)[1]

    def draft(
        self,
        layers: Sequence[int],
        positions: Tensor,
        noise: Tensor | None,
        *,
        rows: Tensor | None = None,
        top_k: int | None = None,
        collect: Sequence[int] = (),
    ) -> tuple[Tensor, list[Tensor]]:
        """Drafts by some layers and the head, one after another, after the newest token, which is at the first of
        positions [A, n + 1], and states, as `MoEDecoder.draft` has them. Nothing is filtered out or penalised. rows
        [R]: the rows that draft, where not all do, of which all else is given and returned."""
        return self.model.draft(
            self.newest if rows is None else self.newest[rows],
            layers,
            positions=positions,
            cache=self.cache if rows is None else self.cache.subset(rows),
            noise=None if noise is None else noise * self.sampling.temperature,
            top_k=top_k,
            collect=collect,
        )

    def at(self, rows: Tensor, places: Tensor) -> dict[str, Any]:
        """The cache and the positions [N, 1] of places [N] after the text of active rows [N], as `MoEDecoder.run` takes
        them."""
        cache = self.cache.subset(rows)
        return {"cache": cache, "positions": (cache.lengths + places)[:, None]}

    def noise(self, count: int, *, stream: int = 0) -> Tensor | None:
        """Noise [A, count, V] for choosing the next `count` tokens of each row; None when greedy. It is drawn for more
        places at a time, where rows go on by equal steps: the next rounds need them, and places whose drafts were
        rejected are needed again."""
        if self.sampling.greedy:
            return None
        done = [len(self.outputs[row]) for row in self._active]
        first, noise = self._noise.get(stream, (done, None))
        used = [now - then for now, then in zip(done, first, strict=True)]
        if noise is None or max(used) + count > noise.shape[1]:
            vocab_size, together = self.model.config.vocab_size, min(used) == max(used)
            # What is left is kept; of rows that go on by different steps all is drawn anew, and no more than is needed:
            # what lies ahead of one would be used up before that of another.
            ahead = max(count, min(MOST_AHEAD, MOST_NOISE // (len(done) * vocab_size)) if together else 0)
            left = None if noise is None or not together else noise[:, used[0] :]
            there = 0 if left is None else left.shape[1]
            places = self.cache.lengths[:, None] + torch.arange(there + 1, ahead + 1, device=self.newest.device)
            noise = gumbel_noise(self.sampling.seed, self.rows, places, vocab_size, stream=stream)
            noise = noise if left is None else torch.cat([left, noise], dim=1)
            used, self._noise[stream] = [0] * len(done), (done, noise)
        if len(set(used)) == 1:
            return noise[:, used[0] : used[0] + count]
        places = torch.tensor(used, device=noise.device)[:, None] + torch.arange(count, device=noise.device)
        return noise[torch.arange(len(used), device=noise.device)[:, None], places]

    def scores(self, logits: Tensor, drafts: Sequence[Tensor] = (), rows: Tensor | None = None) -> Tensor:
        """Logits [A, T, V] after the repetition penalty. The last of the T places has seen the row's text and all
        of `drafts`, each [A, 1]; every place before it one draft less. rows [R]: whose logits [R, T, V] these are,
        where they are not everybody's."""
        seen = self.seen(logits.shape[1], drafts)
        if seen is None:
            return logits
        return penalize(logits, seen if rows is None else seen[rows], self.sampling.repetition_penalty)

    def seen(self, places: int, drafts: Sequence[Tensor] = ()) -> Tensor | None:
        """[A, places, V] bool: the tokens that each place has seen, as `scores` says; None without a penalty."""
        if self._seen is None:
            return None
        seen = self._seen[:, None].repeat(1, places, 1)
        for place in range(places):
            before = drafts[: len(drafts) - (places - 1 - place)]
            if before:
                seen[:, place].scatter_(1, torch.cat(list(before), dim=1), True)
        return seen

    def choose(self, scores: Tensor, noise: Tensor | None) -> Tensor:
        """Tokens [A, T] for scores [A, T, V] under this session's sampling."""
        return choose(scores, self.sampling, noise)

    def append(
        self,
        tokens: Tensor,
        accepted: Sequence[int] | None = None,
        *,
        layers_run: Sequence[int] | None = None,
        drafted: Sequence[int] | None = None,
    ) -> None:
        """End a round: row r's next tokens are tokens[r, :accepted[r] + 1].

        tokens [A, T]; accepted is 0 or more and less than `remaining`, 0 by default. All but the last of the tokens
        have been run; the last becomes the newest. layers_run: how many layers ran to choose them, by row; all
        by default. drafted: how many tokens were proposed for each row in this round. Rows that met a stop token, a
        stop string or their last token leave the session.
        """
        accepted = [0] * len(tokens) if accepted is None else accepted
        self._remember(tokens, accepted)
        stays = []
        for index, (row, chosen, count) in enumerate(zip(self._active, tokens.tolist(), accepted, strict=True)):
            layers = self.model.config.n_layers if layers_run is None else layers_run[index]
            self.stats[row].rounds += 1
            if drafted is not None:
                self.stats[row].add_drafts(drafted[index], accepted=count)
            ended = any(self._give(row, token, layers) for token in chosen[: count + 1])
            if not ended and len(self.outputs[row]) < self.max_new_tokens:
                stays.append(index)
        if len(stays) < len(self._active):
            self._keep(stays)

    def _give(self, row: int, token: int, layers: int) -> bool:
        """Add one token to a row's output; whether the row's text ends with or before it."""
        if token in self.stop_tokens:
            return True
        self.outputs[row].append(token)
        self.layers_run[row].append(layers)
        self.stats[row].generated += 1
        self.stats[row].layers_run += layers
        if self._on_token is not None:
            began = time.perf_counter()
            self._on_token(self._first_row + row, token)
            self.telling_seconds += time.perf_counter() - began
        if self._texts is None:
            return False
        self._texts[row].push(token)
        return self._texts[row].stopped

    def _remember(self, tokens: Tensor, accepted: Sequence[int]) -> None:
        """Write the round's tokens where later rounds look for them; the last of each row is the newest."""
        most, tokens = max(accepted), tokens[:, : max(accepted) + 1]
        if len(tokens) == 1 and self._seen is None:  # of one row all is known here, and little need be asked of tensors
            [row] = self._active
            start = self._prompt_lengths[row] + len(self.outputs[row])
            self.newest, self.tokens[:, start : start + most + 1] = tokens[:, most:], tokens
            self.cache.extend(most + 1)
            return
        first, place = self.cache.lengths[:, None] + 1, torch.arange(most + 1, device=tokens.device)
        if min(accepted) == most:  # no numbers go to a GPU
            self.newest = tokens[:, most:].contiguous()
            self.cache.extend(most + 1)
        else:
            last = torch.tensor(accepted, device=tokens.device)
            self.newest = tokens.gather(1, last[:, None])
            self.cache.extend(last + 1)
            # Beyond its last a row's first token is written again, where it already stands.
            place = torch.where(place <= last[:, None], place, 0)
            tokens = tokens.gather(1, place)
        self.tokens.scatter_(1, first + place, tokens)
        if self._seen is not None:
            self._seen.scatter_(1, tokens, True)

    def _keep(self, stays: list[int]) -> None:
        """Drop the finished rows, so that no work is spent on them."""
        self._active, self.resting = [self._active[index] for index in stays], 0
        kept = torch.tensor(stays, dtype=torch.int64, device=self.newest.device)
        self.rows, self.newest, self._last_slot = self.rows[kept], self.newest[kept], self._last_slot[kept]
        self.tokens = self.tokens[kept]
        self._noise = {
            stream: ([done[index] for index in stays], noise[kept]) for stream, (done, noise) in self._noise.items()
        }
        self._seen = None if self._seen is None else self._seen[kept]
        self.cache.select(kept)
        if self.state is not None:
            self.state.select(kept)
