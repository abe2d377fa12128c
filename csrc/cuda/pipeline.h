// The row pipeline of a thread-block cluster: which row, stage, phase and slot, and in what order. Plain C++: the CUDA
// kernel and its emulation on host threads both compile this file, so that what cannot deadlock or race there is what
// runs on the GPU.
//
// A row is split evenly over the blocks of a cluster. Each block brings its part into a stage of its shared memory by a
// bulk copy, reduces it, tells the other blocks, makes the gradient in the stage and sends it back by a bulk copy:
// one row is being loaded, one computed on and one stored at any time.
#pragma once

#include "../objective.h"

namespace rewardmap {

constexpr int kStages = 3, kAhead = 2, kMaxCluster = 8;

struct Schedule {
  int64_t rows, first, step;  // this cluster's rows: first, first + step, ...
  REWARDMAP_INLINE_MEMBER int64_t count() const { return first < rows ? (rows - first + step - 1) / step : 0; }
  REWARDMAP_INLINE_MEMBER int64_t row(int64_t i) const { return first + i * step; }
  // The stage of the i-th row, and the phase of its barrier: a stage's barrier turns once per use.
  REWARDMAP_INLINE_MEMBER static int stage(int64_t i) { return static_cast<int>(i % kStages); }
  REWARDMAP_INLINE_MEMBER static uint32_t phase(int64_t i) { return static_cast<uint32_t>(i / kStages & 1); }
  // Two slots for what blocks tell each other: who writes slot(i + 2) has passed the cluster's barrier of row i + 1,
  // which every block reaches after it has read slot(i).
  REWARDMAP_INLINE_MEMBER static int slot(int64_t i) { return static_cast<int>(i & 1); }
};

// What a part of a row adds up to. y = z / T; sums are relative to `top`.
struct Partial {
  float top, total, moment;  // largest y, sum of e^(y - top), sum of e^(y - top) (y - top)
  float picked;              // y of the target where it lies in this part, else 0
};

REWARDMAP_INLINE Partial no_partial() { return {-INFINITY, 0.0f, 0.0f, 0.0f}; }

REWARDMAP_INLINE Partial combine(const Partial& a, const Partial& b) {
  const float top = b.top > a.top ? b.top : a.top;
  // A part without a finite logit adds nothing: -inf minus -inf is not a number.
  const float down_a = a.top == -INFINITY ? 0.0f : a.top - top, down_b = b.top == -INFINITY ? 0.0f : b.top - top;
  const float left_a = expf(down_a), left_b = expf(down_b);
  return {top, left_a * a.total + left_b * b.total,
          left_a * (a.moment + down_a * a.total) + left_b * (b.moment + down_b * b.total), a.picked + b.picked};
}

REWARDMAP_INLINE void add(Partial& part, float y) {
  if (y > part.top) {
    const float down = part.top == -INFINITY ? 0.0f : part.top - y, left = expf(down);
    part.moment = left * (part.moment + down * part.total);
    part.total *= left;
    part.top = y;
  }
  const float gap = y - (part.top == -INFINITY ? 0.0f : part.top);
  const float bounded = gap < -100.0f ? -100.0f : gap, e = expf(bounded);
  part.total += e;
  part.moment += e * bounded;
}

struct RowResult {
  float logprob, entropy, c, e;  // c, e: dL/dlogprob and dL/dentropy
  float shift;                   // log p = y + shift
};

REWARDMAP_INLINE RowResult row_result(const Partial& whole, const Objective& o, const RowInputs& in, float divisor) {
  RowResult r;
  const float log_total = logf(whole.total);
  r.logprob = whole.picked - whole.top - log_total;
  r.entropy = log_total - whole.moment / whole.total;
  r.c = coefficient(o, r.logprob, in) / divisor;
  r.e = -o.entropy_coef / divisor;
  r.shift = -whole.top - log_total;
  return r;
}

// d loss / d z = (c (onehot - p) - e p (log p + H)) / T
REWARDMAP_INLINE float gradient_of(const RowResult& r, float y, float factor, bool is_target) {
  if (r.c == 0.0f && r.e == 0.0f) return 0.0f;
  const float log_p = clamp(y + r.shift, -100.0f, 100.0f), p = expf(log_p);
  const float direct = is_target ? -r.c * expm1f(log_p) : -r.c * p;
  return factor * (direct - r.e * p * (log_p + r.entropy));
}

// The loop of one thread of one block. Block gives: leader(), load(stage, row), wait_loaded(stage, phase),
// reduce(stage, row) -> Partial (at the leader), publish(slot, partial), cluster_barrier(), finish(stage, slot, row),
// sync(), store(stage, row), wait_stores_read<most left>(), wait_stores_done().
template <class Block>
REWARDMAP_INLINE void run_pipeline(const Schedule& schedule, Block& block) {
  const int64_t count = schedule.count();
  if (block.leader())
    for (int64_t i = 0; i < kAhead && i < count; ++i) block.load(Schedule::stage(i), schedule.row(i));
  for (int64_t i = 0; i < count; ++i) {
    const int stage = Schedule::stage(i), slot = Schedule::slot(i);
    const int64_t row = schedule.row(i);
    block.wait_loaded(stage, Schedule::phase(i));
    const Partial part = block.reduce(stage, row);
    if (block.leader()) block.publish(slot, part);
    block.cluster_barrier();
    block.finish(stage, slot, row);
    block.sync();
    if (block.leader()) {
      block.store(stage, row);
      if (i + kAhead < count) {
        // The stage of row i + 2 held row i - 1: all stores but the one just begun must have read theirs.
        block.template wait_stores_read<kStages - kAhead>();
        block.load(Schedule::stage(i + kAhead), schedule.row(i + kAhead));
      }
    }
  }
  if (block.leader()) block.wait_stores_done();
  block.cluster_barrier();  // no block leaves while another may still write to its slots
}

}  // namespace rewardmap
