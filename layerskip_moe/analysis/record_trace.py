"""Recording traces: decode plainly, asking every layer at every position.

Each prompt is decoded alone, step by step, by the very calls of plain decoding, so that what is recorded is what
drafting would meet, to the last bit. Prompts and held-out text are run whole, as prompts are.

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
from layerskip_moe.generation.sampling import choose, choose_by_margin, choose_with_confidence, gumbel_noise
from layerskip_moe.nn import ModelConfig, MoEDecoder, RunOutput
from layerskip_moe.nn.modes import evaluating


def record_texts(
    model: MoEDecoder,
    prompts: Sequence[Sequence[int]],
    held_out: Sequence[Sequence[int]] = (),
    *,
    max_new_tokens: int,
    temperatures: Sequence[float] = (0.0, 0.8),
    seed: int = 0,
    compile: bool = True,
    progress: bool = True,
) -> list[TracedText]:
    """Every prompt continued at every temperature, and held-out texts as they stand, which are asked greedily.

    prompts: token ids; prompt i is decoded alone, for exactly max_new_tokens tokens, with seed + i, as
    `compare_decoding` does. A prompt's own positions are asked too, with the temperature and noise of the continuation.
    held_out: texts of 2 tokens or more. compile: as in `generate`.

    Raises ValueError for what `generate` refuses, temperatures that repeat, and held-out texts that are too short, too
    long or of other tokens.
    """
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
            texts.append(_continued(model, list(prompt), sampling, max_new_tokens, compile))
            bar.update()
        for text in held_out:
            texts.append(_read(model, list(text)))
            bar.update()
    return texts


@dataclass
class _Recording:
    """A strategy, plain decoding of one prompt, that keeps what every layer says: each list's parts are of a few
    states, one after the other."""

    said: list[Tensor] = field(default_factory=list)  # [L, N] each, as the next three
    second: list[Tensor] = field(default_factory=list)
    confidence: list[Tensor] = field(default_factory=list)
    margin: list[Tensor] = field(default_factory=list)
    experts: list[Tensor] = field(default_factory=list)  # [M, N, K] each

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
        session.append(self.said[-1][-1:])

    def _run(self, session: Session, tokens: Tensor, positions: Tensor, noise: Tensor | None) -> None:
        model, layers = session.model, range(session.model.config.n_layers)
        hidden, cache = model.embed(tokens), session.cache
        output = model.run(hidden, layers, positions=positions, cache=cache, collect=layers, choices=True)
        self.keep(model, output, session.sampling, noise)

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
        parts = {name: torch.cat(getattr(self, name), dim=1).numpy() for name in vars(self)}
        return TracedText(np.array(tokens), prompt_length, sampling.temperature, sampling.seed, **parts)


def _continued(
    model: MoEDecoder, prompt: list[int], sampling: Sampling, max_new_tokens: int, compile: bool
) -> TracedText:
    recording = _Recording()
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
