// Numbers of several types as vectors of float32, and the product of rows that everything else is made of.
//
// Knows nothing of tensors. Next: tensors.h.

#pragma once

#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
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
// (Said, as compilers make one instruction of a loop in some places and sixteen in others.)
inline Floats load(const int8_t* from) {
#if defined(__AVX512F__)
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(copy_from<__m128i>(from)));
#elif defined(__AVX2__)
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
#else
  Floats floats;
  for (int64_t i = 0; i < WIDTH; ++i) floats[i] = from[i];
  return floats;
#endif
}
inline Floats load(const BFloat16* from) {
#if defined(__AVX512F__)
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(copy_from<__m256i>(from)), 16));
#elif defined(__AVX2__)
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(copy_from<__m128i>(from)), 16));
#else
  Words words;
  for (int64_t i = 0; i < WIDTH; ++i) words[i] = static_cast<uint32_t>(from[i].bits) << 16;
  return copy_from<Floats>(&words);
#endif
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
// The sum of each of WIDTH registers, at its place.
inline Floats sum_each(const Floats* values) {
#if defined(__AVX512F__)
  // Halves, then quarters of what is left, so that each level sums twice as many registers at once.
  __m512 by_two[8], by_four[4], by_eight[2];
#pragma GCC unroll 16
  for (int i = 0; i < 8; ++i) {  // registers i and i + 8
    const __m512 low = _mm512_shuffle_f32x4(values[i], values[i + 8], 0x44), high = _mm512_shuffle_f32x4(values[i], values[i + 8], 0xee);
    by_two[i] = _mm512_add_ps(low, high);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 4; ++i) {  // and i + 4, i + 12
    const __m512 even = _mm512_shuffle_f32x4(by_two[i], by_two[i + 4], 0x88), odd = _mm512_shuffle_f32x4(by_two[i], by_two[i + 4], 0xdd);
    by_four[i] = _mm512_add_ps(even, odd);  // fours of i, i + 8, i + 4, i + 12
  }
#pragma GCC unroll 16
  for (int i = 0; i < 2; ++i)  // i and i + 2 side by side, twice
    by_eight[i] = _mm512_add_ps(_mm512_unpacklo_ps(by_four[i], by_four[i + 2]), _mm512_unpackhi_ps(by_four[i], by_four[i + 2]));
  const __m512 sums = _mm512_add_ps(_mm512_unpacklo_ps(by_eight[0], by_eight[1]), _mm512_unpackhi_ps(by_eight[0], by_eight[1]));
  const __m512i place = _mm512_setr_epi32(0, 1, 2, 3, 8, 9, 10, 11, 4, 5, 6, 7, 12, 13, 14, 15);
  return _mm512_permutexvar_ps(place, sums);
#else
  Floats sums;
  for (int64_t i = 0; i < WIDTH; i += 4) {
    float four[4];
    sum_four(values + i, four);
    for (int64_t j = 0; j < 4; ++j) sums[i + j] = four[j];
  }
  return sums;
#endif
}
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

// Keeps a value that several multiplications share in a register: compilers load it anew for each.
inline void hold([[maybe_unused]] Floats& value) {
#if defined(__AVX__)
  asm("" : "+v"(value));
#endif
}

// Numbers at work: uninitialised, and beginning with a line of cache, so that loads of rows of whole lines straddle none.
template <class Number>
struct Aligned {
  using value_type = Number;
  Aligned() = default;
  template <class Other>
  Aligned(const Aligned<Other>&) {}
  Number* allocate(size_t count) { return static_cast<Number*>(::operator new(count * sizeof(Number), std::align_val_t(64))); }
  void deallocate(Number* numbers, size_t) { ::operator delete(numbers, std::align_val_t(64)); }
  void construct(Number*) {}
  void construct(Number* place, Number value) { *place = value; }
  bool operator==(const Aligned&) const { return true; }
};
using Numbers = std::vector<float, Aligned<float>>;

// Rows that a weight is multiplied by while it is in a register, with four sums of each: what was measured fastest.
constexpr int MOST_AT_ONCE = WIDTH == 16 ? 6 : 3;
constexpr int64_t NEAR = 1 << 14;  // bytes of a block of outputs that leave room in the first cache for the next ones
constexpr int64_t SOON = 3 << 10, LATER = 12 << 10;  // bytes ahead: what the first cache is to have, and what the second

