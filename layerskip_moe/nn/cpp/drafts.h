// Drafting many tokens one after another in one call, of two programs: from tokens to states, and from states to tokens;
// no more of them than are likely to be right.
//
// Knows nothing of what the programs compute. Next: rounds.h.

#pragma once

#include "states.h"

namespace few_rows {

// How likely a draft of that margin is right, where one of margin `half` is right half of the time.
inline double likely_right(double margin, double half) { return 1.0 - std::exp2(-std::sqrt(margin / half)); }

// states_of: (token [A], row [A], position [A]) -> states [A, .], of which the first are what `choice_of` takes;
// choice_of: (states [A, .], noise [A, V], if there is any) -> token [A], margin [A].
// newest, rows: [A]; positions [A, n + 1]; noise [A, n or more, V]; limits [A], the drafts that a row wants, up to n.
// halves [A], least: the margin rule of ragged.py, if there is one. A draft of margin m is taken to be right with
// probability 1 - 2^-sqrt(m / half), and is kept while all of a row's drafts so far, it too, are right with probability `least` or
// more; then the row drafts no more.
//
// looked_up: [A, n], drafts that no layer is asked for, of rows that have some, and -1 beyond: these rows draft no others,
// and no rule holds for them
//
// last_too: whether the states of a row's last draft are wanted, after which it chooses no other.
//
// -> drafts [A, n], margins [A, n] (not numbers of those that were looked up), how many of each row's are kept [A], and each of
// the states [A, n + 1, .], of newest and of every draft. Without a rule a row keeps what it wants; where the last row drafts
// no more, what would follow is zeros.
inline std::vector<Tensor> replay_drafts(
    int64_t states_of, int64_t choice_of, const Tensor& newest, const Tensor& rows, const Tensor& positions,
    const std::optional<Tensor>& noise, const Tensor& limits, const std::optional<Tensor>& halves, double least,
    const std::optional<Tensor>& looked_up, bool last_too) {
  Program &states_program = find_program(states_of), &choice_program = find_program(choice_of);
  const int64_t n_rows = newest.numel(), places = positions.size(1), longest = places - 1;
  for (const Tensor* numbers : {&newest, &rows, &positions, &limits}) check_dense(*numbers, ScalarType::Long);
  check_sizes(rows.numel() == n_rows && positions.numel() == n_rows * places && limits.numel() == n_rows);
  check_sizes(n_rows <= states_program.room && n_rows <= choice_program.room);
  check_sizes(states_program.inputs.size() == 3 && choice_program.inputs.size() == (noise ? 2 : 1));
  check_sizes(!states_program.outputs.empty() && choice_program.outputs.size() == 2);
  check_sizes(states_program.outputs[0].numel() / states_program.room == choice_program.inputs[0].numel() / choice_program.room);
  check_sizes(!noise || noise->size(2) == choice_program.inputs[1].numel() / choice_program.room);
  if (noise) check_dense(*noise, ScalarType::Double), check_sizes(noise->dim() == 3 && noise->size(0) == n_rows && noise->size(1) + 1 >= places);
  if (halves) check_dense(*halves, ScalarType::Double), check_sizes(halves->numel() == n_rows);
  const double* half = halves ? static_cast<const double*>(halves->data_ptr()) : nullptr;
  const int64_t* limit = static_cast<const int64_t*>(limits.data_ptr());
  for (int64_t r = 0; r < n_rows; ++r) check_sizes(0 <= limit[r] && limit[r] <= longest);

  std::vector<Tensor> results = {torch::stable::new_zeros(newest, {n_rows, longest}),
      torch::stable::new_zeros(newest, {n_rows, longest}, ScalarType::Double), torch::stable::new_zeros(newest, {n_rows})};
  for (const Tensor& output : states_program.outputs)
    results.push_back(torch::stable::new_zeros(output, {n_rows, places, output.numel() / states_program.room}));

  const int64_t* position = static_cast<const int64_t*>(positions.data_ptr());
  int64_t* draft = static_cast<int64_t*>(results[0].data_ptr());
  double* margin = static_cast<double*>(results[1].data_ptr());
  int64_t* kept = static_cast<int64_t*>(results[2].data_ptr());
  std::vector<int64_t> active, token, row(n_rows), at(n_rows);  // of the rows that draft on
  std::vector<double> all_right(n_rows, 1.0);
  if (looked_up) check_dense(*looked_up, ScalarType::Long), check_sizes(looked_up->numel() == n_rows * longest);
  const int64_t* known = looked_up ? static_cast<const int64_t*>(looked_up->data_ptr()) : nullptr;
  for (int64_t r = 0; r < n_rows; ++r) {
    for (int64_t i = r * longest; known != nullptr && kept[r] < limit[r] && known[i] >= 0; ++i)
      draft[i] = known[i], margin[i] = NAN, ++kept[r];
    if (kept[r] == 0) active.push_back(r), token.push_back(static_cast<const int64_t*>(newest.data_ptr())[r]);
  }
  for (int64_t place = 0; !active.empty(); ++place) {
    int64_t wanting = 0;
    for (size_t i = 0; i < active.size(); ++i)
      if (last_too || place < limit[active[i]]) active[wanting] = active[i], token[wanting++] = token[i];
    active.resize(wanting);
    if (active.empty()) break;
    const int64_t n_active = static_cast<int64_t>(active.size());
    for (int64_t i = 0; i < n_active; ++i)
      row[i] = static_cast<const int64_t*>(rows.data_ptr())[active[i]], at[i] = position[active[i] * places + place];
    {
      const WithRows there(n_active, states_program.room);
      put(states_program.inputs[0], token.data()), put(states_program.inputs[1], row.data()), put(states_program.inputs[2], at.data());
      for (const auto& step : states_program.steps) step();
    }
    for (size_t o = 0; o < states_program.outputs.size(); ++o) {
      const Tensor& states = results[3 + o];
      const size_t bytes = states.size(2) * states.element_size();
      for (int64_t i = 0; i < n_active; ++i)
        std::memcpy(
            static_cast<char*>(states.data_ptr()) + (active[i] * places + place) * bytes,
            static_cast<const char*>(states_program.outputs[o].data_ptr()) + i * bytes, bytes);
    }
    std::erase_if(active, [&](int64_t r) { return place >= limit[r]; });
    if (active.empty()) break;
    const int64_t n_choosing = static_cast<int64_t>(active.size());
    const WithRows there(n_choosing, choice_program.room);
    const Tensor& hidden = results[3];
    const size_t bytes = hidden.size(2) * hidden.element_size();
    for (int64_t i = 0; i < n_choosing; ++i)
      std::memcpy(
          static_cast<char*>(choice_program.inputs[0].data_ptr()) + i * bytes,
          static_cast<const char*>(hidden.data_ptr()) + (active[i] * places + place) * bytes, bytes);
    if (noise) {
      const int64_t vocabulary = noise->size(2);
      for (int64_t i = 0; i < n_choosing; ++i)
        std::memcpy(
            static_cast<double*>(choice_program.inputs[1].data_ptr()) + i * vocabulary,
            static_cast<const double*>(noise->data_ptr()) + (active[i] * noise->size(1) + place) * vocabulary, vocabulary * sizeof(double));
    }
    for (const auto& step : choice_program.steps) step();
    int64_t staying = 0;
    for (int64_t i = 0; i < n_choosing; ++i) {
      const int64_t r = active[i], chosen = static_cast<const int64_t*>(choice_program.outputs[0].data_ptr())[i];
      const double of_draft = static_cast<const double*>(choice_program.outputs[1].data_ptr())[i];
      draft[r * longest + place] = chosen, margin[r * longest + place] = of_draft;
      if (half != nullptr) all_right[r] *= likely_right(of_draft, half[r]);
      if (half != nullptr && !(all_right[r] >= least)) continue;
      kept[r] = place + 1, active[staying] = r, token[staying++] = chosen;
    }
    active.resize(staying);
  }
  return results;
}

}  // namespace few_rows
