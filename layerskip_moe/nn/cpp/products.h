// The two operators that read weights: one matrix for all rows, and the experts that rows have chosen.
//
// Knows nothing of the network. Next: states.h.

#pragma once

#include "program.h"

namespace few_rows {

// out[f] = silu(gate[f]) * up[f], the hidden ups after the hidden gates (arXiv 2002.05202).
inline void activate(const float* gates_and_ups, int64_t hidden, float* out) {
  std::copy(gates_and_ups, gates_and_ups + hidden, out);
  for_each(out, gates_and_ups + hidden, hidden, [](Floats gate, Floats up) { return gate / (1.0f + exp(-gate)) * up; });
}

// The same for rows of gates and ups.
inline void activate_rows(const float* gates_and_ups, int64_t rows, int64_t hidden, float* out) {
  torch::stable::parallel_for(0, rows, std::max<int64_t>(1, NUMBERS_PER_THREAD / hidden), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) activate(gates_and_ups + 2 * n * hidden, hidden, out + n * hidden);
  });
}

// Products of outputs from `first` on, by their scales where there are any.
template <class Count>
inline void give_some(Count count, const float* products, const Column& scales, int64_t first, float* out) {
  if (!scales.there()) std::memcpy(out, products, count.value * sizeof *out);
  for (int i = 0; scales.there() && i < count.value; ++i) out[i] = products[i] * scales[first + i];
}

inline void linear_into(
    const Tensor& y, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& scale, const std::optional<Tensor>& bias) {
  const int64_t rows = present_rows(x), inputs = x.size(1), outputs = weight.size(0);
  const Column scales(scale), biases(bias);
  const Reading floats(x);
  Writing products(y, rows * outputs);
  std::vector<const float*> x_rows(rows);
  for (int64_t n = 0; n < rows; ++n) x_rows[n] = floats.data() + n * inputs;
  with_weight_type(weight.scalar_type(), [&](auto type) {
    const auto* w = static_cast<decltype(type)>(weight.data_ptr());
    torch::stable::parallel_for(0, outputs, grain(inputs * sizeof *w), [&](int64_t begin, int64_t end) {
      multiply(w, begin, end, x_rows, inputs, [&](auto count, int64_t o, int64_t n, const float* some) {
        give_some(count, some, scales, o, products.data() + n * outputs + o);
        for (int i = 0; biases.there() && i < count.value; ++i) products[n * outputs + o + i] += biases[o + i];
      });
    });
  });
}

inline Tensor linear(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& scale, const std::optional<Tensor>& bias, bool wide) {
  check_dense(weight);
  check_sizes(x.dim() == 2 && weight.dim() == 2 && x.size(1) == weight.size(1));
  for (const auto& column : {scale, bias}) check_sizes(!column || column->numel() == weight.size(0));
  const ScalarType type = wide ? ScalarType::Float : x.scalar_type();
  Tensor y = torch::stable::new_empty(x, {x.size(0), weight.size(0)}, type);
  perform([=] { linear_into(y, x, weight, scale, bias); });
  return y;
}

// An expert, the pairs (of all N x top_k) that chose it, and their rows' inputs.
struct Needed {
  int64_t expert;
  std::vector<int64_t> pairs;
  std::vector<const float*> inputs;
};

// out[pair] = w[expert] . inputs of that pair, for experts' matrices w [E, outputs, inputs].
template <class Weight>
void multiply_needed(
    const Weight* w, const std::vector<Needed>& needed, int64_t outputs, int64_t inputs, const Column& scales, Numbers& out) {
  const int64_t n_needed = static_cast<int64_t>(needed.size());
  torch::stable::parallel_for(0, n_needed * outputs, grain(inputs * sizeof *w), [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end;) {
      const Needed& one = needed[unit / outputs];
      const int64_t first = unit % outputs, last = std::min(outputs, first + end - unit), row = one.expert * outputs;
      multiply(w + row * inputs, first, last, one.inputs, inputs, [&](auto count, int64_t o, int64_t n, const float* some) {
        give_some(count, some, scales, row + o, out.data() + one.pairs[n] * outputs + o);
      });
      unit += last - first;
    }
  });
}

