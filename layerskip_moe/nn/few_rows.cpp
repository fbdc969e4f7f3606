// Products of few rows with many weights, on a CPU: what decoding, drafting and verification spend their time on.
//
// One row at a time a product is as fast as its weights can be read, and that is what this file is written for: every
// weight is read once, whatever the number of rows, and an expert once for all the rows that chose it. A row's result
// has a fixed order of summation, so it is bit for bit the same beside any number of other rows.
//
// N rows, K inputs, O outputs, D width, F expert hidden size, E experts, H query heads, G key-value heads, C slots.
// Weights and states may be float32, bfloat16 or float16, weights also int8 with a scale per output row; sums are
// float32. Knows nothing of the network. Next: few_rows.py, which compiles this file and says what each function is.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#if defined(__AVX__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Numbers at a time: one register's worth, for what vectors wider than a register become is slow.
#if defined(__AVX512F__)
constexpr int64_t WIDTH = 16;
#elif defined(__AVX__)
constexpr int64_t WIDTH = 8;
#else
constexpr int64_t WIDTH = 4;
#endif
using Floats = float __attribute__((vector_size(4 * WIDTH)));
using Words = uint32_t __attribute__((vector_size(4 * WIDTH)));
using Integers = int32_t __attribute__((vector_size(4 * WIDTH)));

struct BFloat16 {
  uint16_t bits;
};

template <class Value, class Number>
Value copy_from(const Number* from) {
  Value value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

// Written as loops, which compilers turn into the one instruction that widens; __builtin_convertvector is taken apart.
template <class Vector, class Number>
Vector widen(const Number* from) {
  Vector wide;
  for (int64_t i = 0; i < WIDTH; ++i) wide[i] = from[i];
  return wide;
}

inline Floats load(const float* from) { return copy_from<Floats>(from); }
inline Floats load(const _Float16* from) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(copy_from<__m256i>(from));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(copy_from<__m128i>(from));
#else
  return widen<Floats>(from);
#endif
}
inline Floats load(const int8_t* from) { return __builtin_convertvector(widen<Integers>(from), Floats); }
inline Floats load(const BFloat16* from) {
  const Words words = widen<Words>(reinterpret_cast<const uint16_t*>(from)) << 16;
  return copy_from<Floats>(&words);
}

inline float number(float value) { return value; }
inline float number(_Float16 value) { return static_cast<float>(value); }
inline float number(int8_t value) { return static_cast<float>(value); }
inline float number(BFloat16 value) {
  const uint32_t word = static_cast<uint32_t>(value.bits) << 16;
  return copy_from<float>(&word);
}

inline void store(float value, float* to) { *to = value; }
inline void store(float value, _Float16* to) { *to = static_cast<_Float16>(value); }
inline void store(float value, BFloat16* to) {
  const uint32_t word = copy_from<uint32_t>(&value);  // to the nearest, ties to even, as torch rounds
  to->bits = std::isnan(value) ? 0x7fc0 : static_cast<uint16_t>((word + 0x7fff + ((word >> 16) & 1)) >> 16);
}

inline float sum(Floats values) {
  float parts[WIDTH];
  std::memcpy(parts, &values, sizeof parts);
  for (int64_t half = WIDTH / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) parts[i] += parts[i + half];
  return parts[0];
}

constexpr int CHAINS = 4;        // sums that do not wait for one another
constexpr int ROWS_AT_ONCE = 2;  // of AVX2's 16 registers, 8 hold their sums

// out[n] = w . x[n] for ROWS rows of x: the order of summation within a row does not depend on ROWS.
template <int ROWS, class Weight>
inline void dot(const Weight* w, const float* const* x, int64_t inputs, float* out) {
  Floats sums[ROWS][CHAINS] = {};
  int64_t k = 0;
  for (; k + CHAINS * WIDTH <= inputs; k += CHAINS * WIDTH)
    for (int c = 0; c < CHAINS; ++c) {
      const Floats weights = load(w + k + c * WIDTH);
      for (int n = 0; n < ROWS; ++n) sums[n][c] += weights * load(x[n] + k + c * WIDTH);
    }
  for (int n = 0; n < ROWS; ++n) {
    for (int c = 1; c < CHAINS; ++c) sums[n][0] += sums[n][c];
    float total = sum(sums[n][0]);
    for (int64_t rest = k; rest < inputs; ++rest) total += number(w[rest]) * x[n][rest];
    out[n] = total;
  }
}


