// What the row kernels take and give, free of torch, and the table of one instruction set's kernels.
#pragma once

#include <stdint.h>

#include "../objective.h"

namespace rewardmap {

enum class Dtype : int32_t { float32, bfloat16 };

// A matrix of rows with unit stride within a row; strides in elements.
struct Matrix {
  void* data;
  int64_t stride;
  Dtype dtype;
};

struct Rows {
  Matrix logits;
  int64_t vocab;
  const int64_t* targets;     // [N] in [-1, vocab); -1: the target's column is not here
  const float* temperatures;  // [N], or null: `temperature` for every row
  float temperature;
};

struct Statistics {  // [N] each, in nats
  float *lse, *logprob, *entropy;
};

struct Coefficients {  // [N] each: dL/dlogprob and dL/dentropy
  const float *logprob, *entropy;
};

struct Policy {
  Objective objective;
  const float *advantages, *old_logprobs, *ref_logprobs, *rollout_logprobs;  // [N], or null where not read
  const float* normalizer;
  int64_t normalizer_stride;  // 0: one number for all rows
  float* d_logprob;           // [N], out
};

// Rows [begin, end) of each; `keep` [N] may be null. Results may lie over the logits when the dtypes agree.
struct Kernels {
  const char* name;
  void (*statistics)(const Rows&, const bool* keep, const Statistics&, int64_t begin, int64_t end);
  // Values E [N, V] with E / total = p - onehot; without the target's column, sums alone. 0 and 1 where masked.
  // `scratch` [V] is for bfloat16 values, which are rounded once the row is known; null for float32.
  void (*exponentials)(const Rows&, const bool* keep, const Statistics&, float* total, const Matrix& values,
                       float* scratch, int64_t begin, int64_t end);
  void (*gradient)(const Rows&, const Statistics&, const Coefficients&, const Matrix& out, int64_t begin, int64_t end);
  // The gradient has the logits' dtype.
  void (*policy)(const Rows&, const bool* keep, const Policy&, const Statistics&, const Matrix& out, int64_t begin,
                 int64_t end);
};

extern const Kernels kScalarKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels, kAvx512Kernels;
#endif

}  // namespace rewardmap
