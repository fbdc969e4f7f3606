// Products of rows with int8 weights that are packed into panels, and rows rounded to int16: as drafts are computed.
//
// A panel is of 32 outputs, side by side in pairs of inputs: for each pair of inputs, 32 pairs of numbers. So a row's pair
// of inputs is multiplied by a panel's at once, sums are of whole numbers, and no register is summed up in the end, which
// for few inputs takes as long as the products.
//
// Knows nothing of tensors. Next: tensors.h.

#pragma once

#include "numbers.h"

namespace few_rows {

constexpr int64_t PANEL = 32;  // outputs

inline int64_t panels_of(int64_t outputs) { return (outputs + PANEL - 1) / PANEL; }
inline int64_t even(int64_t inputs) { return inputs + inputs % 2; }
inline int64_t panel_bytes(int64_t inputs) { return even(inputs) * PANEL; }

// A row over its scale, of an even number of inputs.
struct Rounded {
  const int16_t* numbers;
  float scale;
};

// Rows, rounded to numbers so small that no sum of their products with int8 leaves 32 bits.
class RoundedRows {
 public:
  RoundedRows(const float* x, int64_t rows, int64_t inputs) : numbers(rows * even(inputs)) {
    for (int64_t n = 0; n < rows; ++n) all.push_back(round(x + n * inputs, inputs, numbers.data() + n * even(inputs)));
  }
  RoundedRows(const RoundedRows&) = delete;
  const std::vector<Rounded>& rows() const { return all; }

 private:
  static Rounded round(const float* x, int64_t inputs, int16_t* to) {
    Floats most = {}, nothing = {};
    const auto weigh = [&](Floats some) {
      nothing += some * 0.0f;
      some = some < 0.0f ? -some : some;
      most = some > most ? some : most;
    };
    const int64_t whole = inputs - inputs % WIDTH;
    for (int64_t k = 0; k < whole; k += WIDTH) weigh(load(x + k));
    if (whole < inputs) weigh(load_first(x + whole, inputs - whole));
    float largest = 0.0f;
    for (int64_t lane = 0; lane < WIDTH; ++lane) largest = std::max(largest, most[lane]);
    const float end = static_cast<float>(std::max<int64_t>(1, std::min<int64_t>(32767, ((1 << 24) - 1) / inputs)));
    const float inverse = largest > 0.0f ? end / largest : 0.0f;
    constexpr float SHIFT = 12582912.0f;  // as in `exp`
    for (int64_t k = 0; k < inputs; ++k) {
      const float shifted = x[k] * inverse + SHIFT;
      to[k] = static_cast<int16_t>(copy_from<int32_t>(&shifted) - 0x4B400000);
    }
    if (inputs % 2) to[inputs] = 0;
    return {to, largest / end + sum(nothing)};  // not a number where one of them is none
  }

  std::vector<int16_t, Aligned<int16_t>> numbers;
  std::vector<Rounded> all;
};

// Of WIDTH outputs: pairs of weights, and sums to which their products with a row's pair are added.
#if defined(__AVX512BW__)
using Pairs = __m512i;
inline Pairs load_pairs(const int8_t* from) { return _mm512_cvtepi8_epi16(copy_from<__m256i>(from)); }
inline Integers add_products(Integers sums, Pairs weights, int32_t pair) {
#if defined(__AVX512VNNI__)
  return reinterpret_cast<Integers>(_mm512_dpwssd_epi32(reinterpret_cast<__m512i>(sums), weights, _mm512_set1_epi32(pair)));
#else
  return sums + reinterpret_cast<Integers>(_mm512_madd_epi16(weights, _mm512_set1_epi32(pair)));
#endif
}
#elif defined(__AVX2__) && !defined(__AVX512F__)
using Pairs = __m256i;
inline Pairs load_pairs(const int8_t* from) { return _mm256_cvtepi8_epi16(copy_from<__m128i>(from)); }
inline Integers add_products(Integers sums, Pairs weights, int32_t pair) {
  return sums + reinterpret_cast<Integers>(_mm256_madd_epi16(weights, _mm256_set1_epi32(pair)));
}
#else
struct Pairs {
  Integers first, second;
};
inline Pairs load_pairs(const int8_t* from) {
  Pairs pairs;
  for (int64_t i = 0; i < WIDTH; ++i) pairs.first[i] = from[2 * i], pairs.second[i] = from[2 * i + 1];
  return pairs;
}
inline Integers add_products(Integers sums, const Pairs& weights, int32_t pair) {
  int16_t of_row[2];
  std::memcpy(of_row, &pair, sizeof pair);
  return sums + weights.first * of_row[0] + weights.second * of_row[1];
}
#endif

// Rows that a panel is multiplied by at once: so many that their sums stay in registers.
constexpr int MOST_OF_PANEL = WIDTH == 16 ? 8 : 2;

// Products of ROWS rows with a panel, times the rows' scales.
template <int ROWS>
inline void multiply_panel(const int8_t* panel, const Rounded* x, int64_t inputs, float (*out)[PANEL]) {
  constexpr int PARTS = PANEL / WIDTH;
  Integers sums[ROWS][PARTS] = {};  // which a loop that is left rolled up would keep in memory
  for (int64_t k = 0; k < inputs; k += 2, panel += 2 * PANEL) {
    Pairs weights[PARTS];
    for (int p = 0; p < PARTS; ++p) weights[p] = load_pairs(panel + 2 * p * WIDTH);
#pragma GCC unroll 8
    for (int n = 0; n < ROWS; ++n)
#pragma GCC unroll 8
      for (int p = 0; p < PARTS; ++p) sums[n][p] = add_products(sums[n][p], weights[p], copy_from<int32_t>(x[n].numbers + k));
  }
#pragma GCC unroll 8
  for (int n = 0; n < ROWS; ++n)
#pragma GCC unroll 8
    for (int p = 0; p < PARTS; ++p) {
      const Floats products = __builtin_convertvector(sums[n][p], Floats) * x[n].scale;
      std::memcpy(out[n] + p * WIDTH, &products, sizeof products);
    }
}

// For panels begin..end - 1 and all rows, give(panel, n, products): the panel's products with row n.
template <class Give>
inline void multiply_panels(const int8_t* panels, int64_t begin, int64_t end, const std::vector<Rounded>& x, int64_t inputs, const Give& give) {
  const int64_t rows = static_cast<int64_t>(x.size());
  for (int64_t panel = begin; panel < end; ++panel) {
    const auto multiply_rows = [&](auto some, int64_t n) {
      float products[some.value][PANEL];
      multiply_panel<some.value>(panels + panel * panel_bytes(inputs), &x[n], inputs, products);
      for (int i = 0; i < some.value; ++i) give(panel, n + i, products[i]);
    };
    int64_t n = 0;
    for (; n + MOST_OF_PANEL <= rows; n += MOST_OF_PANEL) multiply_rows(std::integral_constant<int, MOST_OF_PANEL>(), n);
    for (; n + 2 <= rows; n += 2) multiply_rows(std::integral_constant<int, 2>(), n);
    if (n < rows) multiply_rows(std::integral_constant<int, 1>(), n);
  }
}

}  // namespace few_rows
