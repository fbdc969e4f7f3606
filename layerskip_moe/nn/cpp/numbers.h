// Numbers of several types as vectors of float32, and the product of rows that everything else is made of.
//
// Knows nothing of tensors. Next: tensors.h.

#pragma once

#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#if defined(__AVX__)
#include <immintrin.h>
#endif

namespace few_rows {

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
struct Half {  // (compilers have known _Float16 for a few years only)
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
inline Floats load(const Half* from) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(copy_from<__m256i>(from));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(copy_from<__m128i>(from));
#else
  Floats floats;
  for (int64_t i = 0; i < WIDTH; ++i) floats[i] = torch::headeronly::detail::fp16_ieee_to_fp32_value(from[i].bits);
  return floats;
#endif
}
inline Floats load(const int8_t* from) { return __builtin_convertvector(widen<Integers>(from), Floats); }
inline Floats load(const BFloat16* from) {
  const Words words = widen<Words>(reinterpret_cast<const uint16_t*>(from)) << 16;
  return copy_from<Floats>(&words);
}

// The first `count` numbers, and zeros for the rest of the register.
template <class Number>
Floats load_first(const Number* from, int64_t count) {
  Number padded[WIDTH] = {};
  std::memcpy(padded, from, count * sizeof *from);
  return load(padded);
}

inline float number(float value) { return value; }
inline float number(Half value) { return torch::headeronly::detail::fp16_ieee_to_fp32_value(value.bits); }
inline float number(int8_t value) { return static_cast<float>(value); }
inline float number(BFloat16 value) {
  const uint32_t word = static_cast<uint32_t>(value.bits) << 16;
  return copy_from<float>(&word);
}

inline void store(float value, float* to) { *to = value; }
inline void store(float value, Half* to) { to->bits = torch::headeronly::detail::fp16_ieee_from_fp32_value(value); }
inline void store(float value, BFloat16* to) {
  const uint32_t word = copy_from<uint32_t>(&value);  // to the nearest, ties to even, as torch rounds
  to->bits = std::isnan(value) ? 0x7fc0 : static_cast<uint16_t>((word + 0x7fff + ((word >> 16) & 1)) >> 16);
}

// Sums of four registers, each as that of one alone: neighbours first, then pairs of these, then the halves.
#if defined(__AVX__)
inline void sum_four(const __m256* values, float* totals) {
  const __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(values[0], values[1]), _mm256_hadd_ps(values[2], values[3]));
  _mm_storeu_ps(totals, _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1)));
}
#endif
#if defined(__AVX512F__)
inline void sum_four(const __m512* values, float* totals) {
  __m256 folded[4];
  for (int i = 0; i < 4; ++i) {
    const __m256d high = _mm512_extractf64x4_pd(_mm512_castps_pd(values[i]), 1);
    folded[i] = _mm256_add_ps(_mm512_castps512_ps256(values[i]), _mm256_castpd_ps(high));
  }
  sum_four(folded, totals);
}
#elif !defined(__AVX__)
inline void sum_four(const Floats* values, float* totals) {
  for (int i = 0; i < 4; ++i) totals[i] = (values[i][0] + values[i][1]) + (values[i][2] + values[i][3]);
}
#endif
inline float sum(Floats values) {
  const Floats four[4] = {values, values, values, values};
  float totals[4];
  sum_four(four, totals);
  return totals[0];
}

// a * b + c, rounded once where the processor can. Said, and not left to the compiler (-ffp-contract=off): that would
// choose anew wherever this is inlined, and a row's numbers would depend on how many stand beside it.
inline Floats multiply_add(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX__) && defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

// e^x, to within two units in the last place, for all of -87 to 88; what lies beyond is taken for the nearest of these.
inline Floats exp(Floats x) {
  constexpr float SHIFT = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest whole number in the low bits
  x = x > 88.0f ? Floats{} + 88.0f : x;
  x = x < -87.0f ? Floats{} - 87.0f : x;
  const Floats shifted = x * 1.44269504f + SHIFT, whole = shifted - SHIFT;
  const Floats rest = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;  // ln 2 in two parts
  Floats series = rest * 1.9875691500e-4f + 1.3981999507e-3f;  // Cephes' expf
  series = series * rest + 8.3334519073e-3f;
  series = series * rest + 4.1665795894e-2f;
  series = series * rest + 1.6666665459e-1f;
  series = series * rest + 5.0000001201e-1f;
  series = series * rest * rest + rest + 1.0f;
  const Integers power = ((copy_from<Integers>(&shifted) - 0x4B400000) + 127) << 23;
  return series * copy_from<Floats>(&power);
}