inline void experts_into(
    const Tensor& y, const Tensor& x, const Tensor& chosen, const Tensor& weights, const Tensor& gate_up, const Tensor& down,
    const std::optional<Tensor>& gate_up_scale, const std::optional<Tensor>& down_scale) {
  const int64_t rows = present_rows(x), width = x.size(1), top_k = chosen.size(1), n_experts = gate_up.size(0);
  const int64_t hidden = down.size(2), pairs = rows * top_k;
  const Column gate_up_scales(gate_up_scale), down_scales(down_scale);
  const int64_t* choice = static_cast<const int64_t*>(chosen.data_ptr());
  const float* share = static_cast<const float*>(weights.data_ptr());
  const Reading floats(x);
  Numbers gates_and_ups(pairs * 2 * hidden), activation(pairs * hidden), result(pairs * width);

  for (int64_t pair = 0; pair < pairs; ++pair)
    STD_TORCH_CHECK(0 <= choice[pair] && choice[pair] < n_experts, "a chosen expert does not exist");
  std::vector<Needed> needed;
  for (int64_t expert = 0; expert < n_experts; ++expert) {
    Needed one{expert, {}, {}};
    for (int64_t pair = 0; pair < pairs; ++pair)
      if (choice[pair] == expert) one.pairs.push_back(pair);
    if (!one.pairs.empty()) needed.push_back(std::move(one));
  }

  with_weight_type(gate_up.scalar_type(), [&](auto type) {
    const auto* into = static_cast<decltype(type)>(gate_up.data_ptr());
    const auto* back = static_cast<decltype(type)>(down.data_ptr());
    for (Needed& one : needed)
      for (int64_t pair : one.pairs) one.inputs.push_back(floats.data() + pair / top_k * width);
    // Threads share out the outputs of all needed experts, first of gate_up and then of down, and read them as they lie:
    // going through gate and up side by side is slower, a fifth on the machine this was measured on.
    multiply_needed(into, needed, 2 * hidden, width, gate_up_scales, gates_and_ups);
    activate_rows(gates_and_ups.data(), pairs, hidden, activation.data());
    for (Needed& one : needed) {
      one.inputs.clear();
      for (int64_t pair : one.pairs) one.inputs.push_back(activation.data() + pair * hidden);
    }
    multiply_needed(back, needed, width, hidden, down_scales, result);
  });
  Writing total(y, rows * width);
  std::fill_n(total.data(), rows * width, 0.0f);
  for (int64_t pair = 0; pair < pairs; ++pair)  // a row's experts are added in the order of its choice
    for (int64_t d = 0; d < width; ++d) total[pair / top_k * width + d] += share[pair] * result[pair * width + d];
}

inline Tensor experts(
    const Tensor& x, const Tensor& chosen, const Tensor& weights, const Tensor& gate_up, const Tensor& down,
    const std::optional<Tensor>& gate_up_scale, const std::optional<Tensor>& down_scale) {
  check_dense(chosen, ScalarType::Long), check_dense(weights, ScalarType::Float), check_dense(gate_up), check_dense(down);
  STD_TORCH_CHECK(gate_up.scalar_type() == down.scalar_type(), "gate_up and down have one type");
  check_sizes(chosen.size(0) == x.size(0) && weights.numel() == chosen.numel() && gate_up.size(0) == down.size(0));
  check_sizes(x.size(1) == gate_up.size(2) && x.size(1) == down.size(1) && gate_up.size(1) == 2 * down.size(2));
  check_sizes(!gate_up_scale || gate_up_scale->numel() == gate_up.size(0) * gate_up.size(1));
  check_sizes(!down_scale || down_scale->numel() == down.size(0) * down.size(1));
  Tensor y = torch::stable::new_empty(x, x.sizes());
  perform([=] { experts_into(y, x, chosen, weights, gate_up, down, gate_up_scale, down_scale); });
  return y;
}

}  // namespace few_rows
