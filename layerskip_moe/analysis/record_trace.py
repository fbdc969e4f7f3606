"""Recording traces: decode plainly, asking every layer at every position.

Each prompt is decoded alone, step by step, by the very calls of plain decoding, so that what is recorded is what
drafting would meet, to the last bit. Prompts and held-out text are run whole, as prompts are.

Drafts made from int8 copies of the weights go by keys and values that are int8's, too, from the round's first place on.
So what they say at a place depends on where the round began, and all rounds there may be are asked, from the last place
to the first: each writes over the cache behind it, which the next ones do not read.

L layers, M MoE layers, K experts chosen, N states, D width, V vocabulary.
Knows nothing of files. Next: `trace.py`, what is recorded.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from layerskip_moe.analysis.held_out import LIVE_LOGITS, run_layers
from layerskip_moe.analysis.trace import TracedText
from layerskip_moe.generation import Sampling, Session, check_prompts, generate
from layerskip_moe.generation.policies.exits import MOST_DRAFTS
from layerskip_moe.generation.sampling import choose, choose_by_margin, choose_with_confidence, gumbel_noise
from layerskip_moe.nn import ModelConfig, MoEDecoder, RunOutput, few_rows
from layerskip_moe.nn.compiling import compiling
from layerskip_moe.nn.drafts import choose_draft
from layerskip_moe.nn.int8_copies import are_made_unasked, int8_copies, why_no_int8
from layerskip_moe.nn.modes import evaluating


def record_texts(
    model: MoEDecoder,
    prompts: Sequence[Sequence[int]],
    held_out: Sequence[Sequence[int]] = (),
    *,
    max_new_tokens: int,
    temperatures: Sequence[float] = (0.0, 0.8),
    seed: int = 0,
    int8_length: int = MOST_DRAFTS,
    compile: bool = True,
    progress: bool = True,
) -> list[TracedText]:
    """Every prompt continued at every temperature, and held-out texts as they stand, which are asked greedily.

    prompts: token ids; prompt i is decoded alone, for exactly max_new_tokens tokens, with seed + i, as
    `compare_decoding` does. A prompt's own positions are asked too, with the temperature and noise of the continuation.
    held_out: texts of 2 tokens or more. compile: as in `generate`.
    int8_length: drafts of a round that are recorded of int8 copies, 0 to 63, which takes the layers and the head as
    many places for each token; they are left out where `Adaptive` would make no copies, see `are_made_unasked`.

    Raises ValueError for what `generate` refuses, temperatures that repeat, held-out texts that are too short, too long
    or of other tokens, and another int8_length.
    """
    if not 0 <= int8_length < few_rows.MOST_ROWS:
        raise ValueError(f"int8_length={int8_length} must be 0 to {few_rows.MOST_ROWS - 1}.")
    if len(set(temperatures)) != len(temperatures):
        raise ValueError(f"temperatures={list(temperatures)} must differ from each other.")
    samplings = [Sampling(temperature, seed=seed + i) for temperature in temperatures for i, _ in enumerate(prompts)]
    check_prompts(prompts, model.config, max_new_tokens)
    for text in held_out:
        if not 2 <= len(text) <= model.config.max_seq_len:
            raise ValueError(
                f"a held-out text has {len(text)} tokens; it takes 2 at least, and max_seq_len="
                f"{model.config.max_seq_len} at most."
            )
        outside = [token for token in text if not 0 <= token < model.config.vocab_size]
        if outside:
            raise ValueError(
                f"a held-out text holds token id {outside[0]}, but the vocabulary has ids 0 to "
                f"{model.config.vocab_size - 1}."
            )
    texts = []
    with tqdm(total=len(samplings) + len(held_out), desc="tracing", disable=not progress, leave=False) as bar:
        for index, sampling in enumerate(samplings):
            prompt = prompts[index % len(prompts)]
            texts.append(_continued(model, list(prompt), sampling, max_new_tokens, int8_length, compile))
            bar.update()
        for text in held_out:
            texts.append(_read(model, list(text)))
            bar.update()
    return texts


@dataclass
class _Recording:
    """A strategy, plain decoding of one prompt, that keeps what every layer says: each list's parts are of a few
    states, one after the other.

    int8_length: drafts of each round that int8 copies are asked for"""

    int8_length: int = 0
    said: list[Tensor] = field(default_factory=list)  # [L, N] each, as the next three
    second: list[Tensor] = field(default_factory=list)
    confidence: list[Tensor] = field(default_factory=list)
    margin: list[Tensor] = field(default_factory=list)
    experts: list[Tensor] = field(default_factory=list)  # [M, N, K] each
    int8_right: Tensor | None = None  # [L, N, D], as the next, where there are copies
    int8_margin: Tensor | None = None

    def check(self, config: ModelConfig) -> None:
        """Any model will do."""

    def start(self, session: Session) -> None:
        """Run the prompt as `session.prefill` does, and ask at each of its positions but the last."""
        length = int(session.cache.lengths.max())
        if length:
            positions = torch.arange(length, device=session.tokens.device)[None]
            sampling, noise = session.sampling, None
            if not sampling.greedy:
                vocab_size = session.model.config.vocab_size
                noise = gumbel_noise(sampling.seed, session.rows, positions + 1, vocab_size)
            self._run(session, session.tokens[:, :length], positions, noise)

    def step(self, session: Session) -> None:
        """One token, and what the other layers would have said."""
        self._run(session, session.newest, session.positions(1), session.noise(1))
        if session.remaining == [1]:
            self._ask_copies(session)
        session.append(self.said[-1][-1:])

    def _run(self, session: Session, tokens: Tensor, positions: Tensor, noise: Tensor | None) -> None:
        model, layers = session.model, range(session.model.config.n_layers)
        hidden, cache = model.embed(tokens), session.cache
        output = model.run(hidden, layers, positions=positions, cache=cache, collect=layers, choices=True)
        self.keep(model, output, session.sampling, noise)

    def _ask_copies(self, session: Session) -> None:
        """All rounds of int8 drafts that there may be, at the end of the text."""
        model, layers, sampling = session.model, range(session.model.config.n_layers), session.sampling
        if not self.int8_length or why_no_int8(model) is not None or not are_made_unasked(model):
            return
        copies = int8_copies(model)
        assert copies is not None, "nothing stands against them"
        newest = int(session.cache.lengths)
        begin = newest + 1 - session.max_new_tokens
        tokens, positions = session.tokens[:, : newest + 1], torch.arange(newest + 1, device=model.device)[None]
        text = torch.cat([tokens[0, begin + 1 :], self.said[-1][-1].to(model.device)])
        shape = len(layers), len(text), self.int8_length
        right, margins = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape)
        with few_rows.reading(copies.parts), compiling(model, False):  # what is recorded is the weights' own
            for place in reversed(range(len(text))):
                count = min(self.int8_length, len(text) - place)
                at = slice(begin + place, begin + place + count)
                output = model.run(
                    model.embed(tokens[:, at]), layers, positions=positions[:, at], cache=session.cache, collect=layers
                )
                noise = None
                if not sampling.greedy:  # (that of all places at once may take more memory than there is)
                    drawn = gumbel_noise(sampling.seed, session.rows, positions[:, at] + 1, model.config.vocab_size)
                    noise = drawn[0] * sampling.temperature
                for layer in layers:
                    drafts, by = choose_draft(model, output.collected[layer][0], noise)
                    right[layer, place, :count] = (drafts == text[place : place + count]).cpu()
                    margins[layer, place, :count] = by.float().cpu()
        self.int8_right, self.int8_margin = right, margins

    def keep(self, model: MoEDecoder, output: RunOutput, sampling: Sampling, noise: Tensor | None) -> None:
        """Ask the states of one row at N positions, with their noise [1, N, V]."""
        states = torch.stack([output.collected[layer][0] for layer in range(model.config.n_layers)], dim=1)
        some = max(1, LIVE_LOGITS // (states.shape[1] * model.config.vocab_size))  # states [N, L, D]
        for first in range(0, len(states), some):
            logits = model.unembed(states[first : first + some])
            here = None if noise is None else noise[0, first : first + some, None]
            said, confidence = choose_with_confidence(logits, sampling, here)
            others = logits.scatter(-1, said[..., None], -math.inf)
            second = choose(others, sampling, here)
            _, margin = choose_by_margin(logits, sampling, here)
            self.said.append(said.T.cpu())
            self.second.append(second.T.cpu())
            self.confidence.append(confidence.T.cpu())
            self.margin.append(margin.float().T.cpu())
        chosen = [output.chosen[layer].cpu() for layer in sorted(output.chosen)]
        self.experts.append(torch.stack(chosen) if chosen else torch.zeros(0, len(states), 0, dtype=torch.int64))

    def text(self, tokens: Sequence[int], prompt_length: int, sampling: Sampling) -> TracedText:
        """What was kept, of these tokens."""
        asked = self.said, self.second, self.confidence, self.margin, self.experts
        parts = [torch.cat(some, dim=1).numpy() for some in asked]
        none = torch.zeros(len(self.said[0]), len(tokens) - prompt_length, 0)
        right = none.bool() if self.int8_right is None else self.int8_right
        parts += [right.numpy(), (none if self.int8_margin is None else self.int8_margin).numpy()]
        return TracedText(np.array(tokens), prompt_length, sampling.temperature, sampling.seed, *parts)


def _continued(
    model: MoEDecoder, prompt: list[int], sampling: Sampling, max_new_tokens: int, int8_length: int, compile: bool
) -> TracedText:
    recording = _Recording(int8_length)
    [new] = generate(
        model,
        [prompt],
        recording,
        max_new_tokens=max_new_tokens,
        temperature=sampling.temperature,
        seed=sampling.seed,
        compile=compile,
    ).tokens
    return recording.text([*prompt, *new], len(prompt), sampling)


def _read(model: MoEDecoder, tokens: list[int]) -> TracedText:
    recording, sampling = _Recording(), Sampling()
    with evaluating(model):
        output = run_layers(model, torch.tensor([tokens[:-1]], device=model.device), collect=True)
        recording.keep(model, output, sampling, None)
    return recording.text(tokens, len(tokens), sampling)
