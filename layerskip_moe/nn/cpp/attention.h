// Attention of few queries, each to the slots of its row up to its own.
//
// Knows nothing of the network. Next: few_rows.cpp.

#pragma once

#include "states.h"

namespace few_rows {

// out[d] = sum over s of weight[s] * values[s][d].
template <class Cached>
void mix(const Cached* values, const float* weight, int64_t length, int64_t head_dim, float* out) {
  int64_t d = 0;
  for (; d + CHAINS * WIDTH <= head_dim; d += CHAINS * WIDTH) {
    Floats sums[CHAINS] = {};
    for (int64_t s = 0; s < length; ++s)
      for (int c = 0; c < CHAINS; ++c) sums[c] += weight[s] * load(values + s * head_dim + d + c * WIDTH);
    std::memcpy(out + d, sums, sizeof sums);
  }
  for (; d < head_dim; ++d) {
    float total = 0;
    for (int64_t s = 0; s < length; ++s) total += weight[s] * number(values[s * head_dim + d]);
    out[d] = total;
  }
}

inline void attend_into(
    const Tensor& mixed_heads, const Tensor& queries, const Tensor& new_keys, const Tensor& new_values, const Tensor& keys, const Tensor& values,
    const Tensor& rows, const Tensor& positions, int64_t window, double scale) {
  const int64_t n_queries = queries.size(0), heads = queries.size(1), head_dim = queries.size(2);
  const int64_t groups = keys.size(1), capacity = keys.size(2), per_group = heads / groups;
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
        for (int64_t g = 0; g < groups; ++g)
          for (int64_t d = 0; d < head_dim; ++d)
            store(added[(n * groups + g) * head_dim + d], cached + ((row[n] * groups + g) * capacity + position[n]) * head_dim + d);

    const int64_t bytes = 2 * longest * head_dim * static_cast<int64_t>(sizeof *all_keys);
    torch::stable::parallel_for(0, n_queries * groups, grain(bytes), [&](int64_t begin, int64_t end) {
      std::vector<float> scores(per_group * longest), products(per_group);
      std::vector<const float*> query_rows(per_group);
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t n = unit / groups, head = unit * per_group;
        const int64_t last = position[n] + 1, first = window > 0 ? std::max<int64_t>(0, last - window) : 0;
        const int64_t length = last - first, start = ((row[n] * groups + unit % groups) * capacity + first) * head_dim;
        for (int64_t h = 0; h < per_group; ++h) query_rows[h] = query.data() + (head + h) * head_dim;
        for (int64_t s = 0; s < length; ++s) {
          dots(all_keys + start + s * head_dim, query_rows, head_dim, products.data());
          for (int64_t h = 0; h < per_group; ++h) scores[h * length + s] = products[h] * static_cast<float>(scale);
        }
        for (int64_t h = 0; h < per_group; ++h) {
          float *weight = scores.data() + h * length, *mixed = y.data() + (head + h) * head_dim, total = 0;
          const float largest = *std::max_element(weight, weight + length);
          for_each(weight, weight, length, [&](Floats score, Floats) { return exp(score - largest); });
          for (int64_t s = 0; s < length; ++s) total += weight[s];
          mix(all_values + start, weight, length, head_dim, mixed);
          for (int64_t d = 0; d < head_dim; ++d) mixed[d] /= total;
        }
      }
    });
  });
  give(y, mixed_heads);
}

inline Tensor attend(
    const Tensor& queries, const Tensor& new_keys, const Tensor& new_values, const Tensor& keys, const Tensor& values,
    const Tensor& rows, const Tensor& positions, int64_t window, double scale) {
  check_dense(keys), check_dense(values), check_dense(rows, ScalarType::Long), check_dense(positions, ScalarType::Long);
  check_sizes(keys.dim() == 4 && keys.numel() == values.numel() && keys.scalar_type() == values.scalar_type());
  check_sizes(queries.size(2) == keys.size(3) && queries.size(1) % keys.size(1) == 0);
  for (const Tensor* added : {&new_keys, &new_values})
    check_sizes(added->size(0) == queries.size(0) && added->size(1) == keys.size(1) && added->size(2) == keys.size(3));
  check_sizes(rows.numel() == queries.size(0) && positions.numel() == queries.size(0));
  Tensor y = torch::stable::new_empty(queries, {queries.size(0), queries.size(1) * queries.size(2)});
  perform([=] { attend_into(y, queries, new_keys, new_values, keys, values, rows, positions, window, scale); });
  return y;
}

}  // namespace few_rows
