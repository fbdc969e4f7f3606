// Attention of few queries, each to the slots of its row up to its own.
//
// Knows nothing of the network. Next: few_rows.cpp.

#pragma once

#include "states.h"

namespace few_rows {

// One head of one query, which reads slots first..last - 1 of its row.
struct Reader {
  const float* query;
  int64_t first, last;
  Numbers weights;  // by slot, from `first`: scores, and then their softmax
  float* mixed;

  float* weight_of(int64_t slot) { return weights.data() + slot - first; }
};

constexpr size_t AT_ONCE = 8;  // queries of a row that one thread answers, reading what is cached once
constexpr int SLOTS = WIDTH;  // that are scored together

// The scores of SLOTS keys for one head. The order of summation does not depend on what else is scored.
template <class Cached>
void score(const Cached* const* keys, Reader& reader, int64_t slot, int64_t head_dim, float scale) {
  Floats sums[SLOTS];
#pragma GCC unroll 16
  for (int s = 0; s < SLOTS; ++s) sums[s] = Floats{};
  const int64_t whole = head_dim - head_dim % WIDTH;
  for (int64_t d = 0; d < whole; d += WIDTH) {
    Floats query = load(reader.query + d);
    hold(query);
#pragma GCC unroll 16
    for (int s = 0; s < SLOTS; ++s) sums[s] = multiply_add(load(keys[s] + d), query, sums[s]);
  }
  if (whole < head_dim) {
    const Floats query = load_first(reader.query + whole, head_dim - whole);
#pragma GCC unroll 16
    for (int s = 0; s < SLOTS; ++s) sums[s] = multiply_add(load_first(keys[s] + whole, head_dim - whole), query, sums[s]);
  }
  const Floats totals = sum_each(sums) * scale;
  const int64_t first = std::max(slot, reader.first), last = std::min(slot + SLOTS, reader.last);
  if (last - first == SLOTS) std::memcpy(reader.weight_of(slot), &totals, sizeof totals);
  else for (int64_t s = first; s < last; ++s) *reader.weight_of(s) = totals[s - slot];
}

inline void softmax(Numbers& scores) {
  const int64_t length = static_cast<int64_t>(scores.size()), whole = length - length % WIDTH;
  float *score = scores.data(), total = 0;
  Floats largest_by_lane = Floats{} - INFINITY, totals = {};
  for (int64_t s = 0; s < whole; s += WIDTH) {
    const Floats values = load(score + s);
    largest_by_lane = values > largest_by_lane ? values : largest_by_lane;
  }
  float largest = -INFINITY;
  for (int64_t lane = 0; lane < WIDTH; ++lane) largest = std::max(largest, largest_by_lane[lane]);
  for (int64_t s = whole; s < length; ++s) largest = std::max(largest, score[s]);
  for_each(score, score, length, [&](Floats values, Floats) { return exp(values - largest); });
  for (int64_t s = 0; s < whole; s += WIDTH) totals += load(score + s);
  total = sum(totals);
  for (int64_t s = whole; s < length; ++s) total += score[s];
  const float share = 1.0f / total;  // one division for all
  for_each(score, score, length, [&](Floats values, Floats) { return values * share; });
}

// mixed[d] += weight[s] * values[s][d] for PARTS registers of d, slot after slot, for HEADS heads of one query.
template <int HEADS, int PARTS, class Cached>
void mix_parts(const Cached* values, Reader* readers, int64_t begin, int64_t end, int64_t head_dim, int64_t d) {
  Floats sums[HEADS][PARTS];
  for (int h = 0; h < HEADS; ++h) std::memcpy(sums[h], readers[h].mixed + d, sizeof sums[h]);
  for (int64_t s = begin; s < end; ++s)
    for (int p = 0; p < PARTS; ++p) {
      const Floats value = load(values + s * head_dim + d + p * WIDTH);
      for (int h = 0; h < HEADS; ++h) sums[h][p] = multiply_add(Floats{} + *readers[h].weight_of(s), value, sums[h][p]);
    }
  for (int h = 0; h < HEADS; ++h) std::memcpy(readers[h].mixed + d, sums[h], sizeof sums[h]);
}

template <int HEADS, class Cached>
void mix(const Cached* values, Reader* readers, int64_t begin, int64_t end, int64_t head_dim) {
  begin = std::max(begin, readers->first), end = std::min(end, readers->last);
  int64_t d = 0;
  for (; d + 4 * WIDTH <= head_dim; d += 4 * WIDTH) mix_parts<HEADS, 4>(values, readers, begin, end, head_dim, d);
  for (; d + 2 * WIDTH <= head_dim; d += 2 * WIDTH) mix_parts<HEADS, 2>(values, readers, begin, end, head_dim, d);
  for (; d + WIDTH <= head_dim; d += WIDTH) mix_parts<HEADS, 1>(values, readers, begin, end, head_dim, d);
  for (; d < head_dim; ++d)
    for (int h = 0; h < HEADS; ++h)
      for (int64_t s = begin; s < end; ++s) readers[h].mixed[d] += *readers[h].weight_of(s) * number(values[s * head_dim + d]);
}

// All heads that read one row's slots of one key-value head; those of a query stand together.
template <class Cached>
void attend_to_row(const Cached* keys, const Cached* values, std::vector<Reader>& readers, int64_t per_group, int64_t head_dim, float scale) {
  int64_t first = readers[0].first, last = 0;
  for (const Reader& reader : readers) first = std::min(first, reader.first), last = std::max(last, reader.last);
  // What is read of the cache serves all readers while it is near.
  const auto by_two_heads = [&](auto with_two, auto with_one) {
    for (size_t query = 0; query < readers.size(); query += per_group) {
      int64_t h = 0;
      for (; h + 2 <= per_group; h += 2) with_two(&readers[query + h]);
      if (h < per_group) with_one(&readers[query + h]);
    }
  };
  constexpr int64_t LINE = 64 / sizeof(Cached), AHEAD = 2;
  for (int64_t slot = first; slot < last; slot += SLOTS) {
    const Cached* block[SLOTS];
    for (int s = 0; s < SLOTS; ++s) block[s] = keys + std::min(slot + s, last - 1) * head_dim;
    // What is read next is asked for while this is scored, values too: they are wanted as soon as all keys were.
    const int64_t later = slot + AHEAD * SLOTS;
    for (int64_t d = later * head_dim; d < std::min(later + SLOTS, last) * head_dim; d += LINE) __builtin_prefetch(keys + d);
    for (int64_t d = slot * head_dim; d < std::min(slot + SLOTS, last) * head_dim; d += LINE) __builtin_prefetch(values + d, 0, 2);
    for (Reader& reader : readers) score(block, reader, slot, head_dim, scale);
  }
  for (Reader& reader : readers) softmax(reader.weights);
  constexpr int64_t NEAR = 64;
  for (int64_t slot = first; slot < last; slot += NEAR)
    by_two_heads(
        [&](Reader* two) { mix<2>(values, two, slot, slot + NEAR, head_dim); }, [&](Reader* one) { mix<1>(values, one, slot, slot + NEAR, head_dim); });
}

inline void attend_into(
    const Tensor& mixed_heads, const Tensor& queries, const Tensor& new_keys, const Tensor& new_values, const Tensor& keys, const Tensor& values,
    const Tensor& rows, const Tensor& positions, int64_t window, double scale) {
  const int64_t n_queries = present_rows(queries), heads = queries.size(1), head_dim = queries.size(2);
  const int64_t groups = keys.size(1), capacity = keys.size(2), per_group = heads / groups;
  const int64_t* row = static_cast<const int64_t*>(rows.data_ptr());
  const int64_t* position = static_cast<const int64_t*>(positions.data_ptr());
  std::vector<std::vector<int64_t>> queries_of(keys.size(0)), together;
  int64_t longest = 0;
  for (int64_t n = 0; n < n_queries; ++n) {
    STD_TORCH_CHECK(0 <= position[n] && position[n] < capacity, "a position lies outside the cache");
    STD_TORCH_CHECK(0 <= row[n] && row[n] < keys.size(0), "a row lies outside the cache");
    queries_of[row[n]].push_back(n);
    longest = std::max(longest, position[n] + 1);
  }
  for (const auto& of_row : queries_of)
    for (size_t first = 0; first < of_row.size(); first += AT_ONCE)
      together.emplace_back(of_row.begin() + first, of_row.begin() + std::min(first + AT_ONCE, of_row.size()));
  const Reading query(queries), added_keys(new_keys), added_values(new_values);
  Writing y(mixed_heads, n_queries * heads * head_dim);
  std::fill_n(y.data(), n_queries * heads * head_dim, 0.0f);

  with_float_type(keys.scalar_type(), [&](auto type) {
    auto* all_keys = static_cast<decltype(type)>(keys.data_ptr());
    auto* all_values = static_cast<decltype(type)>(values.data_ptr());
    for (const auto& [cached, added] : {std::pair{all_keys, &added_keys}, std::pair{all_values, &added_values}})
      for (int64_t n = 0; n < n_queries; ++n)
        for (int64_t g = 0; g < groups; ++g)
          for (int64_t d = 0; d < head_dim; ++d)
            store((*added)[(n * groups + g) * head_dim + d], cached + ((row[n] * groups + g) * capacity + position[n]) * head_dim + d);

    const int64_t bytes = 2 * longest * head_dim * static_cast<int64_t>(sizeof *all_keys);
    const int64_t units = static_cast<int64_t>(together.size()) * groups;
    torch::stable::parallel_for(0, units, grain(bytes), [&](int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; ++unit) {
        const std::vector<int64_t>& of_row = together[unit / groups];
        std::vector<Reader> readers;
        for (int64_t n : of_row)
          for (int64_t h = 0; h < per_group; ++h) {
            const int64_t last = position[n] + 1, first = window > 0 ? std::max<int64_t>(0, last - window) : 0;
            const int64_t at = (n * heads + unit % groups * per_group + h) * head_dim;
            readers.push_back({query.data() + at, first, last, Numbers(last - first), y.data() + at});
          }
        const int64_t start = (row[of_row[0]] * groups + unit % groups) * capacity * head_dim;
        attend_to_row(all_keys + start, all_values + start, readers, per_group, head_dim, static_cast<float>(scale));
      }
    });
  });
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
