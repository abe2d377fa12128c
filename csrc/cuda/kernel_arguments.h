// What the Hopper kernel takes, in the layout that native_cuda.py mirrors.
#pragma once

#include "../objective.h"

namespace rewardmap {

struct KernelArguments {
  void* logits;  // bfloat16 [rows, vocab], 16-byte aligned; the gradient is written over it
  int64_t stride, rows, vocab;
  const int64_t* targets;     // [rows]
  const float* temperatures;  // [rows], or null: `temperature`
  const bool* keep;           // [rows], or null
  const float *advantages, *old_logprobs, *ref_logprobs, *rollout_logprobs;  // [rows], or null where not read
  const float* normalizer;
  int64_t normalizer_stride;  // 0: one number for all rows
  float *logprobs, *entropy, *d_logprob;  // [rows], out
  float temperature;
  Objective objective;
};

}  // namespace rewardmap
