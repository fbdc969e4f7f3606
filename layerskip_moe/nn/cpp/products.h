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

// The products of a panel, by their scales: out [outputs]. (A count that is known makes vectors of the loop.)
inline void give_panel(const float* products, const float* scales, int64_t panel, int64_t outputs, float* out) {
  const int64_t first = panel * PANEL, count = std::min(PANEL, outputs - first);
  if (count == PANEL) for (int64_t i = 0; i < PANEL; ++i) out[first + i] = products[i] * scales[first + i];
  else for (int64_t i = 0; i < count; ++i) out[first + i] = products[i] * scales[first + i];
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

inline void check_packed(const Tensor& weight, const Tensor& scale, int64_t matrices, int64_t outputs, int64_t inputs) {
  check_dense(weight), check_dense(scale);
  STD_TORCH_CHECK(weight.scalar_type() == ScalarType::Char && scale.scalar_type() == ScalarType::Float, "packed weights are int8, their scales float32");
  check_sizes(weight.numel() == matrices * panels_of(outputs) * panel_bytes(inputs) && scale.numel() == matrices * outputs);
}

// The same of a packed weight [panels, pairs, 64], of as many outputs as there are scales.
inline void linear_packed_into(
    const Tensor& y, const Tensor& x, const Tensor& weight, const Tensor& scale, const std::optional<Tensor>& bias) {
  const int64_t rows = present_rows(x), inputs = x.size(1), outputs = scale.numel();
  const auto* panels = static_cast<const int8_t*>(weight.data_ptr());
  const float* scales = static_cast<const float*>(scale.data_ptr());
  const Column biases(bias);
  const Reading floats(x);
  Writing products(y, rows * outputs);
  const RoundedRows rounded(floats.data(), rows, inputs);
  torch::stable::parallel_for(0, panels_of(outputs), grain(panel_bytes(inputs)), [&](int64_t begin, int64_t end) {
    multiply_panels(panels, begin, end, rounded.rows(), inputs, [&](int64_t panel, int64_t n, const float* some) {
      float* out = products.data() + n * outputs;
      give_panel(some, scales, panel, outputs, out);
      for (int64_t o = panel * PANEL; biases.there() && o < std::min(outputs, (panel + 1) * PANEL); ++o) out[o] += biases[o];
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

inline Tensor linear_packed(const Tensor& x, const Tensor& weight, const Tensor& scale, const std::optional<Tensor>& bias, bool wide) {
  check_sizes(x.dim() == 2);
  check_packed(weight, scale, 1, scale.numel(), x.size(1));
  check_sizes(!bias || bias->numel() == scale.numel());
  Tensor y = torch::stable::new_empty(x, {x.size(0), scale.numel()}, wide ? ScalarType::Float : x.scalar_type());
  perform([=] { linear_packed_into(y, x, weight, scale, bias); });
  return y;
}

// An expert, and the pairs (of all N x top_k) that chose it.
struct Needed {
  int64_t expert;
  std::vector<int64_t> pairs;
};

inline std::vector<Needed> experts_needed(const int64_t* choice, int64_t pairs, int64_t n_experts) {
  for (int64_t pair = 0; pair < pairs; ++pair)
    STD_TORCH_CHECK(0 <= choice[pair] && choice[pair] < n_experts, "a chosen expert does not exist");
  std::vector<Needed> needed;
  for (int64_t expert = 0; expert < n_experts; ++expert) {
    Needed one{expert, {}};
    for (int64_t pair = 0; pair < pairs; ++pair)
      if (choice[pair] == expert) one.pairs.push_back(pair);
    if (!one.pairs.empty()) needed.push_back(std::move(one));
  }
  return needed;
}

// For the units of all needed experts' matrices, so many in each and shared among threads: work(expert, its rows, first
// unit, last), where row `pair / sharing` of x is what a pair takes.
template <class Row, class Work>
void for_needed(const std::vector<Needed>& needed, int64_t units, int64_t least, const std::vector<Row>& x, int64_t sharing, const Work& work) {
  std::vector<std::vector<Row>> x_of(needed.size());
  for (size_t i = 0; i < needed.size(); ++i)
    for (int64_t pair : needed[i].pairs) x_of[i].push_back(x[pair / sharing]);
  torch::stable::parallel_for(0, static_cast<int64_t>(needed.size()) * units, least, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end;) {
      const int64_t first = unit % units, last = std::min(units, first + end - unit);
      work(needed[unit / units], x_of[unit / units], first, last);
      unit += last - first;
    }
  });
}

// out[pair] = w[expert] . inputs of that pair, for experts' matrices w [E, outputs, inputs] and rows x of inputs, each of
// which so many pairs share.
template <class Weight>
void multiply_needed(
    const Weight* w, const Column& scales, const std::vector<Needed>& needed, int64_t outputs, int64_t inputs, const float* x,
    int64_t sharing, int64_t pairs, Numbers& out) {
  std::vector<const float*> rows;
  for (int64_t n = 0; n < pairs / sharing; ++n) rows.push_back(x + n * inputs);
  for_needed(needed, outputs, grain(inputs * sizeof *w), rows, sharing, [&](const Needed& one, const auto& x_of, int64_t first, int64_t last) {
    const int64_t row = one.expert * outputs;
    multiply(w + row * inputs, first, last, x_of, inputs, [&](auto count, int64_t o, int64_t n, const float* some) {
      give_some(count, some, scales, row + o, out.data() + one.pairs[n] * outputs + o);
    });
  });
}

// The same for packed matrices.
inline void multiply_needed_packed(
    const Tensor& w, const Tensor& scale, const std::vector<Needed>& needed, int64_t outputs, int64_t inputs, const float* x,
    int64_t sharing, int64_t pairs, Numbers& out) {
  const auto* panels = static_cast<const int8_t*>(w.data_ptr());
  const float* scales = static_cast<const float*>(scale.data_ptr());
  const int64_t units = panels_of(outputs);
  const RoundedRows rounded(x, pairs / sharing, inputs);
  for_needed(needed, units, grain(panel_bytes(inputs)), rounded.rows(), sharing, [&](const Needed& one, const auto& x_of, int64_t first, int64_t last) {
    multiply_panels(panels + one.expert * units * panel_bytes(inputs), first, last, x_of, inputs, [&](int64_t panel, int64_t n, const float* some) {
      give_panel(some, scales + one.expert * outputs, panel, outputs, out.data() + one.pairs[n] * outputs);
    });
  });
}

// into and back are the two products: by all that follows the scales in `multiply_needed`.
template <class Into, class Back>
void experts_into(
    const Tensor& y, const Tensor& x, const Tensor& chosen, const Tensor& weights, int64_t n_experts, int64_t hidden, const Into& into,
    const Back& back) {
  const int64_t rows = present_rows(x), width = x.size(1), top_k = chosen.size(1), pairs = rows * top_k;
  const float* share = static_cast<const float*>(weights.data_ptr());
  const Reading floats(x);
  Numbers gates_and_ups(pairs * 2 * hidden), activation(pairs * hidden), result(pairs * width);
  const std::vector<Needed> needed = experts_needed(static_cast<const int64_t*>(chosen.data_ptr()), pairs, n_experts);
  // Threads share out the outputs of all needed experts, first of gate_up and then of down, and read them as they lie:
  // going through gate and up side by side is slower, a fifth on the machine this was measured on.
  into(needed, 2 * hidden, width, floats.data(), top_k, pairs, gates_and_ups);
  activate_rows(gates_and_ups.data(), pairs, hidden, activation.data());
  back(needed, width, hidden, activation.data(), 1, pairs, result);
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
  const int64_t n_experts = gate_up.size(0), hidden = down.size(2);
  perform([=] {
    const Column gate_up_scales(gate_up_scale), down_scales(down_scale);
    with_weight_type(gate_up.scalar_type(), [&](auto type) {
      const auto* up = static_cast<decltype(type)>(gate_up.data_ptr());
      const auto* back = static_cast<decltype(type)>(down.data_ptr());
      experts_into(
          y, x, chosen, weights, n_experts, hidden, [&](auto&&... rest) { multiply_needed(up, gate_up_scales, rest...); },
          [&](auto&&... rest) { multiply_needed(back, down_scales, rest...); });
    });
  });
  return y;
}

// The same of packed matrices [E, panels, pairs, 64]; scales [E, outputs].
inline Tensor experts_packed(
    const Tensor& x, const Tensor& chosen, const Tensor& weights, const Tensor& gate_up, const Tensor& down, const Tensor& gate_up_scale,
    const Tensor& down_scale) {
  check_sizes(x.dim() == 2 && chosen.dim() == 2 && gate_up.size(0) > 0);
  const int64_t n_experts = gate_up.size(0), width = x.size(1), hidden = gate_up_scale.numel() / n_experts / 2;
  check_dense(chosen, ScalarType::Long), check_dense(weights, ScalarType::Float);
  check_sizes(chosen.size(0) == x.size(0) && weights.numel() == chosen.numel());
  check_packed(gate_up, gate_up_scale, n_experts, 2 * hidden, width), check_packed(down, down_scale, n_experts, width, hidden);
  Tensor y = torch::stable::new_empty(x, x.sizes());
  perform([=] {
    experts_into(
        y, x, chosen, weights, n_experts, hidden, [&](auto&&... rest) { multiply_needed_packed(gate_up, gate_up_scale, rest...); },
        [&](auto&&... rest) { multiply_needed_packed(down, down_scale, rest...); });
  });
  return y;
}

}  // namespace few_rows
