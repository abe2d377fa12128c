// The row kernels over a vector type V: included once by the file of each instruction set.
//
// A row is read once in blocks for its running maximum and sums, and once more, while it is still in cache, for the
// gradient. Exponents are taken relative to the row's maximum, so that large logits cost no accuracy. Nothing here
// depends on the number of threads or on other rows: results are equal bit for bit from run to run.
//
// Everything lies in an unnamed namespace, and nothing of the C++ library is called: an inline function shared with a
// file compiled for a smaller instruction set would be linked from either.
#include <stdlib.h>

#include "rows.h"

namespace rewardmap {
namespace {

constexpr float kExpFloor = -100.0f;      // exp of it is 0 here; finite, so that 0 * floor is 0
constexpr float kExpSmallest = -87.33f;   // below, exp is 0: no subnormal numbers

// e^x for x <= 0, relative error below 2^-22; 0 below kExpSmallest; NaN stays. x >= kExpFloor.
template <class V>
inline typename V::F exponential(typename V::F x) {
  using F = typename V::F;
  const F n = V::round(x * V::set(1.44269504088896341f));
  F r = V::fma(n, V::set(-0.693359375f), x);
  r = V::fma(n, V::set(2.12194440e-4f), r);
  F p = V::set(1.9875691500e-4f);
  p = V::fma(p, r, V::set(1.3981999507e-3f));
  p = V::fma(p, r, V::set(8.3334519073e-3f));
  p = V::fma(p, r, V::set(4.1665795894e-2f));
  p = V::fma(p, r, V::set(1.6666665459e-1f));
  p = V::fma(p, r, V::set(5.0000001201e-1f));
  p = V::fma(p * r, r, r + V::set(1.0f));
  return V::zero_below(x, V::set(kExpSmallest), V::times_power_of_2(p, n));
}

struct Moments {  // of a row, relative to its largest logit `top`
  float top;      // in units of logits
  float total;    // sum of e^(y - y_top), y = z / T
  float moment;   // sum of e^(y - y_top) (y - y_top)
};

// A row is looked at in blocks: each is read for its maximum and again, from the first cache, for its sums.
struct Blocks {
  static constexpr int64_t most = 256;
  int64_t size, count;
  explicit Blocks(int64_t vocab)
      : size(vocab <= most * 2048 ? 2048 : (vocab + most - 1) / most), count((vocab + size - 1) / size) {}
  int64_t length(int64_t block, int64_t vocab) const {
    const int64_t left = vocab - block * size;
    return left < size ? left : size;
  }
};

// Where the exponentials of a row stay for the gradient; those of a block are relative to the top at that time.
struct Kept {
  float* exponentials;  // [V]; may be the row itself
  float tops[Blocks::most];
};

template <class V, class T, bool keep>
inline Moments row_moments(const T* row, int64_t vocab, float factor, Kept* kept) {
  using F = typename V::F;
  constexpr int64_t W = V::width;
  const F minus_infinity = V::set(-INFINITY), floor = V::set(kExpFloor), f = V::set(factor);
  const Blocks blocks(vocab);
  Moments m{-INFINITY, 0.0f, 0.0f};
  for (int64_t block = 0; block < blocks.count; ++block) {
    const int64_t n = blocks.length(block, vocab), whole = n / (4 * W) * (4 * W);
    const T* z = row + block * blocks.size;
    F high[4] = {minus_infinity, minus_infinity, minus_infinity, minus_infinity};
    for (int64_t i = 0; i < whole; i += 4 * W)
      for (int k = 0; k < 4; ++k) high[k] = V::max(high[k], V::load(z + i + k * W));
    for (int64_t i = whole; i < n; i += W)
      high[0] = V::max(high[0], i + W <= n ? V::load(z + i) : V::load_some(z + i, n - i));
    const float block_top = V::largest(V::max(V::max(high[0], high[1]), V::max(high[2], high[3])));
    if (block_top > m.top) {
      // While everything was -inf there is nothing to rescale: -inf minus -inf is not a number.
      const float shift = m.top == -INFINITY ? 0.0f : (m.top - block_top) * factor;
      const float left = m.top == -INFINITY ? 0.0f : expf(shift);
      m.moment = left == 0.0f ? 0.0f : left * (m.moment + shift * m.total);
      m.total = left * m.total;
      m.top = block_top;
    }
    const float reference = m.top == -INFINITY ? 0.0f : m.top;
    const F pivot = V::set(reference);
    F total[4] = {V::set(0), V::set(0), V::set(0), V::set(0)}, moment[4] = {V::set(0), V::set(0), V::set(0), V::set(0)};
    float* to = nullptr;
    if constexpr (keep) {
      kept->tops[block] = reference;
      to = kept->exponentials + block * blocks.size;
    }
    const auto add = [&](int k, F value) {
      const F gap = V::max(floor, (value - pivot) * f);
      const F e = exponential<V>(gap);
      total[k] = total[k] + e;
      moment[k] = V::fma(e, gap, moment[k]);
      return e;
    };
    for (int64_t i = 0; i < whole; i += 4 * W)
      for (int k = 0; k < 4; ++k) {
        const F e = add(k, V::load(z + i + k * W));
        if constexpr (keep) V::store(to + i + k * W, e);
      }
    for (int64_t i = whole; i < n; i += W) {
      const bool full = i + W <= n;
      const F e = add(0, full ? V::load(z + i) : V::load_some(z + i, n - i));
      if constexpr (keep) {
        if (full) {
          V::store(to + i, e);
        } else {
          V::store_some(to + i, e, n - i);
        }
      }
    }
    m.total += V::sum((total[0] + total[1]) + (total[2] + total[3]));
    m.moment += V::sum((moment[0] + moment[1]) + (moment[2] + moment[3]));
  }
  return m;
}

template <class T>
inline float widened(T value);
template <>
inline float widened<float>(float value) {
  return value;
}
template <>
inline float widened<uint16_t>(uint16_t value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float wide;
  __builtin_memcpy(&wide, &bits, 4);
  return wide;
}

inline void narrowed(float value, float* out) { *out = value; }
inline void narrowed(float value, uint16_t* out) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  *out = value != value ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float factor_of(const Rows& rows, int64_t n) {
  return 1.0f / (rows.temperatures ? rows.temperatures[n] : rows.temperature);
}

struct Slope {        // of a row's gradient
  float top;          // log p = (z - top) factor - log_total
  float log_total;
  float factor;       // 1 / T
  float entropy;
  float c, e;         // dL/dlogprob, dL/dentropy
  float total;        // e^log_total
};

// The gradient at the target: 1 - p without cancellation, and in float32 also where the row is narrower.
inline float target_gradient(float log_p, const Slope& s) {
  const float gradient = -s.factor * s.c * expm1f(log_p), p = expf(log_p);
  return s.e != 0.0f && p > 0.0f ? gradient - s.factor * s.e * p * (log_p + s.entropy) : gradient;
}

// d loss / d z = (c (onehot - p) - e p (log p + H)) / T. `out` may be `row` itself.
template <class V, class T, class U>
inline void write_gradient(const T* row, U* out, int64_t vocab, int64_t target, const Slope& s) {
  using F = typename V::F;
  constexpr int64_t W = V::width;
  if (s.c == 0.0f && s.e == 0.0f) {
    __builtin_memset(out, 0, vocab * sizeof(U));
    return;
  }
  const float constant = -(s.c + s.e * s.entropy) * s.factor, slope = -s.e * s.factor;
  const float at_target =
      target < 0 ? 0.0f : target_gradient((widened<T>(row[target]) - s.top) * s.factor - s.log_total, s);
  const F top = V::set(s.top), f = V::set(s.factor), minus_total = V::set(-s.log_total), floor = V::set(kExpFloor);
  const F a = V::set(constant), b = V::set(slope);
  const auto flat = [&](F z) {
    return exponential<V>(V::max(floor, V::fma(z - top, f, minus_total))) * a;
  };
  const auto tilted = [&](F z) {
    const F log_p = V::max(floor, V::fma(z - top, f, minus_total));
    return exponential<V>(log_p) * V::fma(b, log_p, a);
  };
  const int64_t whole = vocab / W * W;
  if (s.e == 0.0f) {
    for (int64_t i = 0; i < whole; i += W) V::store(out + i, flat(V::load(row + i)));
    if (whole < vocab) V::store_some(out + whole, flat(V::load_some(row + whole, vocab - whole)), vocab - whole);
  } else {
    for (int64_t i = 0; i < whole; i += W) V::store(out + i, tilted(V::load(row + i)));
    if (whole < vocab) V::store_some(out + whole, tilted(V::load_some(row + whole, vocab - whole)), vocab - whole);
  }
  if (target >= 0) narrowed(at_target, out + target);
}

// The same without an entropy term, from the exponentials that the statistics kept; `out` may lie over them.
template <class V, class U>
inline void scale_exponentials(const Kept& kept, U* out, int64_t vocab, int64_t target, float at_target,
                               const Slope& s) {
  constexpr int64_t W = V::width;
  if (s.c == 0.0f) {
    __builtin_memset(out, 0, vocab * sizeof(U));
    return;
  }
  const Blocks blocks(vocab);
  for (int64_t block = 0; block < blocks.count; ++block) {
    const float* e = kept.exponentials + block * blocks.size;
    U* to = out + block * blocks.size;
    const int64_t n = blocks.length(block, vocab), whole = n / W * W;
    const auto scale = V::set(-s.c * s.factor * expf((kept.tops[block] - s.top) * s.factor - s.log_total));
    for (int64_t i = 0; i < whole; i += W) V::store(to + i, V::load(e + i) * scale);
    if (whole < n) V::store_some(to + whole, V::load_some(e + whole, n - whole) * scale, n - whole);
  }
  if (target >= 0) narrowed(at_target, out + target);
}

// Brings the exponentials that the statistics kept to the row's top, and the target's to minus the sum of the others.
// Returns the row's total. Blocks seen after the top are there already.
template <class V>
inline float settle_exponentials(const Kept& kept, int64_t vocab, int64_t target, const Slope& s) {
  constexpr int64_t W = V::width;
  const Blocks blocks(vocab);
  for (int64_t block = 0; block < blocks.count; ++block) {
    if (kept.tops[block] == s.top) continue;
    float* e = kept.exponentials + block * blocks.size;
    const int64_t n = blocks.length(block, vocab), whole = n / W * W;
    const auto scale = V::set(expf((kept.tops[block] - s.top) * s.factor));
    for (int64_t i = 0; i < whole; i += W) V::store(e + i, V::load(e + i) * scale);
    if (whole < n) V::store_some(e + whole, V::load_some(e + whole, n - whole) * scale, n - whole);
  }
  if (target < 0) return s.total;
  float* e = kept.exponentials;
  const float own = e[target];
  if (!(own > 0.5f * s.total)) {
    e[target] = own - s.total;
    return s.total;
  }
  // A difference would lose what the others add up to.
  e[target] = 0.0f;
  float others = 0.0f;
  for (int64_t block = 0; block < blocks.count; ++block, e += blocks.size) {
    const int64_t n = blocks.length(block, vocab), whole = n / W * W;
    typename V::F sum = V::set(0.0f);
    for (int64_t i = 0; i < whole; i += W) sum = sum + V::load(e + i);
    others += V::sum(sum);
    for (int64_t i = whole; i < n; ++i) others += e[i];
  }
  kept.exponentials[target] = -others;
  return others + own;
}

template <class T>
inline T* row_of(const Matrix& matrix, int64_t n) {
  return static_cast<T*>(matrix.data) + n * matrix.stride;
}

// Log-sum-exp, log-probability of the target and entropy of row n, stored; what the gradient needs of them.
template <class V, class T, bool keep>
inline Slope row_statistics(const Rows& rows, const Statistics& out, int64_t n, Kept* kept) {
  const float factor = factor_of(rows, n);
  const T* row = row_of<T>(rows.logits, n);
  const int64_t target = rows.targets[n];
  const float picked = target < 0 ? 0.0f : widened<T>(row[target]);  // before it may be overwritten
  const Moments m = row_moments<V, T, keep>(row, rows.vocab, factor, kept);
  const float log_total = logf(m.total);
  out.lse[n] = m.top * factor + log_total;
  out.logprob[n] = target < 0 ? 0.0f : (picked - m.top) * factor - log_total;
  out.entropy[n] = log_total - m.moment / m.total;
  return {m.top, log_total, factor, out.entropy[n], 0.0f, 0.0f, m.total};
}

inline void no_statistics(const Statistics& out, int64_t n) { out.lse[n] = out.logprob[n] = out.entropy[n] = 0.0f; }

template <class V, class T>
void statistics(const Rows& rows, const bool* keep, const Statistics& out, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    if (keep && !keep[n]) {
      no_statistics(out, n);
    } else {
      row_statistics<V, T, false>(rows, out, n, nullptr);
    }
  }
}

template <class V, class T, class U>
void gradient(const Rows& rows, const Statistics& found, const Coefficients& given, const Matrix& out, int64_t begin,
              int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    const Slope slope{0.0f, found.lse[n], factor_of(rows, n), found.entropy[n], given.logprob[n], given.entropy[n],
                      1.0f};
    write_gradient<V, T, U>(row_of<T>(rows.logits, n), row_of<U>(out, n), rows.vocab, rows.targets[n], slope);
  }
}

