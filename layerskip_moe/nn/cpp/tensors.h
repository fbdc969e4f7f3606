// PyTorch's tensors as numbers of float32 and back, and how work on them is split among threads.
//
// Knows nothing of operators. Next: program.h.

#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <exception>
#include <optional>

#include "packed.h"

namespace few_rows {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class Function>
void with_float_type(ScalarType type, const Function& function) {
  if (type == ScalarType::Float) return function(static_cast<float*>(nullptr));
  if (type == ScalarType::Half) return function(static_cast<Half*>(nullptr));
  STD_TORCH_CHECK(type == ScalarType::BFloat16, "few-row products take float32, bfloat16 and float16");
  function(static_cast<BFloat16*>(nullptr));
}

template <class Function>
void with_weight_type(ScalarType type, const Function& function) {
  if (type == ScalarType::Char) return function(static_cast<int8_t*>(nullptr));
  with_float_type(type, function);
}

inline void check_dense(const Tensor& tensor) { STD_TORCH_CHECK(tensor.is_contiguous(), "few-row products take contiguous tensors"); }

inline void check_sizes(bool fit) { STD_TORCH_CHECK(fit, "few-row operators take tensors whose sizes fit together"); }

inline void check_dense(const Tensor& tensor, ScalarType type) {
  check_dense(tensor);
  STD_TORCH_CHECK(tensor.scalar_type() == type, "few-row operators take int64 numbers of tokens, rows and experts, float32 angles and float64 noise");
}

// How many rows are there, of how many that the tensors at hand have room for (program.h): what is computed is computed
// for those. Else a tensor's rows are all there.
struct Rows {
  int64_t rows, room;
};
inline thread_local Rows rows_there = {1, 1};

// Of a tensor's first dimension, rows or so many parts of each, what is there.
inline int64_t present_rows(const Tensor& tensor) { return tensor.size(0) / rows_there.room * rows_there.rows; }

// The numbers of a tensor's rows that are there.
inline int64_t present_numbers(const Tensor& tensor) { return tensor.numel() / rows_there.room * rows_there.rows; }

// x [rows, ...] in float32. Rows may lie apart, as those of a part of a projection do; what is within a row lies together.
// They are those that are there, or all.
inline Numbers as_floats(const Tensor& x, bool all = false) {
  int64_t per_row = 1;
  for (int64_t dim = x.dim() - 1; dim > 0; --dim) {
    STD_TORCH_CHECK(x.size(dim) == 1 || x.stride(dim) == per_row, "few-row products take rows that lie together");
    per_row *= x.size(dim);
  }
  const int64_t rows = all ? x.size(0) : present_rows(x), apart = x.stride(0);
  Numbers floats(rows * per_row);
  with_float_type(x.scalar_type(), [&](auto type) {
    const auto* from = static_cast<decltype(type)>(x.data_ptr());
    for (int64_t n = 0; n < rows; ++n)
      for (int64_t i = 0; i < per_row; ++i) floats[n * per_row + i] = number(from[n * apart + i]);
  });
  return floats;
}

// Write numbers into a tensor of their count.
inline void give(const Numbers& floats, const Tensor& y) {
  with_float_type(y.scalar_type(), [&](auto type) {
    auto* to = static_cast<decltype(type)>(y.data_ptr());
    for (size_t i = 0; i < floats.size(); ++i) store(floats[i], to + i);
  });
}

// x [rows, ...] in float32, to read only: where it lies, if it is of that type and its rows lie together; else copied.
class Reading {
 public:
  explicit Reading(const Tensor& x, bool all = false) : count(all ? x.numel() : present_numbers(x)) {
    if (x.scalar_type() == ScalarType::Float && x.is_contiguous()) {
      numbers = static_cast<const float*>(x.data_ptr());
    } else {
      own = as_floats(x, all);
      numbers = own.data();
    }
  }
  Reading(const Reading&) = delete;
  const float* data() const { return numbers; }
  int64_t size() const { return count; }
  float operator[](int64_t i) const { return numbers[i]; }

 private:
  int64_t count;
  const float* numbers;
  Numbers own;
};

// Numbers of float32 that y is to have, so many: written where it lies, if it is of that type, else when this ends, unless
// an error ends it.
class Writing {
 public:
  Writing(const Tensor& y, int64_t count) : y(y), errors(std::uncaught_exceptions()) {
    if (y.scalar_type() == ScalarType::Float) {
      numbers = static_cast<float*>(y.data_ptr());
    } else {
      with_float_type(y.scalar_type(), [](auto) {});  // others are refused
      own = Numbers(count);
      numbers = own.data();
    }
  }
  Writing(const Writing&) = delete;
  ~Writing() {
    if (!own.empty() && std::uncaught_exceptions() == errors) give(own, y);
  }
  float* data() { return numbers; }
  float& operator[](int64_t i) { return numbers[i]; }

 private:
  const Tensor y;
  const int errors;
  float* numbers;
  Numbers own;
};

// Scales or biases of output rows, one by one: there may be none.
class Column {
 public:
  explicit Column(const std::optional<Tensor>& tensor) {
    if (!tensor) return;
    check_dense(*tensor);
    data = tensor->data_ptr(), type = tensor->scalar_type();
    with_float_type(type, [](auto) {});  // others are refused
  }
  bool there() const { return data != nullptr; }
  float operator[](int64_t i) const {
    if (type == ScalarType::Float) return static_cast<const float*>(data)[i];
    if (type == ScalarType::Half) return number(static_cast<const Half*>(data)[i]);
    return number(static_cast<const BFloat16*>(data)[i]);
  }

 private:
  const void* data = nullptr;
  ScalarType type = ScalarType::Float;
};

// Work is split among threads when each gets at least so much: less is done sooner than another one wakes.
constexpr int64_t BYTES_PER_THREAD = 1 << 16, NUMBERS_PER_THREAD = 1 << 12;  // read; computed one by one

inline int64_t grain(int64_t bytes_per_unit) { return std::max<int64_t>(1, BYTES_PER_THREAD / std::max<int64_t>(1, bytes_per_unit)); }

}  // namespace few_rows
