// A round of self-speculation in one call: drafts one after another, then all of them verified, and what the full model
// chooses.
//
// Knows nothing of what the programs compute. Next: few_rows.cpp.

#pragma once

#include "staged.h"

namespace few_rows {

// states_of, choice_of, newest, rows, positions, limits, halves, least: as `replay_drafts` has them; noise [A, n + 1, V];
// verify: (states [N, .], row [N], position [N]) -> (logits [N, V], ...), which is given the newest token's place and those
// of the drafts that are kept, N in all, row by row; states as they were drafted, or, where it takes tokens [N] and runs
// every layer again, these.
// looked_up: as `replay_drafts` has it, where verification takes tokens.
// deepen, sure, history, lookup, sure_lookup, per_repeated, most: where there is such a program (not 0), `replay_staged` drafts,
// of one row, and verification takes tokens.
//
// -> the full model's tokens [A, n + 1], drafts [A, n], their margins [A, n], how many were kept [A], how many of these it
// agreed with before the first that it did not [A], what `replay_staged` counts [5], then what `states_of` gives but the first
// [A, n + 1, .] and what `verify` gives but the first [N, .]. Tokens are of no meaning beyond what was kept, drafts and margins
// beyond one more.
inline std::vector<Tensor> replay_round(
    int64_t states_of, int64_t choice_of, int64_t verify, const Tensor& newest, const Tensor& rows, const Tensor& positions,
    const std::optional<Tensor>& noise, const Tensor& limits, const std::optional<Tensor>& halves, double least,
    const std::optional<Tensor>& looked_up, int64_t deepen, double sure, const Tensor& history, int64_t lookup,
    int64_t sure_lookup, int64_t per_repeated, int64_t most) {
  Program& program = find_program(verify);
  check_sizes(program.inputs.size() == 3 && !program.outputs.empty() && (!noise || noise->size(1) == positions.size(1)));
  const bool anew = program.inputs[0].scalar_type() == ScalarType::Long;
  const bool staged = deepen != 0;
  check_sizes(anew || !(staged || looked_up));
  std::vector<Tensor> drafted = staged
      ? replay_staged(
            states_of, deepen, choice_of, newest, rows, positions, noise, limits, halves, least, sure, history, lookup, sure_lookup,
            per_repeated, most)
      : replay_drafts(states_of, choice_of, newest, rows, positions, noise, limits, halves, least, looked_up, !anew);
  const Tensor &drafts = drafted[0], &kept = drafted[2], &states = drafted[3];
  const int64_t n_rows = newest.numel(), places = positions.size(1), longest = places - 1;
  const int64_t* count = static_cast<const int64_t*>(kept.data_ptr());
  const int64_t* draft = static_cast<const int64_t*>(drafts.data_ptr());

  std::vector<int64_t> row, position, text;
  std::vector<char> start;
  const size_t bytes = anew ? 0 : states.size(2) * states.element_size();
  for (int64_t r = 0; r < n_rows; ++r) {
    if (!anew) {
      const char* first = static_cast<const char*>(states.data_ptr()) + r * places * bytes;
      start.insert(start.end(), first, first + (count[r] + 1) * bytes);
    }
    text.push_back(static_cast<const int64_t*>(newest.data_ptr())[r]);
    text.insert(text.end(), draft + r * longest, draft + r * longest + count[r]);
    for (int64_t place = 0; place <= count[r]; ++place) {
      row.push_back(static_cast<const int64_t*>(rows.data_ptr())[r]);
      position.push_back(static_cast<const int64_t*>(positions.data_ptr())[r * places + place]);
    }
  }
  const int64_t total = static_cast<int64_t>(row.size()), vocabulary = program.outputs[0].numel() / program.room;
  const int64_t width = anew ? 1 : states.size(2);
  check_sizes(total <= program.room && (anew || states.scalar_type() == program.inputs[0].scalar_type()));
  check_sizes(width == program.inputs[0].numel() / program.room && (!noise || noise->size(2) == vocabulary));
  const WithRows there(total, program.room);
  put(program.inputs[0], anew ? static_cast<const void*>(text.data()) : start.data());
  put(program.inputs[1], row.data()), put(program.inputs[2], position.data());
  for (const auto& step : program.steps) step();

  Tensor tokens = torch::stable::new_zeros(newest, {n_rows, places}), accepted = torch::stable::new_zeros(newest, {n_rows});
  const Reading logits(program.outputs[0]);
  const float* logit = logits.data();
  for (int64_t r = 0; r < n_rows; ++r) {
    const double* drawn = noise ? static_cast<const double*>(noise->data_ptr()) + r * places * vocabulary : nullptr;
    int64_t* token = static_cast<int64_t*>(tokens.data_ptr()) + r * places;
    for (int64_t place = 0; place <= count[r]; ++place, logit += vocabulary)
      token[place] = choose_of(logit, drawn == nullptr ? drawn : drawn + place * vocabulary, vocabulary).token;
    int64_t right = 0;
    while (right < count[r] && draft[r * longest + right] == token[right]) ++right;
    static_cast<int64_t*>(accepted.data_ptr())[r] = right;
  }
  std::vector<Tensor> results = {tokens, drafts, drafted[1], kept, accepted,
      staged ? drafted[3] : torch::stable::new_zeros(newest, {5})};
  results.insert(results.end(), drafted.begin() + 4, drafted.end());
  for (size_t o = 1; o < program.outputs.size(); ++o) {
    const Tensor& output = program.outputs[o];
    results.push_back(torch::stable::new_empty(output, {total, output.numel() / program.room}));
    std::memcpy(results.back().data_ptr(), output.data_ptr(), present_numbers(output) * output.element_size());
  }
  return results;
}

}  // namespace few_rows
