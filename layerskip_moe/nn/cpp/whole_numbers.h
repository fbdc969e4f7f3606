// Products of rows with weights that are whole numbers of 8 bits, in blocks: as drafts are computed (int8_copies.py).
//
// A block is of 32 outputs, side by side in pairs of inputs: for each pair of inputs 32 pairs of numbers. Rows are rounded
// to whole numbers of 16 bits. So sums are of whole numbers, a row's pair of inputs is multiplied by a block's at once, and
// no register is summed up in the end, which for few inputs takes as long as the products.
//
// Knows nothing of tensors. Next: tensors.h.

#pragma once

#include "numbers.h"

namespace few_rows {

constexpr int64_t BLOCK = 32;  // outputs

// Bytes of a block.
inline int64_t block_bytes(int64_t inputs) { return (inputs + 1) / 2 * 2 * BLOCK; }
inline int64_t blocks_of(int64_t outputs) { return (outputs + BLOCK - 1) / BLOCK; }

// A row over its scale, in pairs of inputs.
struct Rounded {
  const int32_t* pairs;
  float scale;
};

// Rows of numbers, rounded; to numbers so small that no sum of products with 8 bits leaves 32.
class RoundedRows {
 public:
  RoundedRows(const float* x, int64_t rows, int64_t inputs) : pairs(rows * ((inputs + 1) / 2)) {
    for (int64_t n = 0; n < rows; ++n) all.push_back(round(x + n * inputs, inputs, pairs.data() + n * ((inputs + 1) / 2)));
  }
  const std::vector<Rounded>& rows() const { return all; }

 private:
  static Rounded round(const float* x, int64_t inputs, int32_t* pairs) {
    Floats most = {};
    const auto weigh = [&](Floats some) {
      some = some < 0.0f ? -some : some;
      most = some > most ? some : most;
    };
    const int64_t whole = inputs - inputs % WIDTH;
    for (int64_t k = 0; k < whole; k += WIDTH) weigh(load(x + k));
    if (whole < inputs) weigh(load_first(x + whole, inputs - whole));
    float largest = 0.0f;
    for (int64_t lane = 0; lane < WIDTH; ++lane) largest = std::max(largest, most[lane]);
    const float end = std::min(32767.0f, static_cast<float>(1 << 24) / static_cast<float>(inputs));
    const float inverse = largest > 0.0f ? end / largest : 0.0f;
    constexpr float SHIFT = 12582912.0f;  // as in `exp`
    int16_t* to = reinterpret_cast<int16_t*>(pairs);
    for (int64_t k = 0; k < inputs; ++k) {
      const float shifted = x[k] * inverse + SHIFT;
      to[k] = static_cast<int16_t>(copy_from<int32_t>(&shifted) - 0x4B400000);
    }
    if (inputs % 2) to[inputs] = 0;
    return {pairs, largest / end};
  }

  std::vector<int32_t, Aligned<int32_t>> pairs;
  std::vector<Rounded> all;
};

// Of WIDTH outputs: pairs of weights, and sums of their products with a row's pair.
#if defined(__AVX512BW__)
using Pairs = __m512i;
inline Pairs load_pairs(const int8_t* from) { return _mm512_cvtepi8_epi16(copy_from<__m256i>(from)); }
inline Integers multiply_add(Pairs weights, int32_t pair, Integers sums) {
#if defined(__AVX512VNNI__)
  return reinterpret_cast<Integers>(_mm512_dpwssd_epi32(reinterpret_cast<__m512i>(sums), weights, _mm512_set1_epi32(pair)));
#else
  return sums + reinterpret_cast<Integers>(_mm512_madd_epi16(weights, _mm512_set1_epi32(pair)));
#endif
}
#elif defined(__AVX2__)
using Pairs = __m256i;
inline Pairs load_pairs(const int8_t* from) { return _mm256_cvtepi8_epi16(copy_from<__m128i>(from)); }
inline Integers multiply_add(Pairs weights, int32_t pair, Integers sums) {
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
inline Integers multiply_add(const Pairs& weights, int32_t pair, Integers sums) {
  int16_t of_row[2];
  std::memcpy(of_row, &pair, sizeof pair);
  return sums + weights.first * of_row[0] + weights.second * of_row[1];
}
#endif

inline Floats as_floats(Integers sums) { return __builtin_convertvector(sums, Floats); }

// Products of ROWS rows with a block, times the rows' scales.
template <int ROWS>
inline void multiply_block(const int8_t* block, const Rounded* x, int64_t inputs, float (*out)[BLOCK]) {
  constexpr int PARTS = BLOCK / WIDTH;
  Integers sums[ROWS][PARTS] = {};  // which a loop that is left rolled up would keep in memory
  for (int64_t pair = 0; pair < (inputs + 1) / 2; ++pair, block += 2 * BLOCK) {
    Pairs weights[PARTS];
    for (int p = 0; p < PARTS; ++p) weights[p] = load_pairs(block + 2 * p * WIDTH);
#pragma GCC unroll 8
    for (int n = 0; n < ROWS; ++n)
#pragma GCC unroll 8
      for (int p = 0; p < PARTS; ++p) sums[n][p] = multiply_add(weights[p], x[n].pairs[pair], sums[n][p]);
  }
#pragma GCC unroll 8
  for (int n = 0; n < ROWS; ++n)
#pragma GCC unroll 8
    for (int p = 0; p < PARTS; ++p) {
      const Floats products = as_floats(sums[n][p]) * x[n].scale;
      std::memcpy(out[n] + p * WIDTH, &products, sizeof products);
    }
}

// For blocks begin..end - 1 and all rows, give(block, n, products): the block's products with row n.
template <class Give>
inline void multiply_blocks(const int8_t* blocks, int64_t begin, int64_t end, const std::vector<Rounded>& x, int64_t inputs, const Give& give) {
  const int64_t rows = static_cast<int64_t>(x.size());
  for (int64_t block = begin; block < end; ++block) {
    const auto multiply_rows = [&](auto some, int64_t n) {
      float products[some.value][BLOCK];
      multiply_block<some.value>(blocks + block * block_bytes(inputs), &x[n], inputs, products);
      for (int i = 0; i < some.value; ++i) give(block, n + i, products[i]);
    };
    int64_t n = 0;
    for (; n + 8 <= rows; n += 8) multiply_rows(std::integral_constant<int, 8>(), n);
    for (; n + 4 <= rows; n += 4) multiply_rows(std::integral_constant<int, 4>(), n);
    for (; n + 2 <= rows; n += 2) multiply_rows(std::integral_constant<int, 2>(), n);
    if (n < rows) multiply_rows(std::integral_constant<int, 1>(), n);
  }
}

}  // namespace few_rows
