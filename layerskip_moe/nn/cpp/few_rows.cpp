// Products of few rows with many weights, on a CPU: what decoding, drafting and verification spend their time on.
//
// One row at a time a product is as fast as its weights can be read, and that is what these files are written for: every
// weight is read once, whatever the number of rows, and an expert once for all the rows that chose it. A row's result
// has a fixed order of summation, so it is bit for bit the same beside any number of other rows.
//
// N rows, K inputs, O outputs, D width, F expert hidden size, E experts, H query heads, G key-value heads, C slots.
// Weights and states may be float32, bfloat16 or float16, weights also int8 with a scale per output row; sums are
// float32. What drafts read instead of weights is packed int8 (packed.h). Knows nothing of the network. Next:
// few_rows.py, which says what each operator is; numbers.h, and what includes it.

#include <torch/csrc/stable/library.h>

#include "attention.h"
#include "noise.h"
#include "rounds.h"

STABLE_TORCH_LIBRARY(layerskip_moe_few_rows, library) {
  library.def("linear(Tensor x, Tensor weight, Tensor? scale, Tensor? bias, bool wide) -> Tensor");
  library.def(
      "experts(Tensor x, Tensor chosen, Tensor weights, Tensor gate_up, Tensor down, Tensor? gate_up_scale, "
      "Tensor? down_scale) -> Tensor");
  library.def("linear_packed(Tensor x, Tensor weight, Tensor scale, Tensor? bias, bool wide) -> Tensor");
  library.def(
      "experts_packed(Tensor x, Tensor chosen, Tensor weights, Tensor gate_up, Tensor down, Tensor gate_up_scale, "
      "Tensor down_scale) -> Tensor");
  library.def("embed(Tensor tokens, Tensor table) -> Tensor");
  library.def("norm(Tensor x, Tensor weight, float epsilon) -> Tensor");
  library.def("rotate(Tensor x, Tensor cos, Tensor sin, Tensor positions) -> Tensor");
  library.def("add(Tensor x, Tensor y) -> Tensor");
  library.def("swiglu(Tensor gate_up) -> Tensor");
  library.def("gate(Tensor x, Tensor logits) -> Tensor");
  library.def("route(Tensor logits, Tensor? bias, int top_k, bool normalize) -> (Tensor, Tensor)");
  library.def(
      "remember(Tensor logits, Tensor(a!) memory, Tensor rows, Tensor positions, float[] weights, int hold) -> Tensor");
  library.def("uniforms(Tensor hashes, int count) -> Tensor");
  library.def("choose(Tensor logits, Tensor? noise, Tensor? x, Tensor? weight) -> (Tensor, Tensor)");
  library.def(
      "attend(Tensor queries, Tensor new_keys, Tensor new_values, Tensor(a!) keys, Tensor(b!) values, Tensor rows, "
      "Tensor positions, int window, float scale) -> Tensor");
  library.def("record(Tensor[] inputs, int room) -> int");
  library.def("recorded(Tensor[] outputs) -> int");
  library.def("replay(int program, Tensor[] inputs, int rows) -> Tensor[]");
  library.def(
      "replay_drafts(int states_of, int choice_of, Tensor newest, Tensor rows, Tensor positions, Tensor? noise, "
      "Tensor limits, Tensor? halves, float least, Tensor? looked_up, bool last_too) -> Tensor[]");
  library.def(
      "replay_round(int states_of, int choice_of, int verify, Tensor newest, Tensor rows, Tensor positions, Tensor? noise, "
      "Tensor limits, Tensor? halves, float least, Tensor? looked_up, int deepen, float sure, Tensor history, int lookup, "
      "int sure_lookup, int per_repeated, int most) -> Tensor[]");
  library.def("forget(int program) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(layerskip_moe_few_rows, CPU, library) {
  library.impl("linear", TORCH_BOX(&few_rows::linear));
  library.impl("experts", TORCH_BOX(&few_rows::experts));
  library.impl("linear_packed", TORCH_BOX(&few_rows::linear_packed));
  library.impl("experts_packed", TORCH_BOX(&few_rows::experts_packed));
  library.impl("embed", TORCH_BOX(&few_rows::embed));
  library.impl("norm", TORCH_BOX(&few_rows::norm));
  library.impl("rotate", TORCH_BOX(&few_rows::rotate));
  library.impl("add", TORCH_BOX(&few_rows::add));
  library.impl("swiglu", TORCH_BOX(&few_rows::swiglu));
  library.impl("gate", TORCH_BOX(&few_rows::gate));
  library.impl("route", TORCH_BOX(&few_rows::route));
  library.impl("remember", TORCH_BOX(&few_rows::remember));
  library.impl("uniforms", TORCH_BOX(&few_rows::uniforms));
  library.impl("choose", TORCH_BOX(&few_rows::choose));
  library.impl("attend", TORCH_BOX(&few_rows::attend));
}

// For any device, and for no tensors at all.
STABLE_TORCH_LIBRARY_IMPL(layerskip_moe_few_rows, CompositeExplicitAutograd, library) {
  library.impl("record", TORCH_BOX(&few_rows::record));
  library.impl("recorded", TORCH_BOX(&few_rows::recorded));
  library.impl("replay", TORCH_BOX(&few_rows::replay));
  library.impl("replay_drafts", TORCH_BOX(&few_rows::replay_drafts));
  library.impl("replay_round", TORCH_BOX(&few_rows::replay_round));
  library.impl("forget", TORCH_BOX(&few_rows::forget));
}
