// One decoding step of attention for many answers side by side, free of torch; float32.
#pragma once

#include <stdint.h>

namespace rewardmap {

// S answers, each after the prompt of its group. Heads of queries that share a head of keys follow each other.
struct Decode {
  const float *query, *key, *value;  // this token's: [S, heads * shared, D], [S, heads, D] twice
  const float *cos, *sin;            // [S, D] with rows `table` apart; sin carries the sign of either half
  int64_t table;
  const float *query_norm, *key_norm;  // [D], or null: no norm
  float epsilon, scale;
  const float *prompt_keys, *prompt_values;  // [groups, heads, prompt, D]
  const int64_t *prompt_begin, *group;       // [groups] where a prompt begins, after its padding; [S]
  int64_t prompt;
  float *keys, *values;  // [S, heads, room, D]: `length` tokens of the answer, and where this one goes
  int64_t room, length;
  int64_t answers, heads, shared, width;
  float* out;  // [S, heads * shared, D]

  int64_t scratch() const { return shared * width + prompt + length + 1; }
};

// Pairs of head and answer, answer by answer, from `begin` to `end`: those of a group read the same keys.
// `norm`: rows of `hidden` [N, width] have `update` added, where there is one, and normalised go to `out`.
struct DecodeKernels {
  void (*attend)(const Decode&, float* scratch, int64_t begin, int64_t end);
  void (*norm)(float* hidden, const float* update, const float* weight, float epsilon, int64_t width, float* out,
               int64_t begin, int64_t end);
};

extern const DecodeKernels kScalarDecode;
#if defined(__x86_64__)
extern const DecodeKernels kAvx2Decode, kAvx512Decode;
#endif

}  // namespace rewardmap
