// The derivative of the policy objective with respect to a row's log-probability, in scalars.
//
// The same formula as policy_loss.py at token level; a test holds the two equal. Plain C++: the processor's kernels,
// the CUDA kernel and its emulation on host threads all compile it.
#pragma once

#include <math.h>
#include <stdint.h>

#if defined(__CUDACC__)
#define REWARDMAP_INLINE __host__ __device__ static __forceinline__
#define REWARDMAP_INLINE_MEMBER __host__ __device__ __forceinline__
#else
// static: files compiled for different instruction sets must not share one copy.
#define REWARDMAP_INLINE static inline
#define REWARDMAP_INLINE_MEMBER inline
#endif

namespace rewardmap {

constexpr float kLogRatioBound = 20.0f;

enum class Kind : int32_t { clipped, cispo, sapo, reinforce };
enum class Kl : int32_t { none, k1, k2, k3 };
enum class Importance : int32_t { none, truncate, mask };

struct Objective {
  Kind kind;
  Kl kl;
  Importance importance;
  bool has_old, has_dual_clip, has_delta, kl_bias;
  float clip_low, clip_high;  // bounds of the ratio: 1 - clip_eps_low, 1 + clip_eps_high
  float dual_clip, delta;
  float kl_coef, entropy_coef;
  float importance_min, importance_max;
  float tau_positive, tau_negative;
};

// What a row brings beside its log-probability; fields that the objective does not read may hold anything.
struct RowInputs {
  float advantage, old_logprob, ref_logprob, rollout_logprob;
};

// Comparisons with NaN are false, so NaN passes through.
REWARDMAP_INLINE float clamp(float x, float low, float high) { return x < low ? low : (x > high ? high : x); }

REWARDMAP_INLINE float kl_derivative(const Objective& o, float gap, float ratio, float slope) {
  float kl, derivative;
  if (o.kl == Kl::k1) {
    kl = -gap;
    derivative = 1.0f;
  } else if (o.kl == Kl::k2) {
    kl = 0.5f * gap * gap;
    derivative = -gap;
  } else {
    const float bounded = clamp(gap, -kLogRatioBound, kLogRatioBound);
    const float growth = expm1f(bounded);
    kl = growth - bounded;
    derivative = fabsf(gap) > kLogRatioBound ? 0.0f : -growth;
    // The sum below, without the large numbers that cancel in it.
    if (o.kl_bias && derivative != 0.0f && slope != 0.0f) return -ratio * gap;
  }
  return o.kl_bias ? derivative * ratio + kl * slope : derivative;
}

// d l / d logprob of an unmasked row, before the normaliser.
REWARDMAP_INLINE float coefficient(const Objective& o, float logprob, const RowInputs& in) {
  const float adv = in.advantage;
  const float old = o.has_old ? in.old_logprob : logprob;
  const float log_ratio = logprob - old;
  const float ratio = expf(clamp(log_ratio, -kLogRatioBound, kLogRatioBound));
  const float slope = fabsf(log_ratio) > kLogRatioBound ? 0.0f : ratio;
  const float bounded = clamp(ratio, o.clip_low, o.clip_high);
  float c;
  if (o.kind == Kind::reinforce) {
    c = -adv;
  } else if (o.kind == Kind::cispo) {
    c = -bounded * adv;
  } else if (o.kind == Kind::sapo) {
    const float tau = adv > 0.0f ? o.tau_positive : o.tau_negative;
    const float e = expf(-fabsf(tau * (ratio - 1.0f)));  // gate (1 - gate) without the difference
    c = -4.0f * (e / ((1.0f + e) * (1.0f + e))) * slope * adv;
  } else {
    float capped = ratio, capped_slope = slope;
    if (o.has_delta && ratio > o.delta) {
      capped = o.delta;
      capped_slope = 0.0f;
    }
    const float plain = capped * adv, clipped = bounded * adv;
    c = plain > clipped ? 0.0f : -capped_slope * adv;
    const float value = plain > clipped ? clipped : plain;
    if (o.has_dual_clip && adv < 0.0f && value < o.dual_clip * adv) c = 0.0f;
  }
  if (o.importance != Importance::none) {
    float weight = expf(clamp(old - in.rollout_logprob, -kLogRatioBound, kLogRatioBound));
    if (o.importance == Importance::truncate) {
      weight = clamp(weight, o.importance_min, o.importance_max);
    } else if (weight < o.importance_min || weight > o.importance_max) {
      weight = 0.0f;
    }
    c *= weight;
  }
  if (o.kl != Kl::none) c += o.kl_coef * kl_derivative(o, in.ref_logprob - logprob, ratio, slope);
  return c;
}

}  // namespace rewardmap