template <class V, class T, class U>
void exponentials(const Rows& rows, const bool* keep, const Statistics& found, float* total, const Matrix& out,
                  float* scratch, int64_t begin, int64_t end) {
  constexpr bool wide = sizeof(U) == sizeof(float);
  constexpr int64_t W = V::width;
  const int64_t vocab = rows.vocab, whole = vocab / W * W;
  Kept kept;
  for (int64_t n = begin; n < end; ++n) {
    U* to = row_of<U>(out, n);
    if (keep && !keep[n]) {
      no_statistics(found, n);
      total[n] = 1.0f;
      __builtin_memset(to, 0, vocab * sizeof(U));
      continue;
    }
    kept.exponentials = wide ? reinterpret_cast<float*>(to) : scratch;
    const Slope slope = row_statistics<V, T, true>(rows, found, n, &kept);
    total[n] = settle_exponentials<V>(kept, vocab, rows.targets[n], slope);
    if constexpr (!wide) {
      for (int64_t i = 0; i < whole; i += W) V::store(to + i, V::load(scratch + i));
      if (whole < vocab) V::store_some(to + whole, V::load_some(scratch + whole, vocab - whole), vocab - whole);
    }
  }
}

inline void set_coefficients(const Policy& given, float logprob, int64_t n, Slope& slope) {
  const Objective& o = given.objective;
  const RowInputs in{given.advantages[n], o.has_old ? given.old_logprobs[n] : 0.0f,
                     o.kl == Kl::none ? 0.0f : given.ref_logprobs[n],
                     o.importance == Importance::none ? 0.0f : given.rollout_logprobs[n]};
  const float divisor = given.normalizer[n * given.normalizer_stride];
  slope.c = coefficient(o, logprob, in) / divisor;
  slope.e = -o.entropy_coef / divisor;
}