template <class Weight>
inline void dots(const Weight* w, const std::vector<const float*>& x, int64_t inputs, float* out) {
  const int64_t rows = static_cast<int64_t>(x.size());
  int64_t n = 0;
  for (; n + ROWS_AT_ONCE <= rows; n += ROWS_AT_ONCE) dot<ROWS_AT_ONCE>(w, &x[n], inputs, out + n);
  for (; n < rows; ++n) dot<1>(w, &x[n], inputs, out + n);
}

template <class Function>
void with_float_type(ScalarType type, const Function& function) {
  if (type == ScalarType::Float) return function(static_cast<float*>(nullptr));
  if (type == ScalarType::Half) return function(static_cast<_Float16*>(nullptr));
  STD_TORCH_CHECK(type == ScalarType::BFloat16, "few-row products take float32, bfloat16 and float16");
  function(static_cast<BFloat16*>(nullptr));
}

template <class Function>
void with_weight_type(ScalarType type, const Function& function) {
  if (type == ScalarType::Char) return function(static_cast<int8_t*>(nullptr));
  with_float_type(type, function);
}

void check_dense(const Tensor& tensor) { STD_TORCH_CHECK(tensor.is_contiguous(), "few-row products take contiguous tensors"); }

// x [rows, ...] in float32. Rows may lie apart, as those of a part of a projection do; what is within a row lies together.
std::vector<float> as_floats(const Tensor& x) {
  int64_t per_row = 1;
  for (int64_t dim = x.dim() - 1; dim > 0; --dim) {
    STD_TORCH_CHECK(x.size(dim) == 1 || x.stride(dim) == per_row, "few-row products take rows that lie together");
    per_row *= x.size(dim);
  }
  const int64_t rows = x.size(0), apart = x.stride(0);
  std::vector<float> floats(rows * per_row);
  with_float_type(x.scalar_type(), [&](auto type) {
    const auto* from = static_cast<decltype(type)>(x.data_ptr());
    for (int64_t n = 0; n < rows; ++n)
      for (int64_t i = 0; i < per_row; ++i) floats[n * per_row + i] = number(from[n * apart + i]);
  });
  return floats;
}

// Write numbers into a tensor of their count.
void give(const std::vector<float>& floats, const Tensor& y) {
  with_float_type(y.scalar_type(), [&](auto type) {
    auto* to = static_cast<decltype(type)>(y.data_ptr());
    for (size_t i = 0; i < floats.size(); ++i) store(floats[i], to + i);
  });
}

// What an operator does, once its result has been allocated, can be recorded and done again: on what its tensors hold
// by then. Calling thirty operators a layer from Python takes longer than a small layer's products do.
struct Program {
  std::vector<Tensor> inputs, outputs;
  std::vector<std::function<void()>> steps;
};
std::map<int64_t, Program> programs;
thread_local Program* recording = nullptr;

void perform(std::function<void()> step) {
  step();
  if (recording != nullptr) recording->steps.push_back(std::move(step));
}

// Scales or biases of output rows, one by one: there may be none.
struct Column {
  const void* data = nullptr;
  ScalarType type = ScalarType::Float;
  float missing = 0;

  Column(const std::optional<Tensor>& tensor, float missing) : missing(missing) {
    if (tensor) data = tensor->data_ptr(), type = tensor->scalar_type();
  }
  float operator[](int64_t i) const {
    if (data == nullptr) return missing;
    if (type == ScalarType::Float) return static_cast<const float*>(data)[i];
    if (type == ScalarType::Half) return number(static_cast<const _Float16*>(data)[i]);
    return number(static_cast<const BFloat16*>(data)[i]);
  }
};

// Work is split among threads when each gets at least so many bytes: less is done sooner than another one wakes.
constexpr int64_t BYTES_PER_THREAD = 1 << 15;

int64_t grain(int64_t bytes_per_unit) { return std::max<int64_t>(1, BYTES_PER_THREAD / std::max<int64_t>(1, bytes_per_unit)); }

