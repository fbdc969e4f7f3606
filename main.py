"""Train a LayerSkip Mixture-of-Experts decoder on real text, then decode it faster than itself.

    python main.py                                  # minutes on two CPU cores; the report is runs/main/report.md
    python main.py --n_layers 4 --max_steps 100     # any constant below can be given
    python main.py --dataset tinystories --sample_fraction 0.05 --out_dir runs/stories
    python main.py --compare                        # and the same network trained without LayerSkip, beside it
    torchrun --standalone --nproc_per_node=8 main.py --batch_size 64        # on eight GPUs

Or paste this file into a Colab or Jupyter cell after `pip install -e .`, and change a constant.
"""

import json
import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Literal

from layerskip_moe import ModelConfig, MoEDecoder, TrainConfig, load_corpus, train
from layerskip_moe.analysis import write_report
from layerskip_moe.constants import command_line, default_device, given_constants, override_constants
from layerskip_moe.pretrained import has_other_card, write_model_card
from layerskip_moe.study import StudyConfig, describe, side_by_side, study
from layerskip_moe.training import check_new_run, finish_run, has_checkpoint
from layerskip_moe.training.checkpoint import remove_checkpoints
from layerskip_moe.training.parallel import join

device: str = default_device(globals())  # "cuda" where there is one, else "cpu"
gpu = device.startswith("cuda")  # on a GPU the defaults grow

# Text
dataset: str = "python-stdlib"  # or wikitext-2, wikitext-103, tinystories, owner/name on the hub, a file or folder
dataset_config: str | None = None  # for hub datasets that have several
sample_fraction: float = 1.0  # share of the training text to use
vocab_size: int = 4096 if gpu else 2048  # of the byte-level BPE trained on the training split
seq_len: int = 256 if gpu else 128  # tokens per training sample

# Network
n_layers: int = 12
n_heads: int = 8 if gpu else 6
n_kv_heads: int | None = None  # key-value heads; None: half of n_heads, or as many where that is odd
d_model: int = 512 if gpu else 192
d_ff: int = 1024 if gpu else 384  # hidden width of one expert
num_experts: int = 8
k: int = 2  # experts per token
moe_layers: Literal["every other", "all", "first half", "last half"] = "every other"  # others: dense, k times as wide
router_average: float = 0.0  # a token's choice of experts hears those before it, the j-th by this to the power j
router_hold: int = 1  # so many tokens in a row take the first one's choice of experts
max_seq_len: int | None = None  # None: 1024 or 4 x seq_len, whichever is larger

# Training
epochs: float = 1.0  # passes over the text ...
max_steps: int | None = 300 if gpu else 220  # ... unless this is set, which wins; None: epochs (or give --epochs)
batch_size: int = 32 if gpu else 8
learning_rate: float = 1e-3 if gpu else 3e-3
moe_loss_weight: float = 0.01  # of the load-balance loss
router_coherence_weight: float = 0.0  # of a loss that pulls neighbouring tokens to the same experts
activation_checkpointing: bool = False  # less memory for a third more arithmetic
expert_parallel: int = 1  # processes that hold a layer's experts between them, under torchrun
resume: bool = False  # go on from the newest of <out_dir>/checkpoints, with the constants it was begun with

# The LayerSkip recipe
layer_dropout_max: float = 0.1  # how often the last layer is dropped at the end of training
exit_weights: Literal["equal", "paper", "drafting"] = "equal"  # how much each exit's loss weighs
drafting_exit: int | None = None  # the exit that "drafting" concentrates on; None: a quarter of the layers
exit_loss_scale: float = 1.0  # e_scale, of the early exits against the last layer
exit_curriculum: Literal["rotational", "gradual", "all", "none"] = "rotational"  # which exits a step supervises
exit_rotation: int = 4  # every how many layers one is supervised at a step
exit_distillation: float = 0.0  # share of an early exit's target that is the last layer's own distribution
expert_dropout: float = 0.0  # how often an expert sits out a step

# Decoding
exit_layer: int | None = None  # layers that draft; None: a sweep finds the fastest
draft_length: int | None = None  # tokens drafted per round; None: a sweep finds the fastest
temperature: float = 0.8  # of the sampled comparison; the other is greedy
num_prompts: int = 20  # held-out prompts
max_new_tokens: int = 128  # per prompt

# Run
compare: bool = False  # also train the same network without LayerSkip, as long, and report both side by side
seed: int = 0
checkpoint_every: int | None = None  # steps between checkpoints; None: ten in a run
out_dir: str = "runs/main"

constants = override_constants(globals())

# Constants that follow from others, where they were not given.
if n_kv_heads is None:
    n_kv_heads = n_heads // 2 if n_heads % 2 == 0 else n_heads
if max_seq_len is None:
    max_seq_len = max(1024, 4 * seq_len)
given = given_constants(globals())
if "epochs" in given and "max_steps" not in given:
    max_steps = None
