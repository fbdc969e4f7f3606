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
#include <optional>
#include <vector>

#if defined(__AVX__)
#include <immintrin.h>
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
  float total = 0;
  for (int64_t i = 0; i < WIDTH; ++i) total += values[i];
  return total;
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

template <class Number>
std::vector<float> as_floats(const Number* from, int64_t count) {
  std::vector<float> floats(count);
  for (int64_t i = 0; i < count; ++i) floats[i] = number(from[i]);
  return floats;
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

template <class Function>
void with_float_type(ScalarType type, const Function& function) {
  if (type == ScalarType::Float) return function(static_cast<const float*>(nullptr));
  if (type == ScalarType::Half) return function(static_cast<const _Float16*>(nullptr));
  STD_TORCH_CHECK(type == ScalarType::BFloat16, "few-row products take float32, bfloat16 and float16");
  function(static_cast<const BFloat16*>(nullptr));
}

template <class Function>
void with_weight_type(ScalarType type, const Function& function) {
  if (type == ScalarType::Char) return function(static_cast<const int8_t*>(nullptr));
  with_float_type(type, function);
}

template <class Number>
using Value = std::remove_const_t<std::remove_pointer_t<Number>>;

void check_dense(const Tensor& tensor) { STD_TORCH_CHECK(tensor.is_contiguous(), "few-row products take contiguous tensors"); }

Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& scale, const std::optional<Tensor>& bias) {
  check_dense(x), check_dense(weight);
  const int64_t rows = x.size(0), inputs = x.size(1), outputs = weight.size(0);
  Tensor y = torch::stable::new_empty(x, {rows, outputs});
  const Column scales(scale, 1.0f), biases(bias, 0.0f);
  with_float_type(x.scalar_type(), [&](auto state) {
    using State = Value<decltype(state)>;
    const std::vector<float> floats = as_floats(static_cast<const State*>(x.data_ptr()), rows * inputs);
    std::vector<const float*> x_rows(rows);
    for (int64_t n = 0; n < rows; ++n) x_rows[n] = floats.data() + n * inputs;
    State* out = static_cast<State*>(y.data_ptr());
    with_weight_type(weight.scalar_type(), [&](auto type) {
      using Weight = Value<decltype(type)>;
      const Weight* w = static_cast<const Weight*>(weight.data_ptr());
      torch::stable::parallel_for(0, outputs, grain(inputs * sizeof(Weight)), [&](int64_t begin, int64_t end) {
        std::vector<float> products(rows);
        for (int64_t o = begin; o < end; ++o) {
          dots(w + o * inputs, x_rows, inputs, products.data());
          for (int64_t n = 0; n < rows; ++n) store(products[n] * scales[o] + biases[o], out + n * outputs + o);
        }
      });
    });
  });
  return y;
}

// The rows that chose an expert, and where among all N x top_k pairs each of them stands.
struct Chosen {
  int64_t expert;
  std::vector<int64_t> pairs;
  std::vector<const float*> inputs;
};

