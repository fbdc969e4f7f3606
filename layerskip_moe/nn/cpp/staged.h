// Drafts of drafts, of one row: the first layers propose tokens while they are sure, or the text does, where it repeats
// itself, and the others that draft run over all that was proposed at once, and choose (staged speculative decoding, Spector
// and Re, arXiv 2308.04623). Where the text has repeated itself for long, it ends the round: what followed is drafted as it is.
//
// What layers draft is what `replay_drafts` would, by all of them one token after another, to the last bit: a proposal only
// says which token to run next. Knows nothing of what the programs compute. Next: rounds.h.

#pragma once

#include "drafts.h"

namespace few_rows {

// Where the last tokens of a text last stood before, and how many of them did, at least as many as were asked for.
struct Repetition {
  int64_t length = 0, next = 0;  // 0: they stand nowhere else; what followed them stands at `next`

  // So many tokens that followed; where there are fewer, the text is taken to go on repeating itself.
  std::vector<int64_t> continuation(const std::vector<int64_t>& text, int64_t wanted) const {
    std::vector<int64_t> found;
    const int64_t end = static_cast<int64_t>(text.size());
    for (int64_t at = next; length > 0 && static_cast<int64_t>(found.size()) < wanted; ++at)
      found.push_back(at < end ? text[at] : found[at - end]);
    return found;
  }
};

inline Repetition repetition(const std::vector<int64_t>& text, int64_t least) {
  const int64_t end = static_cast<int64_t>(text.size());
  for (int64_t start = end - 1 - least; least > 0 && start >= 0; --start) {
    if (!std::equal(text.end() - least, text.end(), text.begin() + start)) continue;
    int64_t length = least;
    while (length < start + least && text[start + least - 1 - length] == text[end - 1 - length]) ++length;
    return {length, start + least};
  }
  return {};
}

// states_of, choice_of, newest, rows, positions, noise, limits, halves, least: as `replay_drafts` has them, of one row; the
// first states that `states_of` gives are after the layers that propose.
// deepen: (states [N, .], row [N], position [N]) -> states [N, .] after all layers that draft, which `choice_of` takes, too
// sure: the least margin of a proposal that is followed
// history: [.] the text, of which newest is the last; lookup: how many of its tokens are looked for earlier in it, 0 for no
// such proposals; sure_lookup: how many must have stood there for what followed to end the round, per_repeated times as many
// drafts as stood there at most, 0 if it never does; neither is done again in a round in which the first of some proposals was
// wrong
// most: places that the later layers run over at a time
//
// -> drafts [1, n], margins [1, n] (not numbers of those that were looked up) and how many are kept [1], as `replay_drafts` has
// them, and [5] what was done: runs of the layers that propose, runs of the others, places that both ran over, runs of the
// head, and drafts that were looked up
inline std::vector<Tensor> replay_staged(
    int64_t states_of, int64_t deepen, int64_t choice_of, const Tensor& newest, const Tensor& rows, const Tensor& positions,
    const std::optional<Tensor>& noise, const Tensor& limits, const std::optional<Tensor>& halves, double least, double sure,
    const Tensor& history, int64_t lookup, int64_t sure_lookup, int64_t per_repeated, int64_t most) {
  Program &first = find_program(states_of), &later = find_program(deepen), &choice = find_program(choice_of);
  const int64_t longest = positions.size(1) - 1, vocabulary = noise ? noise->size(2) : 0;
  for (const Tensor* numbers : {&newest, &rows, &positions, &limits, &history}) check_dense(*numbers, ScalarType::Long);
  check_sizes(newest.numel() == 1 && rows.numel() == 1 && positions.numel() == longest + 1 && limits.numel() == 1);
  check_sizes(first.inputs.size() == 3 && later.inputs.size() == 3 && choice.inputs.size() == (noise ? 2 : 1));
  check_sizes(!first.outputs.empty() && !later.outputs.empty() && choice.outputs.size() == 2);
  check_sizes(0 < most && most <= std::min({first.room, later.room, choice.room}));
  const auto width_of = [](const Tensor& tensor, const Program& program) { return tensor.numel() / program.room * tensor.element_size(); };
  const int64_t bytes = width_of(first.outputs[0], first);
  check_sizes(bytes == width_of(later.inputs[0], later) && bytes == width_of(later.outputs[0], later));
  check_sizes(bytes == width_of(choice.inputs[0], choice));
  if (noise) check_dense(*noise, ScalarType::Double), check_sizes(noise->dim() == 3 && noise->size(0) == 1 && noise->size(1) >= longest);
  if (noise) check_sizes(vocabulary == choice.inputs[1].numel() / choice.room);
  if (halves) check_dense(*halves, ScalarType::Double), check_sizes(halves->numel() == 1);
  const int64_t limit = *static_cast<const int64_t*>(limits.data_ptr());
  check_sizes(0 <= limit && limit <= longest);

  std::vector<Tensor> results = {torch::stable::new_zeros(newest, {1, longest}),
      torch::stable::new_zeros(newest, {1, longest}, ScalarType::Double), torch::stable::new_zeros(newest, {1}),
      torch::stable::new_zeros(newest, {5})};
  int64_t* draft = static_cast<int64_t*>(results[0].data_ptr());
  double* margin = static_cast<double*>(results[1].data_ptr());
  int64_t& kept = *static_cast<int64_t*>(results[2].data_ptr());
  int64_t* counts = static_cast<int64_t*>(results[3].data_ptr());
  const int64_t* position = static_cast<const int64_t*>(positions.data_ptr());
  const std::vector<int64_t> row(most, *static_cast<const int64_t*>(rows.data_ptr()));
  const int64_t* chosen = static_cast<const int64_t*>(choice.outputs[0].data_ptr());
  const double* by = static_cast<const double*>(choice.outputs[1].data_ptr());
  std::vector<char> pending(most * bytes);  // states after the layers that propose
  std::vector<int64_t> run(most);  // tokens: the last one that was chosen, and proposals
  const int64_t* given = static_cast<const int64_t*>(history.data_ptr());
  std::vector<int64_t> text(given, given + history.numel());
  double all_right = 1.0;

  const auto choose = [&](const void* states, int64_t place, int64_t count) {  // for so many places, from there on
    const WithRows there(count, choice.room);
    put(choice.inputs[0], states);
    if (noise) put(choice.inputs[1], static_cast<const double*>(noise->data_ptr()) + place * vocabulary);
    for (const auto& step : choice.steps) step();
    ++counts[3];
  };
  for (bool more = true; more && kept < limit;) {
    const int64_t done = kept, longest_run = std::min(most, limit - done);
    run[0] = done == 0 ? *static_cast<const int64_t*>(newest.data_ptr()) : draft[done - 1];
    const Repetition found = repetition(text, lookup);
    if (sure_lookup > 0 && found.length >= sure_lookup) {
      for (int64_t token : found.continuation(text, std::min(limit - done, per_repeated * found.length)))
        draft[kept] = token, margin[kept++] = NAN, ++counts[4];
      break;
    }
    const std::vector<int64_t> repeated = found.continuation(text, longest_run - 1);
    std::copy(repeated.begin(), repeated.end(), run.begin() + 1);
    int64_t count = 0;  // of the run, those that the layers that propose ran over
    while (true) {
      const int64_t some = 1 + static_cast<int64_t>(repeated.size());
      {
        const WithRows there(some, first.room);
        put(first.inputs[0], run.data() + count), put(first.inputs[1], row.data()), put(first.inputs[2], position + done + count);
        for (const auto& step : first.steps) step();
        std::memcpy(pending.data() + count * bytes, first.outputs[0].data_ptr(), some * bytes);
      }
      ++counts[0], count += some;
      if (count == longest_run || !repeated.empty()) break;
      choose(pending.data() + (count - 1) * bytes, done + count - 1, 1);
      if (!(by[0] >= sure)) break;  // (nor where it is not a number)
      run[count] = chosen[0];
    }
    {
      const WithRows there(count, later.room);
      put(later.inputs[0], pending.data()), put(later.inputs[1], row.data()), put(later.inputs[2], position + done);
      for (const auto& step : later.steps) step();
    }
    ++counts[1], counts[2] += count;
    choose(later.outputs[0].data_ptr(), done, count);
    if (!repeated.empty() && chosen[0] != run[1]) lookup = 0;
    for (int64_t i = 0; i < count; ++i) {
      draft[done + i] = chosen[i], margin[done + i] = by[i];
      if (halves) {
        all_right *= likely_right(by[i], *static_cast<const double*>(halves->data_ptr()));
        more = all_right >= least;
      }
      if (!more) break;
      ++kept, text.push_back(chosen[i]);
      if (i + 1 < count && chosen[i] != run[i + 1]) break;
    }
  }
  return results;
}

}  // namespace few_rows