template <class V, class T>
void policy(const Rows& rows, const bool* keep, const Policy& given, const Statistics& found, const Matrix& out,
            int64_t begin, int64_t end) {
  // Without an entropy term one exponential per element is enough: kept in the gradient's own memory if that is wide.
  const bool once = given.objective.entropy_coef == 0.0f, wide = sizeof(T) == sizeof(float);
  float* scratch = once && !wide ? static_cast<float*>(malloc(rows.vocab * sizeof(float))) : nullptr;
  Kept kept;
  for (int64_t n = begin; n < end; ++n) {
    const T* row = row_of<T>(rows.logits, n);
    T* to = row_of<T>(out, n);
    const int64_t target = rows.targets[n];
    Slope slope{};
    if (keep && !keep[n]) {
      no_statistics(found, n);
      write_gradient<V, T, T>(row, to, rows.vocab, target, slope);
    } else if (once && (wide || scratch)) {
      kept.exponentials = wide ? reinterpret_cast<float*>(to) : scratch;
      slope = row_statistics<V, T, true>(rows, found, n, &kept);
      set_coefficients(given, found.logprob[n], n, slope);
      scale_exponentials<V, T>(kept, to, rows.vocab, target, target_gradient(found.logprob[n], slope), slope);
    } else {
      slope = row_statistics<V, T, false>(rows, found, n, nullptr);
      set_coefficients(given, found.logprob[n], n, slope);
      write_gradient<V, T, T>(row, to, rows.vocab, target, slope);
    }
    given.d_logprob[n] = slope.c;
  }
  free(scratch);
}

