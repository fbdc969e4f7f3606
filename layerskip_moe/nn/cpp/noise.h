// Uniform numbers of noise.py, in one pass.
//
// Knows nothing of what they are for. Next: few_rows.cpp.

#pragma once

#include "program.h"

namespace few_rows {

inline uint64_t mix_bits(uint64_t bits) {
  bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9u;
  bits = (bits ^ bits >> 27) * 0x94D049BB133111EBu;
  return bits ^ bits >> 31;
}

// `hash_uniform` of keys 0..count - 1, after those that these hashes [...] are of -> [..., count] float64.
inline Tensor uniforms(const Tensor& hashes, int64_t count) {
  STD_TORCH_CHECK(recording == nullptr, "noise is not recorded: it would be the same again");
  check_dense(hashes, ScalarType::Long);
  std::vector<int64_t> sizes(hashes.sizes().begin(), hashes.sizes().end());
  sizes.push_back(count);
  Tensor y = torch::stable::new_empty(hashes, sizes, ScalarType::Double);
  const auto* hash = static_cast<const uint64_t*>(hashes.data_ptr());
  auto* number = static_cast<double*>(y.data_ptr());
  const int64_t least = std::max<int64_t>(1, NUMBERS_PER_THREAD / std::max<int64_t>(1, count));
  torch::stable::parallel_for(0, hashes.numel(), least, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n)
      for (uint64_t key = 0; key < static_cast<uint64_t>(count); ++key) {
        const uint64_t bits = mix_bits((key ^ hash[n]) + 0x9E3779B97F4A7C15u);
        number[n * count + key] = (static_cast<double>(bits >> 12) + 0.5) * 0x1p-52;
      }
  });
  return y;
}

}  // namespace few_rows
