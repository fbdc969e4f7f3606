// What happens to states between the products: norms, rotation, sums, gates, what routers remember, and the choice of
// experts and of drafts. Small work, which stays on one thread.
//
// Knows nothing of the network. Next: attention.h.

#pragma once

#include <tuple>

#include "products.h"

namespace few_rows {

inline Tensor embed(const Tensor& tokens, const Tensor& table) {
  check_dense(tokens, ScalarType::Long), check_dense(table);
  Tensor y = torch::stable::new_empty(table, {tokens.size(0), table.size(1)});
  perform([=] {
    const int64_t* token = static_cast<const int64_t*>(tokens.data_ptr());
    const size_t bytes = table.size(1) * table.element_size();
    for (int64_t n = 0; n < present_rows(tokens); ++n) {
      STD_TORCH_CHECK(0 <= token[n] && token[n] < table.size(0), "a token is outside the vocabulary");
      std::memcpy(static_cast<char*>(y.data_ptr()) + n * bytes, static_cast<const char*>(table.data_ptr()) + token[n] * bytes, bytes);
    }
  });
  return y;
}

inline Tensor norm(const Tensor& x, const Tensor& weight, double epsilon) {
  check_sizes(x.size(x.dim() - 1) == weight.numel());
  Tensor y = torch::stable::new_empty(x, x.sizes());
  perform([=] {
    const int64_t width = weight.numel();
    const Reading weights(weight, true), floats(x);
    Writing normed(y, floats.size());
    float* part = normed.data();
    for (const float* values = floats.data(); values < floats.data() + floats.size(); values += width, part += width) {
      float squares[1][4];
      dot<1, 1, false>(values, &values, width, squares);
      const float scale = 1.0f / std::sqrt(squares[0][0] / static_cast<float>(width) + static_cast<float>(epsilon));
      for (int64_t d = 0; d < width; ++d) part[d] = values[d] * (scale * weights[d]);
    }
  });
  return y;
}

inline Tensor rotate(const Tensor& x, const Tensor& cos, const Tensor& sin, const Tensor& positions) {
  check_dense(cos, ScalarType::Float), check_dense(sin, ScalarType::Float), check_dense(positions, ScalarType::Long);
  check_sizes(x.dim() == 3 && positions.numel() == x.size(0) && cos.size(1) == x.size(2) && sin.numel() == cos.numel());
  Tensor y = torch::stable::new_empty(x, x.sizes());
  perform([=] {
    const int64_t rows = present_rows(x), heads = x.size(1), head_dim = x.size(2), half = head_dim / 2;
    const int64_t* position = static_cast<const int64_t*>(positions.data_ptr());
    const Reading floats(x);
    Writing turned(y, floats.size());
    const int64_t angles = cos.size(0);
    for (int64_t n = 0; n < rows; ++n) {
      STD_TORCH_CHECK(0 <= position[n] && position[n] < angles, "a position has no angle");
      const float* c = static_cast<const float*>(cos.data_ptr()) + position[n] * head_dim;
      const float* s = static_cast<const float*>(sin.data_ptr()) + position[n] * head_dim;
      for (int64_t at = n * heads * head_dim; at < (n + 1) * heads * head_dim; at += head_dim) {
        const float* head = floats.data() + at;
        float* out = turned.data() + at;
        for (int64_t d = 0; d < half; ++d) {
          out[d] = head[d] * c[d] - head[d + half] * s[d];
          out[d + half] = head[d + half] * c[d + half] + head[d] * s[d + half];
        }
      }
    }
  });
  return y;
}

inline Tensor add(const Tensor& x, const Tensor& y) {
  check_sizes(x.numel() == y.numel());
  Tensor total = torch::stable::new_empty(x, x.sizes());
  perform([=] {
    const Reading floats(x), others(y);
    Writing sums(total, floats.size());
    const float *one = floats.data(), *other = others.data();
    float* sum = sums.data();
    for (int64_t i = 0; i < floats.size(); ++i) sum[i] = one[i] + other[i];
  });
  return total;
}

inline Tensor swiglu(const Tensor& gate_up) {
  Tensor y = torch::stable::new_empty(gate_up, {gate_up.size(0), gate_up.size(1) / 2});
  perform([=] {
    const int64_t rows = present_rows(gate_up), hidden = gate_up.size(1) / 2;
    const Reading floats(gate_up);
    Writing activation(y, rows * hidden);
    activate_rows(floats.data(), rows, hidden, activation.data());
  });
  return y;
}

inline Tensor gate(const Tensor& x, const Tensor& logits) {
  check_sizes(logits.numel() == x.size(0));
  Tensor y = torch::stable::new_empty(x, x.sizes());
  perform([=] {
    Numbers floats = as_floats(x);
    const Numbers gates = as_floats(logits);
    for (size_t i = 0; i < floats.size(); ++i) floats[i] /= 1.0f + std::exp(-gates[i / (floats.size() / gates.size())]);
    give(floats, y);
  });
  return y;
}

inline std::tuple<Tensor, Tensor> route(const Tensor& logits, const std::optional<Tensor>& bias, int64_t top_k, bool normalize) {
  check_dense(logits);
  STD_TORCH_CHECK(logits.scalar_type() == ScalarType::Float, "routers have float32 logits");
  check_sizes(logits.dim() == 2 && top_k <= logits.size(1) && (!bias || bias->numel() == logits.size(1)));
  Tensor chosen = torch::stable::new_empty(logits, {logits.size(0), top_k}, ScalarType::Long);
  Tensor weights = torch::stable::new_empty(logits, {logits.size(0), top_k});
  perform([=] {
    const int64_t rows = present_rows(logits), n_experts = logits.size(1);
    const Column biases(bias);
    Numbers probabilities(n_experts), scores(n_experts);
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
        scores[e] = std::isinf(logit[e]) ? -1e30f : probabilities[e] + (biases.there() ? biases[e] : 0.0f);
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

inline Tensor remember(
    const Tensor& logits, const Tensor& memory, const Tensor& rows, const Tensor& positions, std::vector<double> weights, int64_t hold) {
  check_dense(logits), check_dense(memory), check_dense(rows, ScalarType::Long), check_dense(positions, ScalarType::Long);
  STD_TORCH_CHECK(logits.scalar_type() == ScalarType::Float && memory.scalar_type() == ScalarType::Float, "routers have float32 logits");
  check_sizes(logits.dim() == 2 && memory.dim() == 3 && memory.size(2) == logits.size(1) && hold > 0);
  check_sizes(rows.numel() == logits.size(0) && positions.numel() == logits.size(0));
  Tensor y = torch::stable::new_empty(logits, logits.sizes());
  perform([=] {
    const int64_t count = present_rows(logits), n_experts = logits.size(1), capacity = memory.size(1);
    const int64_t* row = static_cast<const int64_t*>(rows.data_ptr());
    const int64_t* position = static_cast<const int64_t*>(positions.data_ptr());
    const float* logit = static_cast<const float*>(logits.data_ptr());
    float* kept = static_cast<float*>(memory.data_ptr());
    for (int64_t n = 0; n < count; ++n) {
      STD_TORCH_CHECK(0 <= position[n] && position[n] < capacity, "a position lies outside the cache");
      STD_TORCH_CHECK(0 <= row[n] && row[n] < memory.size(0), "a row lies outside the cache");
      std::memcpy(kept + (row[n] * capacity + position[n]) * n_experts, logit + n * n_experts, n_experts * sizeof(float));
    }
    Numbers totals(count * n_experts, 0.0f);
    for (int64_t n = 0; n < count; ++n) {
      const int64_t latest = position[n] - position[n] % hold;
      const float* slot = kept + (row[n] * capacity + latest) * n_experts;
      float *total = totals.data() + n * n_experts, share = 0;
      for (int64_t back = 0; back <= latest && back < static_cast<int64_t>(weights.size()); ++back, slot -= n_experts) {
        const float weight = static_cast<float>(weights[back]);
        for (int64_t e = 0; e < n_experts; ++e) total[e] += weight * slot[e];
        share += weight;
      }
      for (int64_t e = 0; e < n_experts; ++e) total[e] /= share;
    }
    give(totals, y);
  });
  return y;
}

// What a row says, by how much it is larger than what is largest but for it, and where that is.
struct Choice {
  int64_t token;
  double margin;
  int64_t second;
};

// As many float64 numbers as a register has room for.
constexpr int64_t LANES = WIDTH / 2;
using Doubles = double __attribute__((vector_size(8 * LANES)));
using Indices = int64_t __attribute__((vector_size(8 * LANES)));
using HalfFloats = float __attribute__((vector_size(4 * LANES)));

// Where a row's logits, plus noise if there is any, are largest; of equal ones the first, and the first that is not a number,
// if there is one, as torch has it.
inline Choice choose_of(const float* logits, const double* noise, int64_t vocabulary) {
  const auto score_of = [&](int64_t token) { return logits[token] + (noise == nullptr ? 0.0 : noise[token]); };
  const int64_t whole = vocabulary - vocabulary % LANES;
  Doubles largest = Doubles{} - INFINITY, lesser = largest;
  Indices best = {}, second = {}, at = {}, is_nan = {};
  for (int64_t lane = 0; lane < LANES; ++lane) at[lane] = lane;
  for (int64_t token = 0; token < whole; token += LANES, at += LANES) {
    const Doubles logit = __builtin_convertvector(copy_from<HalfFloats>(logits + token), Doubles);
    const Doubles score = logit + (noise == nullptr ? Doubles{} : copy_from<Doubles>(noise + token));
    is_nan |= score != score;
    const Indices larger = score > largest;
    const Doubles lower = larger ? largest : score;
    const Indices lower_at = larger ? best : at, not_least = lower > lesser;
    lesser = not_least ? lower : lesser;
    second = not_least ? lower_at : second;
    largest = larger ? score : largest;
    best = larger ? at : best;
  }
  Choice choice{0, 0, 0};
  double top = -INFINITY, next = -INFINITY;
  const auto meet = [&](double score, int64_t token) {
    if (score > top || (score == top && token < choice.token)) next = top, choice.second = choice.token, top = score, choice.token = token;
    else if (score > next) next = score, choice.second = token;
  };
  bool numbers = true;
  for (int64_t lane = 0; lane < LANES; ++lane) {
    numbers &= !is_nan[lane];
    meet(largest[lane], best[lane]), meet(lesser[lane], second[lane]);
  }
  for (int64_t token = whole; token < vocabulary; ++token) {
    const double score = score_of(token);
    numbers &= !std::isnan(score);
    meet(score, token);
  }
  choice.margin = top - next;
  for (int64_t token = 0; !numbers; ++token)
    if (std::isnan(score_of(token))) return {token, NAN, token};
  return choice;
}

// The same where the logits are products of x [inputs] and a copy of w [vocabulary, inputs], rounded: of the two that are
// largest by these, whichever is by w itself.
template <class Weight, class Logit>
Choice choose_again(Choice choice, const Weight* w, const float* x, int64_t inputs, const double* noise, Logit) {
  if (choice.second == choice.token) return choice;
  const auto score_of = [&](int64_t token) {
    float product[1][4];
    dot<1, 1, false>(w + token * inputs, &x, inputs, product);
    Logit logit;
    store(product[0][0], &logit);
    return number(logit) + (noise == nullptr ? 0.0 : noise[token]);
  };
  const double first = score_of(choice.token), second = score_of(choice.second);
  if (second > first || (second == first && choice.second < choice.token)) std::swap(choice.token, choice.second);
  choice.margin = std::abs(first - second);
  return choice;
}

// Without noise a row's margin is that of its logits. x [N, K], weight [V, K]: of which the logits are products by a copy that
// was rounded, if they are.
inline std::tuple<Tensor, Tensor> choose(
    const Tensor& logits, const std::optional<Tensor>& noise, const std::optional<Tensor>& x, const std::optional<Tensor>& weight) {
  if (noise) check_dense(*noise, ScalarType::Double);
  check_sizes(logits.dim() == 2 && (!noise || noise->numel() == logits.numel()) && x.has_value() == weight.has_value());
  if (weight) check_dense(*weight), check_sizes(x->dim() == 2 && x->size(0) == logits.size(0));
  if (weight) check_sizes(weight->size(0) == logits.size(1) && weight->size(1) == x->size(1));
  Tensor tokens = torch::stable::new_empty(logits, {logits.size(0)}, ScalarType::Long);
  Tensor margins = torch::stable::new_empty(logits, {logits.size(0)}, ScalarType::Double);
  perform([=] {
    const int64_t rows = present_rows(logits), vocabulary = logits.size(1);
    const Reading floats(logits);
    const double* drawn = noise ? static_cast<const double*>(noise->data_ptr()) : nullptr;
    const Numbers states = x ? as_floats(*x) : Numbers();
    for (int64_t n = 0; n < rows; ++n) {
      const double* of_row = drawn == nullptr ? drawn : drawn + n * vocabulary;
      Choice choice = choose_of(floats.data() + n * vocabulary, of_row, vocabulary);
      if (weight) {
        const int64_t inputs = x->size(1);
        with_float_type(weight->scalar_type(), [&](auto of_weight) {
          const auto* w = static_cast<decltype(of_weight)>(weight->data_ptr());
          with_float_type(logits.scalar_type(), [&](auto of_logit) {
            choice = choose_again(choice, w, states.data() + n * inputs, inputs, of_row, std::remove_pointer_t<decltype(of_logit)>());
          });
        });
      }
      static_cast<int64_t*>(tokens.data_ptr())[n] = choice.token;
      static_cast<double*>(margins.data_ptr())[n] = choice.margin;
    }
  });
  return {tokens, margins};
}

}  // namespace few_rows