constants |= {name: globals()[name] for name in ("n_kv_heads", "max_seq_len", "max_steps")}
seconds: dict[str, float] = {}
clock = time.perf_counter()


def stage_ends(name: str) -> None:
    """Note how long a stage took."""
    global clock
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - clock
    clock = time.perf_counter()


beside = Path(out_dir) / "without_layerskip"  # where --compare trains the other network
if not resume:  # a stopped run is not replaced, which is said now, and not after a text was read
    check_new_run(out_dir)
    if compare:
        check_new_run(beside)

# Text -> tokens
ranks = join(device)  # the processes of a torchrun; else this one alone
with ranks.one_per_machine_first():
    corpus = load_corpus(
        dataset, config=dataset_config, vocab_size=vocab_size, sample_fraction=sample_fraction, seed=seed
    )
stage_ends("text")

# Build
config = ModelConfig(
    vocab_size=corpus.vocab_size,
    n_layers=n_layers,
    d_model=d_model,
    n_heads=n_heads,
    n_kv_heads=n_kv_heads,
    d_ff=d_ff,
    dense_d_ff=k * d_ff,
    num_experts=num_experts,
    top_k=k,
    moe_layers=moe_layers,
    router_average=router_average,
    router_hold=router_hold,
    max_seq_len=max_seq_len,
)
measured = StudyConfig(
    seq_len=seq_len,
    batch_size=batch_size,
    exit_layer=exit_layer,
    draft_length=draft_length,
    num_prompts=num_prompts,
    max_new_tokens=max_new_tokens,
    temperature=temperature,
    seed=seed,
)
measured.check(config, corpus)  # what decoding will need is checked now, not after minutes of training
if ranks.is_first and compare and not resume:
    remove_checkpoints(beside)  # of a comparison with another run, which --resume would take for this one's
home = device if ranks.size == 1 else "cpu"  # several processes divide it: whole, it need not fit their GPUs
model = MoEDecoder(config, seed=seed).to(home)
parameters, active_parameters = model.parameter_counts()
if ranks.is_first:
    print(f"{parameters / 1e6:.1f}M parameters, {active_parameters / 1e6:.1f}M of them used per token, on {device}")

# Train
recipe = TrainConfig(
    max_steps=max_steps,
    epochs=epochs,
    seq_len=seq_len,
    batch_size=batch_size,
    learning_rate=learning_rate,
    moe_loss_weight=moe_loss_weight,
    router_coherence_weight=router_coherence_weight,
    layer_dropout_max=layer_dropout_max,
    exit_weights=exit_weights,
    drafting_exit=drafting_exit,
    exit_loss_scale=exit_loss_scale,
    exit_curriculum=exit_curriculum,
    exit_rotation=exit_rotation,
    exit_distillation=exit_distillation,
    expert_dropout=expert_dropout,
    activation_checkpointing=activation_checkpointing,
    expert_parallel=expert_parallel,
    seed=seed,
    checkpoint_every=checkpoint_every,
)
result = train(model, corpus, recipe, out_dir, resume=resume, finish=False)
saved = Path(out_dir) / "model"
if ranks.is_first:
    if result.skipped_steps:
        print(f"{result.skipped_steps} steps were skipped: their loss or gradient was not finite.")
    model.save_pretrained(saved, tokenizer=corpus.tokenizer, recipe={"corpus": corpus.name, **result.recipe})
    finish_run(out_dir)
stage_ends("training")

if compare:
    plainly = replace(recipe, layer_dropout_max=0.0, expert_dropout=0.0)
    plainly = replace(plainly, exit_curriculum="none", exit_weights="equal", drafting_exit=None)
    other = MoEDecoder(config, seed=seed).to(home)
    other_result = train(other, corpus, plainly, beside, resume=resume and has_checkpoint(beside))
    stage_ends("comparison")

if not ranks.is_first:
    sys.exit()  # the first process alone measures and reports
model.to(device)

# Evaluate every exit and expert on held-out text, and decode in every way
found = study(model, corpus, measured)
seconds |= found.pop("seconds")
clock = time.perf_counter()

if compare:
    other_found = study(other.to(device), corpus, measured, whole=False)
    found["comparison"] = side_by_side(result, found, other_result, other_found, seed=seed)
    stage_ends("comparison")

# Report
report_path = write_report(
    out_dir,
    {
        "command": shlex.join(["python", "main.py", *command_line(globals())]),
        "constants": constants,
        **describe(model, corpus),
        "training": {
            "steps": result.steps,
            "seconds": result.seconds,
            "tokens_per_second": result.tokens / result.seconds,
            "final_losses": result.losses.get("exit_losses", {}),
            "best_validation": {"step": result.best_step, "perplexity": result.validation[-1]}
            if result.validation
            else None,
        },
        **found,
        "seconds": seconds,
    },
)
print(report_path.read_text().split("\n## ")[1])  # "In short"
print(f"All of it, with pictures: {report_path}")
if not has_other_card(saved):  # one that was edited by hand stays
    write_model_card(saved, json.loads(report_path.with_name("report.json").read_text()))
