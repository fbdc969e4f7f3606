"""What a newcomer's first line costs: no package that decoding does not need, and no noise."""

import subprocess
import sys

IMPORT = "import layerskip_moe"

DECODE = """
import sys
from layerskip_moe import Autoregressive, ModelConfig, MoEDecoder, SelfSpeculative, generate

model = MoEDecoder(ModelConfig(vocab_size=16, n_layers=2, d_model=16, n_heads=2, num_experts=2, top_k=1))
model.save_pretrained(sys.argv[1])
model = MoEDecoder.from_pretrained(sys.argv[1])
prompts = [[1, 2, 3], [4]]
plain = generate(model, prompts, Autoregressive(), max_new_tokens=5, seed=0)
drafted = generate(model, prompts, SelfSpeculative(exit_layer=1, draft_length=2), max_new_tokens=5, seed=0)
assert plain.tokens == drafted.tokens and [len(row) for row in plain.tokens] == [5, 5]
"""

HEAVY = ("torchtune", "torchao", "datasets", "transformers", "matplotlib")


def run_alone(code, *arguments):
    """Run code in a fresh interpreter; what it imported, and what it wrote on stderr."""
    script = f"{code}\nimport sys; print('modules:', *sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.rpartition("modules:")[2].split(), done.stderr


def test_importing_brings_in_nothing_heavy_and_is_silent():
    modules, errors = run_alone(IMPORT)
    assert not set(modules) & {*HEAVY, "tokenizers", "pyarrow", "tensorboard"}
    assert {"layerskip_moe", "torch"} <= set(modules)
    assert errors == ""


def test_decoding_brings_in_nothing_heavy_and_is_silent(tmp_path):
    modules, errors = run_alone(DECODE, str(tmp_path / "model"))
    assert not set(modules) & set(HEAVY)
    assert errors == ""