void linear_into(
    const Tensor& y, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& scale, const std::optional<Tensor>& bias) {
  const int64_t rows = x.size(0), inputs = x.size(1), outputs = weight.size(0);
  const Column scales(scale, 1.0f), biases(bias, 0.0f);
  const std::vector<float> floats = as_floats(x);
  std::vector<const float*> x_rows(rows);
  for (int64_t n = 0; n < rows; ++n) x_rows[n] = floats.data() + n * inputs;
  std::vector<float> products_of_all(rows * outputs);
  with_weight_type(weight.scalar_type(), [&](auto type) {
    const auto* w = static_cast<decltype(type)>(weight.data_ptr());
    torch::stable::parallel_for(0, outputs, grain(inputs * sizeof *w), [&](int64_t begin, int64_t end) {
      std::vector<float> products(rows);
      for (int64_t o = begin; o < end; ++o) {
        dots(w + o * inputs, x_rows, inputs, products.data());
        for (int64_t n = 0; n < rows; ++n) products_of_all[n * outputs + o] = products[n] * scales[o] + biases[o];
      }
    });
  });
  give(products_of_all, y);
}

Tensor linear(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& scale, const std::optional<Tensor>& bias, bool wide) {
  check_dense(weight);
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

void experts_into(
    const Tensor& y, const Tensor& x, const Tensor& chosen, const Tensor& weights, const Tensor& gate_up, const Tensor& down,
    const std::optional<Tensor>& gate_up_scale, const std::optional<Tensor>& down_scale) {
  const int64_t rows = x.size(0), width = x.size(1), top_k = chosen.size(1), n_experts = gate_up.size(0);
  const int64_t hidden = down.size(2), pairs = rows * top_k;
  const Column gate_up_scales(gate_up_scale, 1.0f), down_scales(down_scale, 1.0f);
  const int64_t* choice = static_cast<const int64_t*>(chosen.data_ptr());
  const float* share = static_cast<const float*>(weights.data_ptr());
  const std::vector<float> floats = as_floats(x);
  std::vector<float> gates_and_ups(pairs * 2 * hidden), activation(pairs * hidden), result(pairs * width), total(rows * width);

  std::vector<Needed> needed;
  for (int64_t expert = 0; expert < n_experts; ++expert) {
    Needed one{expert, {}, {}};
    for (int64_t pair = 0; pair < pairs; ++pair)
      if (choice[pair] == expert) one.pairs.push_back(pair);
    if (!one.pairs.empty()) needed.push_back(std::move(one));
  }
  const int64_t n_needed = static_cast<int64_t>(needed.size());

  with_weight_type(gate_up.scalar_type(), [&](auto type) {
    const auto* into = static_cast<decltype(type)>(gate_up.data_ptr());
    const auto* back = static_cast<decltype(type)>(down.data_ptr());
    for (Needed& one : needed)
      for (int64_t pair : one.pairs) one.inputs.push_back(floats.data() + pair / top_k * width);
    // Threads share out the rows of all needed experts, first of gate_up and then of down, and read them as they lie:
    // going through gate and up side by side is slower, a fifth on the machine this was measured on.
    torch::stable::parallel_for(0, n_needed * 2 * hidden, grain(width * sizeof *into), [&](int64_t begin, int64_t end) {
      std::vector<float> products(pairs);
      for (int64_t unit = begin; unit < end; ++unit) {
        const Needed& one = needed[unit / (2 * hidden)];
        const int64_t f = unit % (2 * hidden), row = one.expert * 2 * hidden + f;
        dots(into + row * width, one.inputs, width, products.data());
        for (size_t i = 0; i < one.pairs.size(); ++i)
          gates_and_ups[one.pairs[i] * 2 * hidden + f] = products[i] * gate_up_scales[row];
      }
    });
    torch::stable::parallel_for(0, pairs, grain(hidden * 32), [&](int64_t begin, int64_t end) {  // an exp is like 32 bytes
      for (int64_t pair = begin; pair < end; ++pair)
        for (int64_t f = 0; f < hidden; ++f) {
          const float gate = gates_and_ups[pair * 2 * hidden + f], up = gates_and_ups[(pair * 2 + 1) * hidden + f];
          activation[pair * hidden + f] = gate / (1.0f + std::exp(-gate)) * up;
        }
    });
    for (Needed& one : needed) {
      one.inputs.clear();
      for (int64_t pair : one.pairs) one.inputs.push_back(activation.data() + pair * hidden);
    }
    torch::stable::parallel_for(0, n_needed * width, grain(hidden * sizeof *back), [&](int64_t begin, int64_t end) {
      std::vector<float> products(pairs);
      for (int64_t unit = begin; unit < end; ++unit) {
        const Needed& one = needed[unit / width];
        const int64_t d = unit % width, row = one.expert * width + d;
        dots(back + row * hidden, one.inputs, hidden, products.data());
        for (size_t i = 0; i < one.pairs.size(); ++i) result[one.pairs[i] * width + d] = products[i] * down_scales[row];
      }
    });
  });
  for (int64_t pair = 0; pair < pairs; ++pair)  // a row's experts are added in the order of its choice
    for (int64_t d = 0; d < width; ++d) total[pair / top_k * width + d] += share[pair] * result[pair * width + d];
  give(total, y);
}

Tensor experts(
    const Tensor& x, const Tensor& chosen, const Tensor& weights, const Tensor& gate_up, const Tensor& down,
    const std::optional<Tensor>& gate_up_scale, const std::optional<Tensor>& down_scale) {
  for (const Tensor* tensor : {&chosen, &weights, &gate_up, &down}) check_dense(*tensor);
  STD_TORCH_CHECK(gate_up.scalar_type() == down.scalar_type(), "gate_up and down have one type");
  Tensor y = torch::stable::new_empty(x, x.sizes());
  perform([=] { experts_into(y, x, chosen, weights, gate_up, down, gate_up_scale, down_scale); });
  return y;
}

Tensor norm(const Tensor& x, const Tensor& weight, double epsilon) {
  Tensor y = torch::stable::new_empty(x, x.sizes());
  perform([=] {
    const int64_t width = weight.numel();
    const std::vector<float> weights = as_floats(weight);
    std::vector<float> floats = as_floats(x);
    for (float* part = floats.data(); part < floats.data() + floats.size(); part += width) {
      const float* values = part;
      float squares;
      dot<1>(values, &values, width, &squares);
      const float scale = 1.0f / std::sqrt(squares / static_cast<float>(width) + static_cast<float>(epsilon));
      for (int64_t d = 0; d < width; ++d) part[d] *= scale * weights[d];
    }
    give(floats, y);
  });
  return y;
}

Tensor rotate(const Tensor& x, const Tensor& cos, const Tensor& sin, const Tensor& positions) {
  check_dense(cos), check_dense(sin), check_dense(positions);
  Tensor y = torch::stable::new_empty(x, x.sizes());
  perform([=] {
    const int64_t rows = x.size(0), heads = x.size(1), head_dim = x.size(2), half = head_dim / 2;
    const int64_t* position = static_cast<const int64_t*>(positions.data_ptr());
    std::vector<float> floats = as_floats(x);
    for (int64_t n = 0; n < rows; ++n) {
      STD_TORCH_CHECK(0 <= position[n] && position[n] < cos.size(0), "a position has no angle");
      const float* c = static_cast<const float*>(cos.data_ptr()) + position[n] * head_dim;
      const float* s = static_cast<const float*>(sin.data_ptr()) + position[n] * head_dim;
      for (float* head = floats.data() + n * heads * head_dim; head < floats.data() + (n + 1) * heads * head_dim; head += head_dim)
        for (int64_t d = 0; d < half; ++d) {
          const float first = head[d], second = head[d + half];
          head[d] = first * c[d] - second * s[d];
          head[d + half] = second * c[d + half] + first * s[d + half];
        }
    }
    give(floats, y);
  });
  return y;
}

Tensor add(const Tensor& x, const Tensor& y) {
  Tensor total = torch::stable::new_empty(x, x.sizes());
  perform([=] {
    std::vector<float> floats = as_floats(x);
    const std::vector<float> others = as_floats(y);
    for (size_t i = 0; i < floats.size(); ++i) floats[i] += others[i];
    give(floats, total);
  });
  return total;
}

Tensor swiglu(const Tensor& gate_up) {
  Tensor y = torch::stable::new_empty(gate_up, {gate_up.size(0), gate_up.size(1) / 2});
  perform([=] {
    const int64_t rows = gate_up.size(0), hidden = gate_up.size(1) / 2;
    const std::vector<float> floats = as_floats(gate_up);
    std::vector<float> activation(rows * hidden);
    for (int64_t n = 0; n < rows; ++n)
      for (int64_t f = 0; f < hidden; ++f) {
        const float gate = floats[2 * n * hidden + f], up = floats[(2 * n + 1) * hidden + f];
        activation[n * hidden + f] = gate / (1.0f + std::exp(-gate)) * up;
      }
    give(activation, y);
  });
  return y;
}

Tensor gate(const Tensor& x, const Tensor& logits) {
  Tensor y = torch::stable::new_empty(x, x.sizes());
  perform([=] {
    std::vector<float> floats = as_floats(x);
    const std::vector<float> gates = as_floats(logits);
    for (size_t i = 0; i < floats.size(); ++i) floats[i] /= 1.0f + std::exp(-gates[i / (floats.size() / gates.size())]);
    give(floats, y);
  });
  return y;
}

std::tuple<Tensor, Tensor> route(const Tensor& logits, const std::optional<Tensor>& bias, int64_t top_k, bool normalize) {
  check_dense(logits);
  STD_TORCH_CHECK(logits.scalar_type() == ScalarType::Float, "routers have float32 logits");
  Tensor chosen = torch::stable::new_empty(logits, {logits.size(0), top_k}, ScalarType::Long);
  Tensor weights = torch::stable::new_empty(logits, {logits.size(0), top_k});
  perform([=] {
    const int64_t rows = logits.size(0), n_experts = logits.size(1);
    const Column biases(bias, 0.0f);
    std::vector<float> probabilities(n_experts), scores(n_experts);
    for (int64_t n = 0; n < rows; ++n) {
      const float* logit = static_cast<const float*>(logits.data_ptr()) + n * n_experts;
      int64_t* choice = static_cast<int64_t*>(chosen.data_ptr()) + n * top_k;
      float* weight = static_cast<float*>(weights.data_ptr()) + n * top_k;
      const float largest = *std::max_element(logit, logit + n_experts);
      float total = 0;
      for (int64_t e = 0; e < n_experts; ++e) total += probabilities[e] = std::exp(logit[e] - largest);
      for (int64_t e = 0; e < n_experts; ++e) {
        probabilities[e] /= total;
        // An inactive expert's probability is 0, and a bias must not bring it back.
        scores[e] = std::isinf(logit[e]) ? -1e30f : probabilities[e] + biases[e];
      }
      total = 0;
      for (int64_t k = 0; k < top_k; ++k) {
        choice[k] = std::max_element(scores.begin(), scores.end()) - scores.begin();
        scores[choice[k]] = -2e30f;
        total += weight[k] = probabilities[choice[k]];
      }
      for (int64_t k = 0; normalize && k < top_k; ++k) weight[k] /= total;
    }
  });
  return {chosen, weights};
}

// out[d] = sum over s of weight[s] * values[s][d]; values lie `apart` numbers from one another.
template <class Cached>
void mix(const Cached* values, int64_t apart, const float* weight, int64_t length, int64_t head_dim, float* out) {
  int64_t d = 0;
  for (; d + CHAINS * WIDTH <= head_dim; d += CHAINS * WIDTH) {
    Floats sums[CHAINS] = {};
    for (int64_t s = 0; s < length; ++s)
      for (int c = 0; c < CHAINS; ++c) sums[c] += weight[s] * load(values + s * apart + d + c * WIDTH);
    std::memcpy(out + d, sums, sizeof sums);
  }
  for (; d < head_dim; ++d) {
    float total = 0;
    for (int64_t s = 0; s < length; ++s) total += weight[s] * number(values[s * apart + d]);
    out[d] = total;
  }
}

void attend_into(
    const Tensor& mixed_heads, const Tensor& queries, const Tensor& new_keys, const Tensor& new_values, const Tensor& keys, const Tensor& values,
    const Tensor& rows, const Tensor& positions, int64_t window, double scale) {
  const int64_t n_queries = queries.size(0), heads = queries.size(1), head_dim = queries.size(2);
  const int64_t capacity = keys.size(1), groups = keys.size(2), per_group = heads / groups, slot = groups * head_dim;
  const int64_t* row = static_cast<const int64_t*>(rows.data_ptr());
  const int64_t* position = static_cast<const int64_t*>(positions.data_ptr());
  int64_t longest = 0;
  for (int64_t n = 0; n < n_queries; ++n) {
    STD_TORCH_CHECK(0 <= position[n] && position[n] < capacity, "a position lies outside the cache");
    STD_TORCH_CHECK(0 <= row[n] && row[n] < keys.size(0), "a row lies outside the cache");
    longest = std::max(longest, window > 0 ? std::min(position[n] + 1, window) : position[n] + 1);
  }
  const std::vector<float> query = as_floats(queries);
  std::vector<float> y(n_queries * heads * head_dim);

  with_float_type(keys.scalar_type(), [&](auto type) {
    auto* all_keys = static_cast<decltype(type)>(keys.data_ptr());
    auto* all_values = static_cast<decltype(type)>(values.data_ptr());
    for (const auto& [cached, added] : {std::pair{all_keys, as_floats(new_keys)}, std::pair{all_values, as_floats(new_values)}})
      for (int64_t n = 0; n < n_queries; ++n)
        for (int64_t i = 0; i < slot; ++i)
          store(added[n * slot + i], cached + (row[n] * capacity + position[n]) * slot + i);

    const int64_t bytes = 2 * longest * head_dim * static_cast<int64_t>(sizeof *all_keys);
    torch::stable::parallel_for(0, n_queries * groups, grain(bytes), [&](int64_t begin, int64_t end) {
      std::vector<float> scores(per_group * longest), products(per_group);
      std::vector<const float*> query_rows(per_group);
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t n = unit / groups, head = unit * per_group;
        const int64_t last = position[n] + 1, first = window > 0 ? std::max<int64_t>(0, last - window) : 0;
        const int64_t length = last - first, start = (row[n] * capacity + first) * slot + unit % groups * head_dim;
        for (int64_t h = 0; h < per_group; ++h) query_rows[h] = query.data() + (head + h) * head_dim;
        for (int64_t s = 0; s < length; ++s) {
          dots(all_keys + start + s * slot, query_rows, head_dim, products.data());
          for (int64_t h = 0; h < per_group; ++h) scores[h * length + s] = products[h] * static_cast<float>(scale);
        }
        for (int64_t h = 0; h < per_group; ++h) {
          float *weight = scores.data() + h * length, *mixed = y.data() + (head + h) * head_dim, total = 0;
          const float largest = *std::max_element(weight, weight + length);
          for (int64_t s = 0; s < length; ++s) total += weight[s] = std::exp(weight[s] - largest);
          mix(all_values + start, slot, weight, length, head_dim, mixed);
          for (int64_t d = 0; d < head_dim; ++d) mixed[d] /= total;
        }
      }
    });
  });
  give(y, mixed_heads);
}