Tensor experts(
    const Tensor& x, const Tensor& chosen, const Tensor& weights, const Tensor& gate_up, const Tensor& down,
    const std::optional<Tensor>& gate_up_scale, const std::optional<Tensor>& down_scale) {
  for (const Tensor* tensor : {&x, &chosen, &weights, &gate_up, &down}) check_dense(*tensor);
  STD_TORCH_CHECK(gate_up.scalar_type() == down.scalar_type(), "gate_up and down have one type");
  const int64_t rows = x.size(0), width = x.size(1), top_k = chosen.size(1), n_experts = gate_up.size(0);
  const int64_t hidden = down.size(2), pairs = rows * top_k;
  Tensor y = torch::stable::new_empty(x, {rows, width});
  const Column gate_up_scales(gate_up_scale, 1.0f), down_scales(down_scale, 1.0f);
  const int64_t* choice = static_cast<const int64_t*>(chosen.data_ptr());
  const float* share = static_cast<const float*>(weights.data_ptr());
  std::vector<float> activation(pairs * hidden), result(pairs * width);

  std::vector<Chosen> needed;
  for (int64_t expert = 0; expert < n_experts; ++expert) {
    Chosen one{expert, {}, {}};
    for (int64_t pair = 0; pair < pairs; ++pair)
      if (choice[pair] == expert) one.pairs.push_back(pair);
    if (!one.pairs.empty()) needed.push_back(std::move(one));
  }
  const int64_t n_needed = static_cast<int64_t>(needed.size());

  with_float_type(x.scalar_type(), [&](auto state) {
    using State = Value<decltype(state)>;
    const std::vector<float> floats = as_floats(static_cast<const State*>(x.data_ptr()), rows * width);
    with_weight_type(gate_up.scalar_type(), [&](auto type) {
      using Weight = Value<decltype(type)>;
      const Weight* up_and_gate = static_cast<const Weight*>(gate_up.data_ptr());
      const Weight* back = static_cast<const Weight*>(down.data_ptr());

      for (Chosen& one : needed)
        for (int64_t pair : one.pairs) one.inputs.push_back(floats.data() + pair / top_k * width);
      // Threads share out the hidden units of all needed experts, then the outputs: each reads weights as they lie.
      torch::stable::parallel_for(0, n_needed * hidden, grain(2 * width * sizeof(Weight)), [&](int64_t begin, int64_t end) {
        std::vector<float> gates(pairs), ups(pairs);
        for (int64_t unit = begin; unit < end; ++unit) {
          const Chosen& one = needed[unit / hidden];
          const int64_t f = unit % hidden, gate_row = one.expert * 2 * hidden + f, up_row = gate_row + hidden;
          dots(up_and_gate + gate_row * width, one.inputs, width, gates.data());
          dots(up_and_gate + up_row * width, one.inputs, width, ups.data());
          for (size_t i = 0; i < one.pairs.size(); ++i) {
            const float gate = gates[i] * gate_up_scales[gate_row], up = ups[i] * gate_up_scales[up_row];
            activation[one.pairs[i] * hidden + f] = gate / (1.0f + std::exp(-gate)) * up;
          }
        }
      });
      for (Chosen& one : needed) {
        one.inputs.clear();
        for (int64_t pair : one.pairs) one.inputs.push_back(activation.data() + pair * hidden);
      }
      torch::stable::parallel_for(0, n_needed * width, grain(hidden * sizeof(Weight)), [&](int64_t begin, int64_t end) {
        std::vector<float> products(pairs);
        for (int64_t unit = begin; unit < end; ++unit) {
          const Chosen& one = needed[unit / width];
          const int64_t d = unit % width, row = one.expert * width + d;
          dots(back + row * hidden, one.inputs, hidden, products.data());
          for (size_t i = 0; i < one.pairs.size(); ++i) result[one.pairs[i] * width + d] = products[i] * down_scales[row];
        }
      });
    });
    State* out = static_cast<State*>(y.data_ptr());
    for (int64_t n = 0; n < rows; ++n)
      for (int64_t d = 0; d < width; ++d) {
        float total = 0;  // a row's experts in the order of its choice, which is its own
        for (int64_t pair = n * top_k; pair < (n + 1) * top_k; ++pair) total += share[pair] * result[pair * width + d];
        store(total, out + n * width + d);
      }
  });
  return y;
}

