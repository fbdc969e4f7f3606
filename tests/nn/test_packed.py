"""Products with int8 panels in the place of weights, as drafts are computed: against the formula, and row by row."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layerskip_moe.nn import few_rows, kernels
from layerskip_moe.nn.kernels import has_kernels
from layerskip_moe.nn.rounding import nearest

pytestmark = pytest.mark.skipif(not has_kernels(), reason="there is no C++ compiler")

TYPES = [torch.float32, torch.bfloat16, torch.float16]
rows, sizes, seeds = st.integers(1, 64), st.integers(1, 100), st.integers(0, 1000)
settings.register_profile("panels", max_examples=40, deadline=None, derandomize=True)
few_examples = settings(settings.get_profile("panels"))


def drawn(seed, *shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def copy_of(weight):
    """What is read instead of a weight, and what that is as numbers."""
    values, scale = nearest(weight.flatten(0, -2), weight.shape[-1], bits=8)
    values, scale = values.view(weight.shape), scale.view(weight.shape[:-1]).float()
    return (few_rows.packed(values), scale), values.double() * scale[..., None].double()


def close(got, expected, dtype):
    """But for the rounding of states to 16 bits, and of results to their type."""
    allowed = {torch.float32: 3e-4, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    torch.testing.assert_close(got.double(), expected, atol=allowed * max(1.0, expected.abs().max().item()), rtol=0)


@given(st.integers(1, 5), sizes, sizes)
@few_examples
def test_a_panel_has_the_pairs_of_32_outputs_side_by_side(matrices, outputs, inputs):
    values = drawn(inputs, matrices, outputs, inputs).mul(60).clamp(-128, 127).to(torch.int8)
    panels = few_rows.packed(values)
    assert panels.shape == (matrices, -(-outputs // 32), -(-inputs // 2), 64) and panels.is_contiguous()
    for output in range(outputs):
        row = panels[:, output // 32, :, 2 * (output % 32) : 2 * (output % 32) + 2].flatten(1)
        assert torch.equal(row[:, :inputs], values[:, output]) and not row[:, inputs:].any()
    assert panels.long().abs().sum() == values.long().abs().sum()  # and zeros elsewhere


@given(rows, sizes, sizes, st.sampled_from(TYPES), st.booleans(), st.booleans(), seeds)
@few_examples
def test_linear(n, inputs, outputs, dtype, with_bias, wide, seed):
    x, weight = drawn(seed, n, inputs, dtype=dtype), drawn(seed + 1, outputs, inputs, dtype=dtype)
    bias = drawn(seed + 2, outputs, dtype=dtype) if with_bias else None
    copy, numbers = copy_of(weight)
    with few_rows.reading({id(weight): copy}):
        got = few_rows.linear(x, weight, bias, wide=wide)
        alone = torch.cat([few_rows.linear(row, weight, bias, wide=wide) for row in x.split(1)])
    assert got.dtype == (torch.float32 if wide else dtype) and torch.equal(got, alone)
    close(got, x.double() @ numbers.T + (bias.double() if with_bias else 0.0), got.dtype)
    assert few_rows.linear(x, weight, bias, wide=wide).ne(got).any() or inputs < 4  # the weight itself, by then


@given(rows, st.integers(2, 9), st.integers(1, 3), sizes, sizes, st.sampled_from(TYPES), seeds)
@few_examples
def test_experts(n, n_experts, top_k, width, hidden, dtype, seed):
    top_k = min(top_k, n_experts)
    x, gate_up = drawn(seed, n, width, dtype=dtype), drawn(seed + 1, n_experts, 2 * hidden, width, dtype=dtype) / 8
    down = drawn(seed + 2, n_experts, width, hidden, dtype=dtype) / 8
    chosen, weights = drawn(seed + 3, n, n_experts).topk(top_k).indices, drawn(seed + 4, n, top_k).softmax(-1)
    (up_copy, ups), (down_copy, downs) = copy_of(gate_up), copy_of(down)
    with few_rows.reading({id(gate_up): up_copy, id(down): down_copy}):
        got = few_rows.experts(x, chosen, weights, gate_up, down)
        each = zip(x.split(1), chosen.split(1), weights.split(1), strict=True)
        alone = torch.cat([few_rows.experts(*one, gate_up, down) for one in each])
    assert got.dtype == dtype and torch.equal(got, alone)
    gates, up = (ups[chosen] @ x.double()[:, None, :, None])[..., 0].chunk(2, dim=-1)
    each = (downs[chosen] @ (torch.nn.functional.silu(gates) * up)[..., None])[..., 0]
    close(got, (each * weights[..., None]).sum(1), dtype)


@pytest.mark.parametrize("inputs", [3, 512, 1024, 1536, 4096, 29_000])
def test_the_largest_sums_have_room(inputs):
    weight = torch.ones(33, inputs)
    values = torch.full((33, inputs), 127, dtype=torch.int8)
    values[1::2] = -128
    x = torch.stack([torch.full((inputs,), 3e8), torch.full((inputs,), -1e-8), torch.zeros(inputs)])
    with few_rows.reading({id(weight): (few_rows.packed(values), torch.ones(33))}):
        got = few_rows.linear(x, weight)
    torch.testing.assert_close(got.double(), x.double() @ values.double().T, rtol=2e-3, atol=0)


def test_what_is_no_number_stays_in_its_row():
    weight, x = drawn(0, 40, 24), drawn(1, 9, 24)
    copy, _ = copy_of(weight)
    with few_rows.reading({id(weight): copy}):
        expected = few_rows.linear(x, weight)
        x[3, 5], x[4, 0] = torch.nan, torch.inf
        got = few_rows.linear(x, weight)
    others = [0, 1, 2, 5, 6, 7, 8]
    assert torch.equal(got[others], expected[others]) and got[3:5].isnan().all()


def test_packed_weights_of_other_sizes_are_refused():
    weight, x = drawn(0, 40, 24), drawn(1, 2, 24)
    (panels, scale), _ = copy_of(weight)
    for copy in (
        (panels[:1], scale),
        (panels, scale[:30]),
        (panels[:, :11], scale),
        (panels.flatten()[1:], scale),
        (panels.short(), scale),
        (panels, scale.double()),
    ):
        with (
            few_rows.reading({id(weight): copy}),
            pytest.raises(RuntimeError, match=r"few-row|packed weights are int8"),
        ):
            few_rows.linear(x, weight)
    with few_rows.reading({id(weight): (panels, scale)}), pytest.raises(RuntimeError, match="fit together"):
        few_rows.linear(x[:, :20].contiguous(), weight)
    both = few_rows.packed(torch.zeros(2, 48, 24, dtype=torch.int8)), torch.ones(2, 48)
    down = few_rows.packed(torch.zeros(2, 24, 20, dtype=torch.int8)), torch.ones(2, 24)  # of 20 hidden, not 24
    gate_up, other = torch.zeros(2, 48, 24), torch.zeros(2, 24, 24)
    with few_rows.reading({id(gate_up): both, id(other): down}), pytest.raises(RuntimeError, match="fit together"):
        few_rows.experts(x, torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1), gate_up, other)


PROGRAM = r"""
#include "packed.h"
#include <cstdio>
using namespace few_rows;
int main() {  // products of 1 to 9 rows of 37 inputs with 64 outputs, then a sum
  constexpr int64_t INPUTS = 37;
  std::vector<int8_t> panels(2 * panel_bytes(INPUTS));
  std::vector<float> x(9 * INPUTS);
  uint32_t state = 1;
  const auto draw = [&] { return (state = state * 1664525u + 1013904223u) >> 16; };
  for (auto& weight : panels) weight = static_cast<int8_t>(draw());
  for (float& value : x) value = static_cast<float>(draw()) / 4096.0f - 8.0f;
  for (int64_t rows = 1; rows <= 9; ++rows) {
    const RoundedRows rounded(x.data(), rows, INPUTS);
    multiply_panels(panels.data(), 0, 2, rounded.rows(), INPUTS, [&](int64_t panel, int64_t n, const float* products) {
      for (int64_t o = 0; o < PANEL; ++o) std::printf("%ld %ld %ld %a\n", (long)n, (long)panel, (long)o, products[o]);
    });
  }
  Floats registers[WIDTH];
  for (int64_t i = 0; i < WIDTH * WIDTH; ++i) registers[i / WIDTH][i % WIDTH] = static_cast<float>(i);
  const Floats sums = sum_each(registers);
  for (int64_t i = 0; i < WIDTH; ++i) {
    const float expected = static_cast<float>(i * WIDTH * WIDTH + WIDTH * (WIDTH - 1) / 2);
    if (sums[i] != expected) return 1;
  }
}
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="there are others of one kind only")
@pytest.mark.parametrize("processor", ["x86-64", "haswell"])
def test_another_processor_computes_the_same(tmp_path, processor):
    """By the instructions it has: of sums of whole numbers the order does not matter."""
    if processor == "haswell" and "AVX" not in torch.backends.cpu.get_cpu_capability():
        pytest.skip("this one has fewer")
    source, said = tmp_path / "program.cpp", []
    source.write_text(PROGRAM)
    includes = [Path(kernels.__file__).with_name("cpp"), Path(torch.__file__).parent / "include"]
    flags = [flag for flag in kernels._FLAGS if flag not in ("-O3", "-shared") and "march" not in flag]
    for march in ("native", processor):
        compiler = shutil.which("c++") or shutil.which("g++")
        command = [compiler, "-O1", f"-march={march}", *flags, *(f"-I{folder}" for folder in includes)]
        subprocess.run([*command, str(source), "-o", str(tmp_path / march)], check=True)
        said.append(subprocess.run([tmp_path / march], check=True, capture_output=True, text=True).stdout)
    assert said[0] == said[1] and said[0].count("\n") == 64 * sum(range(1, 10))