Tensor attend(
    const Tensor& queries, const Tensor& new_keys, const Tensor& new_values, const Tensor& keys, const Tensor& values,
    const Tensor& rows, const Tensor& positions, int64_t window, double scale) {
  for (const Tensor* tensor : {&keys, &values, &rows, &positions}) check_dense(*tensor);
  Tensor y = torch::stable::new_empty(queries, {queries.size(0), queries.size(1) * queries.size(2)});
  perform([=] { attend_into(y, queries, new_keys, new_values, keys, values, rows, positions, window, scale); });
  return y;
}

// Ask for pages of 2 MiB under a tensor: with the usual 4 KiB, finding pages slows reading down by a quarter.
int64_t use_huge_pages(const Tensor& tensor) {
#if defined(__linux__)
  constexpr uintptr_t PAGE = 2 << 20;
  constexpr int COLLAPSE = 25;  // MADV_COLLAPSE, since Linux 6.1; older ones refuse, which does no harm
  const uintptr_t start = reinterpret_cast<uintptr_t>(tensor.data_ptr());
  const uintptr_t end = start + tensor.numel() * tensor.element_size();
  const uintptr_t first = (start + PAGE - 1) / PAGE * PAGE, last = end / PAGE * PAGE;
  if (first < last) return madvise(reinterpret_cast<void*>(first), last - first, COLLAPSE);
#endif
  return 0;
}

