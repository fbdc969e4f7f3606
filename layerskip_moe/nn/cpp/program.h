// Recording what operators do, and doing it again in one call: see replay.py.
//
// Knows nothing of what is recorded. Next: products.h.

#pragma once

#include <functional>
#include <map>
#include <mutex>
#include <utility>

#include "tensors.h"

namespace few_rows {

// What an operator does, once its result has been allocated, can be recorded and done again: on what its tensors hold
// by then. Calling thirty operators a layer from Python takes longer than a small layer's products do.
// Its tensors have room for a number of rows, and it can be done for fewer.
struct Program {
  std::vector<Tensor> inputs, outputs;
  std::vector<std::function<void()>> steps;
  int64_t room = 1;
};
inline std::map<int64_t, Program> programs;  // which stay where they are, whatever others are added or taken away
inline std::mutex programs_lock;
inline thread_local Program* recording = nullptr;

inline void perform(std::function<void()> step) {
  step();
  if (recording != nullptr) recording->steps.push_back(std::move(step));
}

// Record what operators do to tensors that have room for so many rows, all of which are there now.
inline int64_t record(std::vector<Tensor> inputs, int64_t room) {
  static int64_t count = 0;
  STD_TORCH_CHECK(recording == nullptr, "a recording is under way");
  const std::lock_guard locked(programs_lock);
  recording = &programs[++count];
  recording->inputs = std::move(inputs);
  recording->room = room;
  return count;
}

inline int64_t recorded(std::vector<Tensor> outputs) {
  STD_TORCH_CHECK(recording != nullptr, "no recording is under way");
  recording->outputs = std::move(outputs);
  recording = nullptr;
  return 0;
}

inline int64_t forget(int64_t program) {
  const std::lock_guard locked(programs_lock);
  return static_cast<int64_t>(programs.erase(program));
}

inline Program& find_program(int64_t number) {
  const std::lock_guard locked(programs_lock);
  const auto program = programs.find(number);
  STD_TORCH_CHECK(program != programs.end(), "this recording was forgotten");
  return program->second;
}

// For as long as this lives, so many rows of a program's tensors are there.
struct WithRows {
  WithRows(int64_t rows, int64_t room) { rows_there = {rows, room}; }
  ~WithRows() { rows_there = {1, 1}; }
};

inline void put(const Tensor& into, const void* from) { std::memcpy(into.data_ptr(), from, present_numbers(into) * into.element_size()); }

inline void put(const Tensor& into, const Tensor& from) {
  check_dense(from);
  const bool same = from.numel() == present_numbers(into) && from.scalar_type() == into.scalar_type();
  STD_TORCH_CHECK(same, "a recording takes inputs of the sizes and types it was made with");
  put(into, from.data_ptr());
}

// -> outputs [rows, .]
inline std::vector<Tensor> replay(int64_t number, std::vector<Tensor> inputs, int64_t rows) {
  Program& program = find_program(number);
  check_sizes(inputs.size() == program.inputs.size() && 0 < rows && rows <= program.room);
  const WithRows there(rows, program.room);
  for (size_t i = 0; i < inputs.size(); ++i) put(program.inputs[i], inputs[i]);
  for (const auto& step : program.steps) step();
  std::vector<Tensor> results;
  for (const Tensor& output : program.outputs) {
    results.push_back(torch::stable::new_empty(output, {rows, output.numel() / program.room}));
    std::memcpy(results.back().data_ptr(), output.data_ptr(), present_numbers(output) * output.element_size());
  }
  return results;
}

}  // namespace few_rows