// values[i] = function(values[i], others[i]), the last few like all others: a value's place changes nothing.
template <class Function>
void for_each(float* values, const float* others, int64_t count, const Function& function) {
  const auto apply = [&](int64_t i, size_t bytes) {
    Floats value = {}, other = {};
    std::memcpy(&value, values + i, bytes);
    std::memcpy(&other, others + i, bytes);
    value = function(value, other);
    std::memcpy(values + i, &value, bytes);
  };
  int64_t i = 0;
  for (; i + WIDTH <= count; i += WIDTH) apply(i, sizeof(Floats));  // (a copy of constant size is one instruction)
  if (i < count) apply(i, sizeof(float) * (count - i));
}

constexpr int CHAINS = 4;  // sums that do not wait for one another

// out[n][o] = w[o] . x[n] for ROWS rows of x and OUTPUTS of w, which is read as it lies. The order of summation depends
// on neither count.
template <int OUTPUTS, int ROWS, class Weight>
inline void dot(const Weight* w, const float* const* x, int64_t inputs, float (*out)[4]) {
  constexpr int64_t STEP = CHAINS * WIDTH;
  const int64_t whole = inputs - inputs % STEP;
  Floats sums[ROWS][4] = {};
  for (int o = 0; o < OUTPUTS; ++o) {
    Floats chains[ROWS][CHAINS] = {};
    for (int64_t k = 0; k < whole; k += STEP)
      for (int c = 0; c < CHAINS; ++c) {
        const Floats weights = load(w + o * inputs + k + c * WIDTH);
        for (int n = 0; n < ROWS; ++n) chains[n][c] = multiply_add(weights, load(x[n] + k + c * WIDTH), chains[n][c]);
      }
    for (int64_t k = whole; k < inputs; k += WIDTH) {
      const int64_t count = std::min(WIDTH, inputs - k);
      const Floats weights = load_first(w + o * inputs + k, count);
      for (int n = 0; n < ROWS; ++n) chains[n][0] = multiply_add(weights, load_first(x[n] + k, count), chains[n][0]);
    }
    for (int n = 0; n < ROWS; ++n) sums[n][o] = (chains[n][0] + chains[n][1]) + (chains[n][2] + chains[n][3]);
  }
  for (int n = 0; n < ROWS; ++n) sum_four(sums[n], out[n]);
}

// give(o, n, w[o] . x[n]) for outputs begin..end - 1 and all rows.
template <int OUTPUTS, class Weight, class Give>
inline void multiply_block(const Weight* w, int64_t begin, const std::vector<const float*>& x, int64_t inputs, const Give& give) {
  const int64_t rows = static_cast<int64_t>(x.size());
  const auto multiply_rows = [&](auto some, int64_t n) {
    float products[some.value][4];
    dot<OUTPUTS, some.value>(w + begin * inputs, &x[n], inputs, products);
    for (int i = 0; i < some.value; ++i)
      for (int o = 0; o < OUTPUTS; ++o) give(begin + o, n + i, products[i][o]);
  };
  int64_t n = 0;
  for (; n + 3 <= rows; n += 3) multiply_rows(std::integral_constant<int, 3>(), n);
  if (rows - n == 2) multiply_rows(std::integral_constant<int, 2>(), n);
  if (rows - n == 1) multiply_rows(std::integral_constant<int, 1>(), n);
}

template <class Weight, class Give>
inline void multiply(const Weight* w, int64_t begin, int64_t end, const std::vector<const float*>& x, int64_t inputs, const Give& give) {
  int64_t o = begin;
  for (; o + 4 <= end; o += 4) multiply_block<4>(w, o, x, inputs, give);
  for (; o < end; ++o) multiply_block<1>(w, o, x, inputs, give);
}

}  // namespace few_rows
