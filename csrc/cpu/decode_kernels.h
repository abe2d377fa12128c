// Decoding over a vector type V: included once by the file of each instruction set, after row_kernels.h (which says why
// everything lies in an unnamed namespace). Widths are multiples of 16.
#include <math.h>

#include "decode.h"

namespace rewardmap {
namespace {

// Independent sums, so that additions do not wait for each other.
template <class V>
inline float dot(const float* a, const float* b, int64_t n) {
  constexpr int64_t W = V::width;
  typename V::F even = V::set(0), odd = V::set(0);
  int64_t i = 0;
  for (; i + 2 * W <= n; i += 2 * W) {
    even = V::fma(V::load(a + i), V::load(b + i), even);
    odd = V::fma(V::load(a + i + W), V::load(b + i + W), odd);
  }
  if (i < n) even = V::fma(V::load(a + i), V::load(b + i), even);
  return V::sum(even + odd);
}

template <class V>
inline void normalised(const float* x, const float* weight, float epsilon, int64_t n, float* out) {
  const float inverse = 1.0f / sqrtf(dot<V>(x, x, n) / static_cast<float>(n) + epsilon);
  for (int64_t i = 0; i < n; i += V::width)
    V::store(out + i, V::load(x + i) * V::set(inverse) * V::load(weight + i));
}

// x turned by its position, times `scale`.
inline void turned(const float* x, const float* cos, const float* sin, float scale, int64_t n, float* out) {
  const int64_t half = n / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float low = x[i], high = x[i + half];
    out[i] = (low * cos[i] + high * sin[i]) * scale;
    out[i + half] = (high * cos[i + half] + low * sin[i + half]) * scale;
  }
}

// out = sum of weights[t] values[t] over the tokens t of two runs.
template <class V, int64_t C>
inline void weighted(const float* weights, const float* values, int64_t count, const float* more, int64_t more_count,
                     int64_t width, float* out) {
  constexpr int64_t W = V::width;
  typename V::F sum[C];
  for (int64_t c = 0; c < C; ++c) sum[c] = V::set(0);
  const auto add = [&](const float* run, int64_t tokens, const float* w) {
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t c = 0; c < C; ++c) sum[c] = V::fma(V::set(w[t]), V::load(run + t * width + c * W), sum[c]);
  };
  add(values, count, weights);
  add(more, more_count, weights + count);
  for (int64_t c = 0; c < C; ++c) V::store(out + c * W, sum[c]);
}

template <class V>
inline void softmax(float* scores, int64_t n) {
  constexpr int64_t W = V::width;
  float top = scores[0];
  for (int64_t t = 1; t < n; ++t) top = scores[t] > top ? scores[t] : top;
  typename V::F sum = V::set(0);
  for (int64_t t = 0; t < n; t += W) {
    const bool whole = t + W <= n;
    const typename V::F x = whole ? V::load(scores + t) : V::load_some(scores + t, n - t);
    const typename V::F e = exponential<V>(V::max(V::set(kExpFloor), x - V::set(top)));
    sum = sum + e;
    if (whole) {
      V::store(scores + t, e);
    } else {
      V::store_some(scores + t, e, n - t);
    }
  }
  const float inverse = 1.0f / V::sum(sum);
  for (int64_t t = 0; t < n; ++t) scores[t] *= inverse;
}

template <class V>
void attend(const Decode& d, float* scratch, int64_t begin, int64_t end) {
  const int64_t D = d.width;
  float* const queries = scratch;
  float* const scores = scratch + d.shared * D;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t head = i / d.answers, s = i % d.answers, pair = s * d.heads + head, group = d.group[s];
    const float *cos = d.cos + s * d.table, *sin = d.sin + s * d.table;
    float *keys = d.keys + pair * d.room * D, *values = d.values + pair * d.room * D;
    const auto turn = [&](const float* x, const float* weight, float scale, float* out) {
      if (weight) {
        normalised<V>(x, weight, d.epsilon, D, scores);
        x = scores;
      }
      turned(x, cos, sin, scale, D, out);
    };
    turn(d.key + pair * D, d.key_norm, 1.0f, keys + d.length * D);
    __builtin_memcpy(values + d.length * D, d.value + pair * D, sizeof(float) * D);
    for (int64_t r = 0; r < d.shared; ++r) turn(d.query + (pair * d.shared + r) * D, d.query_norm, d.scale, queries + r * D);
    const int64_t first = d.prompt_begin[group], before = d.prompt - first, own = d.length + 1;
    const int64_t prompt = ((group * d.heads + head) * d.prompt + first) * D;
    for (int64_t r = 0; r < d.shared; ++r) {
      const float* q = queries + r * D;
      for (int64_t t = 0; t < before; ++t) scores[t] = dot<V>(q, d.prompt_keys + prompt + t * D, D);
      for (int64_t t = 0; t < own; ++t) scores[before + t] = dot<V>(q, keys + t * D, D);
      softmax<V>(scores, before + own);
      float* out = d.out + (pair * d.shared + r) * D;
      constexpr int64_t W = V::width, C = W < 16 ? 16 / W : 1;
      int64_t at = 0;
      for (; at + 2 * C * W <= D; at += 2 * C * W)
        weighted<V, 2 * C>(scores, d.prompt_values + prompt + at, before, values + at, own, D, out + at);
      for (; at < D; at += C * W)
        weighted<V, C>(scores, d.prompt_values + prompt + at, before, values + at, own, D, out + at);
    }
  }
}

template <class V>
void norm_rows(float* hidden, const float* update, const float* weight, float epsilon, int64_t width, float* out,
               int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    float* x = hidden + row * width;
    if (update)
      for (int64_t i = 0; i < width; i += V::width) V::store(x + i, V::load(x + i) + V::load(update + row * width + i));
    normalised<V>(x, weight, epsilon, width, out + row * width);
  }
}

template <class V>
constexpr DecodeKernels decode_of() {
  return {attend<V>, norm_rows<V>};
}

}  // namespace
}  // namespace rewardmap
