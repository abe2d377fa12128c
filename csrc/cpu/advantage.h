// Advantages of rewards relative to their group: group g is rewards[offsets[g]] to rewards[offsets[g + 1]].
#pragma once

#include <stdint.h>

namespace rewardmap {

enum class Scale : int32_t { group, batch, none, max_min, mad };
enum class Baseline : int32_t { mean, leave_one_out, batch_mean, none };

struct AdvantageOptions {
  Scale scale;
  Baseline baseline;
  int64_t ddof;  // 0 or 1
  double eps;
  bool eps_inside;  // sqrt(variance + eps) instead of standard deviation + eps
};

struct Moments2 {
  double mean, variance;
};

struct Advantages {
  const float* rewards;    // [B]
  const float* weights;    // [B], or null
  const int64_t* offsets;  // [G + 1]
  float* advantages;       // [B]
  float *mean, *std;       // [G]
  bool* degenerate;        // [G]: all rewards of the group are equal
};

// Mean and variance (0 for ddof or fewer values) in double precision, in a fixed order.
Moments2 moments_of(const float* values, int64_t count, int64_t ddof);

// Groups [begin, end). `batch` is read by the scale and the baseline of that name only.
void group_advantage(const Advantages& a, const AdvantageOptions& options, const Moments2& batch, int64_t begin,
                     int64_t end);

}  // namespace rewardmap