// out[n][o] = w[o] . x[n] for ROWS rows of x and OUTPUTS of w. The order of summation depends on neither count.
// COLD: the weights are read for the first time. A single row's floats are read as they lie, which is fastest where reading
// is all there is to wait for. Else outputs go side by side, which no processor foresees: so what lies ahead is
// asked for, in the order it lies in: from memory long before it is needed, and from the second cache a little before.
template <int OUTPUTS, int ROWS, bool COLD, class Weight>
inline void dot(const Weight* w, const float* const* x, int64_t inputs, float (*out)[4]) {
  constexpr bool ONE_BY_ONE = ROWS == 1 && sizeof(Weight) == sizeof(float);
  constexpr int TOGETHER = ONE_BY_ONE ? 1 : OUTPUTS;
  constexpr int64_t STEP_BYTES = OUTPUTS * WIDTH * sizeof(Weight);
  const int64_t whole = inputs - inputs % WIDTH, block = OUTPUTS * inputs * static_cast<int64_t>(sizeof *w);
  const bool ask = COLD && !ONE_BY_ONE && block <= NEAR;
  Floats sums[ROWS][4] = {};
  for (int first = 0; first < OUTPUTS; first += TOGETHER) {
    const char* ahead = reinterpret_cast<const char*>(w);
    for (int64_t k = 0; k < whole; k += WIDTH) {
      Floats weights[TOGETHER];
      for (int o = 0; o < TOGETHER; ++o) weights[o] = load(w + (first + o) * inputs + k);
      for (int64_t line = 0; ask && line < STEP_BYTES; line += 64)
        __builtin_prefetch(ahead + line + LATER, 0, 2), __builtin_prefetch(ahead + line + SOON);
      ahead += STEP_BYTES;
      for (int n = 0; n < ROWS; ++n) {
        Floats numbers = load(x[n] + k);
        hold(numbers);
        for (int o = 0; o < TOGETHER; ++o) sums[n][first + o] = multiply_add(weights[o], numbers, sums[n][first + o]);
      }
    }
  }
  for (int o = 0; whole < inputs && o < OUTPUTS; ++o) {
    const Floats weights = load_first(w + o * inputs + whole, inputs - whole);
    for (int n = 0; n < ROWS; ++n) sums[n][o] = multiply_add(weights, load_first(x[n] + whole, inputs - whole), sums[n][o]);
  }
  for (int n = 0; n < ROWS; ++n) sum_four(sums[n], out[n]);
}

// `multiply` for OUTPUTS outputs from o on.
template <int OUTPUTS, class Weight, class Give>
inline void multiply_block(const Weight* w, int64_t o, const std::vector<const float*>& x, int64_t inputs, const Give& give) {
  const int64_t rows = static_cast<int64_t>(x.size());
  const auto multiply_rows = [&](auto some, auto cold, int64_t n) {
    float products[some.value][4];
    dot<OUTPUTS, some.value, cold.value>(w + o * inputs, &x[n], inputs, products);
    for (int i = 0; i < some.value; ++i) give(std::integral_constant<int, OUTPUTS>(), o, n + i, products[i]);
  };
  const auto multiply_left = [&](auto cold, int64_t n) {
    const int64_t left = rows - n;
    if (left >= MOST_AT_ONCE) return multiply_rows(std::integral_constant<int, MOST_AT_ONCE>(), cold, n);
    if constexpr (MOST_AT_ONCE > 3) {
      if (left == 5) return multiply_rows(std::integral_constant<int, 5>(), cold, n);
      if (left == 4) return multiply_rows(std::integral_constant<int, 4>(), cold, n);
    }
    if (left == 3) return multiply_rows(std::integral_constant<int, 3>(), cold, n);
    if (left == 2) return multiply_rows(std::integral_constant<int, 2>(), cold, n);
    if (left == 1) multiply_rows(std::integral_constant<int, 1>(), cold, n);
  };
  multiply_left(std::true_type(), 0);
  for (int64_t n = MOST_AT_ONCE; n < rows; n += MOST_AT_ONCE) multiply_left(std::false_type(), n);
}

// For outputs begin..end - 1 and all rows, give(count, o, n, products): products[i] = w[o + i] . x[n], of count.value
// outputs, 4 or 1.
template <class Weight, class Give>
inline void multiply(const Weight* w, int64_t begin, int64_t end, const std::vector<const float*>& x, int64_t inputs, const Give& give) {
  int64_t o = begin;
  for (; o + 4 <= end; o += 4) multiply_block<4>(w, o, x, inputs, give);
  for (; o < end; ++o) multiply_block<1>(w, o, x, inputs, give);
}

}  // namespace few_rows
