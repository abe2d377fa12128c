#include "advantage.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace rewardmap {
namespace {

constexpr int kLanes = 8;  // independent sums, so that the compiler keeps them in one vector

template <class Term>
double sum_of(const float* values, int64_t count, const Term& term) {
  double lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    for (int k = 0; k < kLanes; ++k) lanes[k] += term(values[i + k]);
  for (int k = 0; i < count; ++i, ++k) lanes[k] += term(values[i]);
  double total = 0.0;
  for (const double lane : lanes) total += lane;
  return total;
}

// The mean of the middle two for an even count; not-a-number sorts last. Reorders `values`.
double median_of(std::vector<double>& values) {
  if (values.empty()) return 0.0;
  std::sort(values.begin(), values.end(), [](double a, double b) { return a < b || (b != b && a == a); });
  return (values[(values.size() - 1) / 2] + values[values.size() / 2]) / 2.0;
}

double median_deviation(const float* rewards, int64_t count, std::vector<double>& scratch) {
  scratch.assign(rewards, rewards + count);
  const double middle = median_of(scratch);
  scratch.assign(rewards, rewards + count);
  for (double& value : scratch) value = std::fabs(value - middle);
  return median_of(scratch);
}

}  // namespace

Moments2 moments_of(const float* values, int64_t count, int64_t ddof) {
  const double mean = sum_of(values, count, [](double r) { return r; }) / static_cast<double>(std::max<int64_t>(count, 1));
  if (count <= ddof) return {mean, 0.0};
  const double squares = sum_of(values, count, [mean](double r) { return (r - mean) * (r - mean); });
  return {mean, squares / static_cast<double>(count - ddof)};
}

void group_advantage(const Advantages& a, const AdvantageOptions& options, const Moments2& batch, int64_t begin,
                     int64_t end) {
  std::vector<double> scratch;
  for (int64_t g = begin; g < end; ++g) {
    const int64_t first = a.offsets[g], count = a.offsets[g + 1] - first;
    const float* r = a.rewards + first;
    float* out = a.advantages + first;
    const Moments2 own = moments_of(r, count, options.ddof);
    const bool degenerate = std::all_of(r, r + count, [r](float value) { return value == r[0]; });
    a.mean[g] = static_cast<float>(own.mean);
    a.std[g] = static_cast<float>(std::sqrt(own.variance));
    a.degenerate[g] = degenerate;
    if (degenerate && (options.baseline == Baseline::mean || options.baseline == Baseline::leave_one_out)) {
      std::fill(out, out + count, 0.0f);
      continue;
    }
    const double spoilt = own.mean - own.mean;  // not a number where a reward is not finite: an order hides it
    double divisor = 1.0;
    if (options.scale == Scale::group || options.scale == Scale::batch) {
      const double variance = options.scale == Scale::group ? own.variance : batch.variance;
      divisor = options.eps_inside ? std::sqrt(variance + options.eps) : std::sqrt(variance) + options.eps;
    } else if (options.scale == Scale::max_min && count > 0) {
      const auto [low, high] = std::minmax_element(r, r + count);
      divisor = static_cast<double>(*high) - static_cast<double>(*low) + options.eps + spoilt;
    } else if (options.scale == Scale::mad) {
      divisor = median_deviation(r, count, scratch) + options.eps + spoilt;
    }
    double baseline = own.mean, factor = 1.0;
    if (options.baseline == Baseline::batch_mean) baseline = batch.mean;
    if (options.baseline == Baseline::none) baseline = 0.0;
    // (r - mean of the others) = (r - mean) n / (n - 1)
    if (options.baseline == Baseline::leave_one_out)
      factor = static_cast<double>(count) / static_cast<double>(std::max<int64_t>(count - 1, 1));
    for (int64_t i = 0; i < count; ++i) {
      // A division each: 0 / 0 has to stay not a number.
      const double advantage = (static_cast<double>(r[i]) - baseline) * factor / divisor;
      out[i] = static_cast<float>(a.weights ? advantage * static_cast<double>(a.weights[first + i]) : advantage);
    }
  }
}

}  // namespace rewardmap
