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
struct Program {
  std::vector<Tensor> inputs, outputs;
  std::vector<std::function<void()>> steps;
};
inline std::map<int64_t, Program> programs;  // which stay where they are, whatever others are added or taken away
inline std::mutex programs_lock;
inline thread_local Program* recording = nullptr;

inline void perform(std::function<void()> step) {
  step();
  if (recording != nullptr) recording->steps.push_back(std::move(step));
}

inline int64_t record(std::vector<Tensor> inputs) {
  static int64_t count = 0;
  STD_TORCH_CHECK(recording == nullptr, "a recording is under way");
  const std::lock_guard locked(programs_lock);
  recording = &programs[++count];
  recording->inputs = std::move(inputs);
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

inline std::vector<Tensor> replay(int64_t number, std::vector<Tensor> inputs) {
  Program& program = find_program(number);
  check_sizes(inputs.size() == program.inputs.size());
  for (size_t i = 0; i < inputs.size(); ++i) {
    check_dense(inputs[i]);
    const bool same = inputs[i].numel() == program.inputs[i].numel() && inputs[i].scalar_type() == program.inputs[i].scalar_type();
    STD_TORCH_CHECK(same, "a recording takes inputs of the sizes and types it was made with");
    std::memcpy(program.inputs[i].data_ptr(), inputs[i].data_ptr(), inputs[i].numel() * inputs[i].element_size());
  }
  for (const auto& step : program.steps) step();
  std::vector<Tensor> results;
  for (const Tensor& output : program.outputs) results.push_back(torch::stable::clone(output));
  return results;
}

}  // namespace few_rows