int64_t record(std::vector<Tensor> inputs) {
  static int64_t count = 0;
  STD_TORCH_CHECK(recording == nullptr, "a recording is under way");
  recording = &programs[++count];
  recording->inputs = std::move(inputs);
  return count;
}

int64_t recorded(std::vector<Tensor> outputs) {
  STD_TORCH_CHECK(recording != nullptr, "no recording is under way");
  recording->outputs = std::move(outputs);
  recording = nullptr;
  return 0;
}

int64_t forget(int64_t program) { return static_cast<int64_t>(programs.erase(program)); }

std::vector<Tensor> replay(int64_t number, std::vector<Tensor> inputs) {
  Program& program = programs.at(number);
  for (size_t i = 0; i < inputs.size(); ++i) {
    check_dense(inputs[i]);
    STD_TORCH_CHECK(inputs[i].numel() == program.inputs[i].numel(), "a recording takes inputs of the recorded sizes");
    std::memcpy(program.inputs[i].data_ptr(), inputs[i].data_ptr(), inputs[i].numel() * inputs[i].element_size());
  }
  for (const auto& step : program.steps) step();
  std::vector<Tensor> results;
  for (const Tensor& output : program.outputs) results.push_back(torch::stable::clone(output));
  return results;
}

}  // namespace

