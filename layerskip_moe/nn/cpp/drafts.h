// Drafting many tokens one after another in one call, of two programs: from tokens to states, and from states to tokens.
//
// Knows nothing of what the programs compute. Next: rounds.h.

#pragma once

#include "states.h"

namespace few_rows {

// states_of: (token [A], row [A], position [A]) -> states [A, .], of which the first are what `choice_of` takes;
// choice_of: (states [A, .], noise [A, V], if there is any) -> (token [A], certainty [A]).
// newest, rows, limits: [A]; positions [A, n + 1]; noise [A, n, V]; floors [A], without which they are 0.
//
// A row drafts until it has limits[r] drafts, or the product of its certainties falls below floors[r]: that draft is
// thrown away. The others are still drafted for, and what becomes of its row meanwhile has no meaning. -> drafts [A, n],
// certainties [A, n], how many each row has [A], and of each of the states [A, n + 1, .]: of newest and of every draft
// that is there, and nothing else.
inline std::vector<Tensor> replay_drafts(
    int64_t states_of, int64_t choice_of, const Tensor& newest, const Tensor& rows, const Tensor& positions, const std::optional<Tensor>& noise,
    const Tensor& limits, const std::optional<Tensor>& floors) {
  Program &states_program = find_program(states_of), &choice_program = find_program(choice_of);
  const int64_t n_rows = newest.numel(), places = positions.size(1);
  for (const Tensor* numbers : {&newest, &rows, &positions, &limits}) check_dense(*numbers, ScalarType::Long);
  if (floors) check_dense(*floors, ScalarType::Double);
  check_sizes(rows.numel() == n_rows && positions.numel() == n_rows * places && limits.numel() == n_rows && (!floors || floors->numel() == n_rows));
  check_sizes(n_rows <= states_program.room && n_rows <= choice_program.room);
  check_sizes(states_program.inputs.size() == 3 && choice_program.inputs.size() == (noise ? 2 : 1));
  check_sizes(!states_program.outputs.empty() && choice_program.outputs.size() == 2);
  check_sizes(states_program.outputs[0].numel() / states_program.room == choice_program.inputs[0].numel() / choice_program.room);
  check_sizes(!noise || noise->size(2) == choice_program.inputs[1].numel() / choice_program.room);
  if (noise) check_dense(*noise, ScalarType::Double), check_sizes(noise->dim() == 3 && noise->size(0) == n_rows && noise->size(1) + 1 >= places);

  Tensor drafts = torch::stable::new_zeros(newest, {n_rows, places - 1});
  Tensor certainties = torch::stable::new_zeros(newest, {n_rows, places - 1}, ScalarType::Float);
  Tensor counts = torch::stable::new_zeros(newest, {n_rows});
  std::vector<Tensor> results = {drafts, certainties, counts};
  for (const Tensor& output : states_program.outputs)
    results.push_back(torch::stable::new_zeros(output, {n_rows, places, output.numel() / states_program.room}));

  const int64_t* position = static_cast<const int64_t*>(positions.data_ptr());
  const int64_t* limit = static_cast<const int64_t*>(limits.data_ptr());
  int64_t* count = static_cast<int64_t*>(counts.data_ptr());
  std::vector<int64_t> token(static_cast<const int64_t*>(newest.data_ptr()), static_cast<const int64_t*>(newest.data_ptr()) + n_rows), at(n_rows);
  std::vector<double> product(n_rows, 1.0);
  for (int64_t place = 0; place < places; ++place) {
    {
      const WithRows there(n_rows, states_program.room);
      for (int64_t r = 0; r < n_rows; ++r) at[r] = position[r * places + place];
      put(states_program.inputs[0], token.data()), put(states_program.inputs[1], rows), put(states_program.inputs[2], at.data());
      for (const auto& step : states_program.steps) step();
    }
    for (size_t o = 0; o < states_program.outputs.size(); ++o) {
      const size_t bytes = results[3 + o].size(2) * results[3 + o].element_size();
      for (int64_t r = 0; r < n_rows; ++r)
        std::memcpy(
            static_cast<char*>(results[3 + o].data_ptr()) + (r * places + place) * bytes,
            static_cast<const char*>(states_program.outputs[o].data_ptr()) + r * bytes, bytes);
    }
    bool goes_on = false;
    for (int64_t r = 0; r < n_rows; ++r) goes_on = goes_on || (count[r] == place && limit[r] > place && place + 1 < places);
    if (!goes_on) break;
    const WithRows there(n_rows, choice_program.room);
    put(choice_program.inputs[0], states_program.outputs[0].data_ptr());
    if (noise) {
      const int64_t vocabulary = noise->size(2);
      for (int64_t r = 0; r < n_rows; ++r)
        std::memcpy(
            static_cast<double*>(choice_program.inputs[1].data_ptr()) + r * vocabulary,
            static_cast<const double*>(noise->data_ptr()) + (r * noise->size(1) + place) * vocabulary, vocabulary * sizeof(double));
    }
    for (const auto& step : choice_program.steps) step();
    const int64_t* chosen = static_cast<const int64_t*>(choice_program.outputs[0].data_ptr());
    const float* certainty = static_cast<const float*>(choice_program.outputs[1].data_ptr());
    goes_on = false;
    for (int64_t r = 0; r < n_rows; ++r) {
      static_cast<int64_t*>(drafts.data_ptr())[r * (places - 1) + place] = token[r] = chosen[r];
      static_cast<float*>(certainties.data_ptr())[r * (places - 1) + place] = certainty[r];
      if (count[r] != place || limit[r] <= place) continue;
      product[r] *= certainty[r];
      // (With a floor of 0 certainties are not asked for, and may be anything.)
      const double floor = floors ? static_cast<const double*>(floors->data_ptr())[r] : 0.0;
      if (floor > 0 && product[r] < floor) continue;
      count[r] = place + 1, goes_on = true;
    }
    if (!goes_on) break;
  }
  return results;
}

}  // namespace few_rows