template <class V>
void any_statistics(const Rows& rows, const bool* keep, const Statistics& out, int64_t begin, int64_t end) {
  const auto run = rows.logits.dtype == Dtype::float32 ? statistics<V, float> : statistics<V, uint16_t>;
  run(rows, keep, out, begin, end);
}

template <class V>
void any_exponentials(const Rows& rows, const bool* keep, const Statistics& found, float* total, const Matrix& out,
                      float* scratch, int64_t begin, int64_t end) {
  const bool wide = rows.logits.dtype == Dtype::float32, wide_out = out.dtype == Dtype::float32;
  const auto run = wide ? (wide_out ? exponentials<V, float, float> : exponentials<V, float, uint16_t>)
                        : (wide_out ? exponentials<V, uint16_t, float> : exponentials<V, uint16_t, uint16_t>);
  run(rows, keep, found, total, out, scratch, begin, end);
}

template <class V>
void any_gradient(const Rows& rows, const Statistics& found, const Coefficients& given, const Matrix& out,
                  int64_t begin, int64_t end) {
  const bool wide = rows.logits.dtype == Dtype::float32, wide_out = out.dtype == Dtype::float32;
  const auto run = wide ? (wide_out ? gradient<V, float, float> : gradient<V, float, uint16_t>)
                        : (wide_out ? gradient<V, uint16_t, float> : gradient<V, uint16_t, uint16_t>);
  run(rows, found, given, out, begin, end);
}

template <class V>
void any_policy(const Rows& rows, const bool* keep, const Policy& given, const Statistics& found, const Matrix& out,
                int64_t begin, int64_t end) {
  const auto run = rows.logits.dtype == Dtype::float32 ? policy<V, float> : policy<V, uint16_t>;
  run(rows, keep, given, found, out, begin, end);
}

template <class V>
constexpr Kernels kernels_of(const char* name) {
  return {name, any_statistics<V>, any_exponentials<V>, any_gradient<V>, any_policy<V>};
}

}  // namespace
}  // namespace rewardmap