STABLE_TORCH_LIBRARY(layerskip_moe, library) {
  library.def("linear(Tensor x, Tensor weight, Tensor? scale, Tensor? bias, bool wide) -> Tensor");
  library.def(
      "experts(Tensor x, Tensor chosen, Tensor weights, Tensor gate_up, Tensor down, Tensor? gate_up_scale, "
      "Tensor? down_scale) -> Tensor");
  library.def("norm(Tensor x, Tensor weight, float epsilon) -> Tensor");
  library.def("rotate(Tensor x, Tensor cos, Tensor sin, Tensor positions) -> Tensor");
  library.def("add(Tensor x, Tensor y) -> Tensor");
  library.def("swiglu(Tensor gate_up) -> Tensor");
  library.def("gate(Tensor x, Tensor logits) -> Tensor");
  library.def("route(Tensor logits, Tensor? bias, int top_k, bool normalize) -> (Tensor, Tensor)");
  library.def(
      "attend(Tensor queries, Tensor new_keys, Tensor new_values, Tensor(a!) keys, Tensor(b!) values, Tensor rows, "
      "Tensor positions, int window, float scale) -> Tensor");
  library.def("use_huge_pages(Tensor tensor) -> int");
  library.def("record(Tensor[] inputs) -> int");
  library.def("recorded(Tensor[] outputs) -> int");
  library.def("replay(int program, Tensor[] inputs) -> Tensor[]");
  library.def("forget(int program) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(layerskip_moe, CPU, library) {
  library.impl("linear", TORCH_BOX(&linear));
  library.impl("experts", TORCH_BOX(&experts));
  library.impl("norm", TORCH_BOX(&norm));
  library.impl("rotate", TORCH_BOX(&rotate));
  library.impl("add", TORCH_BOX(&add));
  library.impl("swiglu", TORCH_BOX(&swiglu));
  library.impl("gate", TORCH_BOX(&gate));
  library.impl("route", TORCH_BOX(&route));
  library.impl("attend", TORCH_BOX(&attend));
  library.impl("use_huge_pages", TORCH_BOX(&use_huge_pages));
  library.impl("record", TORCH_BOX(&record));
  library.impl("recorded", TORCH_BOX(&recorded));
  library.impl("replay", TORCH_BOX(&replay));
}

STABLE_TORCH_LIBRARY_IMPL(layerskip_moe, CompositeExplicitAutograd, library) { library.impl("forget", TORCH_BOX(&forget)); }