Tensor attend(
    const Tensor& queries, const Tensor& new_keys, const Tensor& new_values, const Tensor& keys, const Tensor& values, const Tensor& rows,
    const Tensor& positions, int64_t window, double scale) {
  for (const Tensor* tensor : {&queries, &new_keys, &new_values, &keys, &values, &rows, &positions}) check_dense(*tensor);
  STD_TORCH_CHECK(new_keys.scalar_type() == keys.scalar_type(), "keys go into a cache of their type");
  const int64_t n_queries = queries.size(0), heads = queries.size(1), head_dim = queries.size(2);
  const int64_t capacity = keys.size(1), groups = keys.size(2), per_group = heads / groups, slot = groups * head_dim;
  const int64_t* row = static_cast<const int64_t*>(rows.data_ptr());
  const int64_t* position = static_cast<const int64_t*>(positions.data_ptr());
  Tensor y = torch::stable::new_empty(queries, {n_queries, heads * head_dim});

  const size_t slot_bytes = slot * keys.element_size();
  int64_t longest = 0;
  for (int64_t n = 0; n < n_queries; ++n) {
    STD_TORCH_CHECK(0 <= position[n] && position[n] < capacity, "a position lies outside the cache");
    STD_TORCH_CHECK(0 <= row[n] && row[n] < keys.size(0), "a row lies outside the cache");
    const size_t to = (row[n] * capacity + position[n]) * slot_bytes;
    std::memcpy(static_cast<char*>(keys.data_ptr()) + to, static_cast<const char*>(new_keys.data_ptr()) + n * slot_bytes, slot_bytes);
    std::memcpy(static_cast<char*>(values.data_ptr()) + to, static_cast<const char*>(new_values.data_ptr()) + n * slot_bytes, slot_bytes);
    longest = std::max(longest, position[n] + 1);
  }
  if (window > 0) longest = std::min(longest, window);

  with_float_type(queries.scalar_type(), [&](auto state) {
    using State = Value<decltype(state)>;
    const State* q = static_cast<const State*>(queries.data_ptr());
    State* out = static_cast<State*>(y.data_ptr());
    with_float_type(keys.scalar_type(), [&](auto type) {
      using Cached = Value<decltype(type)>;
      const Cached* all_keys = static_cast<const Cached*>(keys.data_ptr());
      const Cached* all_values = static_cast<const Cached*>(values.data_ptr());
      const int64_t bytes = 2 * longest * head_dim * static_cast<int64_t>(sizeof(Cached));
      torch::stable::parallel_for(0, n_queries * groups, grain(bytes), [&](int64_t begin, int64_t end) {
        std::vector<float> scores(per_group * longest), products(per_group), mixed(head_dim);
        for (int64_t unit = begin; unit < end; ++unit) {
          const int64_t n = unit / groups, g = unit % groups;
          const int64_t last = position[n] + 1, first = window > 0 ? std::max<int64_t>(0, last - window) : 0;
          const int64_t length = last - first, start = (row[n] * capacity + first) * slot + g * head_dim;
          const int64_t head = (n * heads + g * per_group) * head_dim;
          const std::vector<float> query = as_floats(q + head, per_group * head_dim);
          std::vector<const float*> query_rows(per_group);
          for (int64_t h = 0; h < per_group; ++h) query_rows[h] = query.data() + h * head_dim;
          for (int64_t s = 0; s < length; ++s) {
            dots(all_keys + start + s * slot, query_rows, head_dim, products.data());
            for (int64_t h = 0; h < per_group; ++h) scores[h * length + s] = products[h] * static_cast<float>(scale);
          }
          for (int64_t h = 0; h < per_group; ++h) {
            float* weight = scores.data() + h * length;
            const float largest = *std::max_element(weight, weight + length);
            float total = 0;
            for (int64_t s = 0; s < length; ++s) total += weight[s] = std::exp(weight[s] - largest);
            std::fill(mixed.begin(), mixed.end(), 0.0f);
            for (int64_t s = 0; s < length; ++s) {
              const Cached* value = all_values + start + s * slot;
              for (int64_t d = 0; d < head_dim; ++d) mixed[d] += weight[s] * number(value[d]);
            }
            for (int64_t d = 0; d < head_dim; ++d) store(mixed[d] / total, out + head + h * head_dim + d);
          }
        }
      });
    });
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY(layerskip_moe, library) {
  library.def("linear(Tensor x, Tensor weight, Tensor? scale, Tensor? bias) -> Tensor");
  library.def(
      "experts(Tensor x, Tensor chosen, Tensor weights, Tensor gate_up, Tensor down, Tensor? gate_up_scale, "
      "Tensor? down_scale) -> Tensor");
  library.def(
      "attend(Tensor queries, Tensor new_keys, Tensor new_values, Tensor(a!) keys, Tensor(b!) values, Tensor rows, "
      "Tensor positions, int window, float scale) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(layerskip_moe, CPU, library) {
  library.impl("linear", TORCH_BOX(&linear));
  library.impl("experts", TORCH_BOX(&experts));
  library.impl("attend", TORCH_BOX(&attend));
}
