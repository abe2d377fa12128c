// The operators as torch sees them: schemas, checks, allocation, threads. torch's stable ABI only, so that one library
// serves torch 2.11 and later.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "advantage.h"
#include "processor.h"
#include "rows.h"

namespace rewardmap {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = const std::optional<Tensor>&;

constexpr int64_t kElementsPerTask = 1 << 15;  // what repays waking a thread

const Kernels& kernels() {
#if defined(__x86_64__)
  if (instructions() == Instructions::avx512) return kAvx512Kernels;
  if (instructions() == Instructions::avx2) return kAvx2Kernels;
#endif
  return kScalarKernels;
}

std::string capability() { return kernels().name; }

void check_vector(const char* name, const Tensor& t, int64_t n, ScalarType dtype) {
  STD_TORCH_CHECK(t.is_cpu() && t.dim() == 1 && t.size(0) == n && t.is_contiguous() && t.scalar_type() == dtype, name,
                  " must be a contiguous ", torch::headeronly::toString(dtype), " [", n, "] on the CPU");
}

const float* floats(const char* name, Optional t, int64_t n) {
  if (!t) return nullptr;
  check_vector(name, *t, n, ScalarType::Float);
  return t->const_data_ptr<float>();
}

const bool* bools(const char* name, Optional t, int64_t n) {
  if (!t) return nullptr;
  check_vector(name, *t, n, ScalarType::Bool);
  return t->const_data_ptr<bool>();
}

Matrix matrix(const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.is_cpu() && t.dim() == 2 && t.size(1) > 0, name, " must be a [N, V] matrix on the CPU");
  STD_TORCH_CHECK(t.stride(1) == 1 || t.size(1) == 1, name, " must have rows of stride 1, got ", t.stride(1));
  const ScalarType dtype = t.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, name, " must be float32 or bfloat16");
  return {t.data_ptr(), t.stride(0), dtype == ScalarType::Float ? Dtype::float32 : Dtype::bfloat16};
}

Rows rows_of(const Tensor& logits, const Tensor& targets, double temperature, Optional temperatures) {
  const int64_t n = logits.size(0), vocab = logits.size(1);
  check_vector("targets", targets, n, ScalarType::Long);
  const int64_t* index = targets.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < n; ++i)
    STD_TORCH_CHECK(index[i] >= -1 && index[i] < vocab, "targets[", i, "] = ", index[i], " is outside [-1, ", vocab, ")");
  return {matrix("logits", logits), vocab, index, floats("temperatures", temperatures, n),
          static_cast<float>(temperature)};
}

Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return torch::stable::empty({sizes.begin(), sizes.size()}, dtype);
}

// Memory for a matrix. Fresh memory costs a fault per page, which with pages of 4 KiB takes longer than the kernels
// themselves: large ones are asked for.
Tensor empty_matrix(int64_t rows, int64_t columns, ScalarType dtype) {
  Tensor out = empty({rows, columns}, dtype);
#if defined(__linux__)
  constexpr uintptr_t kPage = 4096, kWorthIt = 4 << 20;
  const uintptr_t bytes = static_cast<uintptr_t>(out.numel()) * out.element_size();
  if (bytes >= kWorthIt) {
    const uintptr_t first = (reinterpret_cast<uintptr_t>(out.data_ptr()) + kPage - 1) / kPage * kPage;
    const uintptr_t last = (reinterpret_cast<uintptr_t>(out.data_ptr()) + bytes) / kPage * kPage;
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
  }
#endif
  return out;
}

Tensor empty_gradient(const Tensor& logits, ScalarType dtype) {
  return empty_matrix(logits.size(0), logits.size(1), dtype);
}

struct Found {  // statistics with the tensors that own them
  Tensor lse, logprob, entropy;
  explicit Found(int64_t n)
      : lse(empty({n}, ScalarType::Float)), logprob(empty({n}, ScalarType::Float)), entropy(empty({n}, ScalarType::Float)) {}
  Statistics pointers() {
    return {lse.mutable_data_ptr<float>(), logprob.mutable_data_ptr<float>(), entropy.mutable_data_ptr<float>()};
  }
};

template <class Work>
void for_rows(const Rows& rows, int64_t n, const Work& work) {
  const int64_t each = kElementsPerTask / rows.vocab;
  torch::stable::parallel_for(0, n, each > 1 ? each : 1, work);
}

std::tuple<Tensor, Tensor, Tensor> row_statistics(Tensor logits, Tensor targets, double temperature,
                                                  std::optional<Tensor> temperatures, std::optional<Tensor> keep) {
  const Rows rows = rows_of(logits, targets, temperature, temperatures);
  const int64_t n = logits.size(0);
  const bool* on = bools("keep", keep, n);
  Found found(n);
  const Statistics out = found.pointers();
  for_rows(rows, n, [&](int64_t begin, int64_t end) { kernels().statistics(rows, on, out, begin, end); });
  return {found.lse, found.logprob, found.entropy};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> row_exponentials(Tensor logits, Tensor targets, double temperature,
                                                            std::optional<Tensor> temperatures,
                                                            std::optional<Tensor> keep, Tensor values) {
  const Rows rows = rows_of(logits, targets, temperature, temperatures);
  const int64_t n = logits.size(0);
  const bool* on = bools("keep", keep, n);
  const Matrix out = matrix("values", values);
  STD_TORCH_CHECK(values.size(0) == n && values.size(1) == rows.vocab, "values must be [", n, ", ", rows.vocab, "]");
  Found found(n);
  Tensor total = empty({n}, ScalarType::Float);
  const Statistics statistics = found.pointers();
  float* totals = total.mutable_data_ptr<float>();
  for_rows(rows, n, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(out.dtype == Dtype::float32 ? 0 : rows.vocab);
    kernels().exponentials(rows, on, statistics, totals, out, scratch.data(), begin, end);
  });
  return {found.lse, found.logprob, found.entropy, total};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> row_exponentials_(Tensor logits, Tensor targets, double temperature,
                                                             std::optional<Tensor> temperatures,
                                                             std::optional<Tensor> keep) {
  return row_exponentials(logits, targets, temperature, temperatures, keep, logits);
}

void gradient_into(const Tensor& out, const Tensor& logits, const Tensor& targets, double temperature,
                   Optional temperatures, const Tensor& lse, const Tensor& entropy, const Tensor& d_logprob,
                   const Tensor& d_entropy) {
  const Rows rows = rows_of(logits, targets, temperature, temperatures);
  const int64_t n = logits.size(0);
  for (const auto& [name, t] : {std::pair{"lse", &lse}, {"entropy", &entropy}, {"d_logprob", &d_logprob}, {"d_entropy", &d_entropy}})
    check_vector(name, *t, n, ScalarType::Float);
  // Read only: the kernels take the statistics in the struct they also fill.
  const Statistics found{const_cast<float*>(lse.const_data_ptr<float>()), nullptr,
                         const_cast<float*>(entropy.const_data_ptr<float>())};
  const Coefficients given{d_logprob.const_data_ptr<float>(), d_entropy.const_data_ptr<float>()};
  const Matrix to = matrix("gradient", out);
  for_rows(rows, n, [&](int64_t begin, int64_t end) { kernels().gradient(rows, found, given, to, begin, end); });
}

Tensor row_gradient(Tensor logits, Tensor targets, double temperature, std::optional<Tensor> temperatures, Tensor lse,
                    Tensor entropy, Tensor d_logprob, Tensor d_entropy, ScalarType dtype) {
  Tensor out = empty_gradient(logits, dtype);
  gradient_into(out, logits, targets, temperature, temperatures, lse, entropy, d_logprob, d_entropy);
  return out;
}

void row_gradient_(Tensor logits, Tensor targets, double temperature, std::optional<Tensor> temperatures, Tensor lse,
                   Tensor entropy, Tensor d_logprob, Tensor d_entropy) {
  gradient_into(logits, logits, targets, temperature, temperatures, lse, entropy, d_logprob, d_entropy);
}

template <class Enum>
Enum one_of(const char* name, const std::string& value, std::initializer_list<const char*> names) {
  int32_t index = 0;
  for (const char* candidate : names) {
    if (value == candidate) return static_cast<Enum>(index);
    ++index;
  }
  STD_TORCH_CHECK(false, name, " = ", value, " is not known");
}

Objective objective_of(const std::string& kind, double clip_low, double clip_high, std::optional<double> dual_clip,
                       std::optional<double> delta, const std::string& kl, double kl_coef, bool kl_bias,
                       double entropy_coef, const std::string& importance, double importance_min,
                       double importance_max, double tau_positive, double tau_negative) {
  Objective o{};
  o.kind = one_of<Kind>("kind", kind, {"clipped", "cispo", "sapo", "reinforce"});
  o.kl = one_of<Kl>("kl", kl, {"none", "k1", "k2", "k3"});
  o.importance = one_of<Importance>("importance", importance, {"none", "truncate", "mask"});
  o.has_dual_clip = dual_clip.has_value();
  o.has_delta = delta.has_value();
  o.kl_bias = kl_bias;
  o.clip_low = static_cast<float>(clip_low);
  o.clip_high = static_cast<float>(clip_high);
  o.dual_clip = static_cast<float>(dual_clip.value_or(0.0));
  o.delta = static_cast<float>(delta.value_or(0.0));
  o.kl_coef = static_cast<float>(kl_coef);
  o.entropy_coef = static_cast<float>(entropy_coef);
  o.importance_min = static_cast<float>(importance_min);
  o.importance_max = static_cast<float>(importance_max);
  o.tau_positive = static_cast<float>(tau_positive);
  o.tau_negative = static_cast<float>(tau_negative);
  return o;
}

// The arguments that policy_rows and policy_rows_ share.
#define REWARDMAP_POLICY_ARGUMENTS                                                                                    \
  Tensor logits, Tensor targets, double temperature, std::optional<Tensor> temperatures, std::optional<Tensor> keep, \
      Tensor advantages, std::optional<Tensor> old_logprobs, std::optional<Tensor> ref_logprobs,                     \
      std::optional<Tensor> rollout_logprobs, Tensor normalizer, std::string kind, double clip_low,                  \
      double clip_high, std::optional<double> dual_clip, std::optional<double> delta, std::string kl,                \
      double kl_coef, bool kl_bias, double entropy_coef, std::string importance, double importance_min,              \
      double importance_max, double tau_positive, double tau_negative
#define REWARDMAP_POLICY_SCHEMA                                                                                      \
  "Tensor targets, float temperature, Tensor? temperatures, Tensor? keep, Tensor advantages, Tensor? old_logprobs, " \
  "Tensor? ref_logprobs, Tensor? rollout_logprobs, Tensor normalizer, str kind, float clip_low, float clip_high, "   \
  "float? dual_clip, float? delta, str kl, float kl_coef, bool kl_bias, float entropy_coef, str importance, "        \
  "float importance_min, float importance_max, float tau_positive, float tau_negative"

std::tuple<Tensor, Tensor, Tensor> policy_into(const Tensor& out, const Tensor& logits, const Tensor& targets,
                                               double temperature, Optional temperatures, Optional keep,
                                               const Tensor& advantages, Optional old_logprobs, Optional ref_logprobs,
                                               Optional rollout_logprobs, const Tensor& normalizer,
                                               Objective objective) {
  const Rows rows = rows_of(logits, targets, temperature, temperatures);
  const int64_t n = logits.size(0);
  const bool* on = bools("keep", keep, n);
  Found found(n);
  const Statistics statistics = found.pointers();
  check_vector("advantages", advantages, n, ScalarType::Float);
  Policy policy{objective, advantages.const_data_ptr<float>(), floats("old_logprobs", old_logprobs, n),
                floats("ref_logprobs", ref_logprobs, n), floats("rollout_logprobs", rollout_logprobs, n), nullptr,
                normalizer.dim() ? 1 : 0, nullptr};
  // Asked of the tensors: the pointer of one without rows is null.
  policy.objective.has_old = old_logprobs.has_value();
  STD_TORCH_CHECK(objective.kl == Kl::none || ref_logprobs, "the KL term needs ref_logprobs");
  STD_TORCH_CHECK(objective.importance == Importance::none || rollout_logprobs,
                  "the importance correction needs rollout_logprobs");
  if (normalizer.dim()) check_vector("normalizer", normalizer, n, ScalarType::Float);
  policy.normalizer = normalizer.const_data_ptr<float>();
  Tensor d_logprob = empty({n}, ScalarType::Float);
  policy.d_logprob = d_logprob.mutable_data_ptr<float>();
  const Matrix to = matrix("gradient", out);
  for_rows(rows, n, [&](int64_t begin, int64_t end) {
    kernels().policy(rows, on, policy, statistics, to, begin, end);
  });
  return {found.logprob, found.entropy, d_logprob};
}

#define REWARDMAP_POLICY_CALL(out)                                                                                   \
  policy_into(out, logits, targets, temperature, temperatures, keep, advantages, old_logprobs, ref_logprobs,         \
              rollout_logprobs, normalizer,                                                                          \
              objective_of(kind, clip_low, clip_high, dual_clip, delta, kl, kl_coef, kl_bias, entropy_coef,          \
                           importance, importance_min, importance_max, tau_positive, tau_negative))

std::tuple<Tensor, Tensor, Tensor, Tensor> policy_rows(REWARDMAP_POLICY_ARGUMENTS) {
  Tensor out = empty_gradient(logits, logits.scalar_type());
  auto [logprobs, entropy, d_logprob] = REWARDMAP_POLICY_CALL(out);
  return {logprobs, entropy, d_logprob, out};
}

std::tuple<Tensor, Tensor, Tensor> policy_rows_(REWARDMAP_POLICY_ARGUMENTS) { return REWARDMAP_POLICY_CALL(logits); }

std::tuple<Tensor, Tensor, Tensor, Tensor> group_advantage_op(Tensor rewards, Tensor offsets, std::string scale,
                                                              int64_t ddof, double eps, bool eps_inside,
                                                              std::string baseline, std::optional<Tensor> weights) {
  STD_TORCH_CHECK(offsets.dim() == 1 && offsets.size(0) >= 1, "offsets must be [G + 1]");
  const int64_t total = rewards.size(0), groups = offsets.size(0) - 1;
  check_vector("rewards", rewards, total, ScalarType::Float);
  check_vector("offsets", offsets, groups + 1, ScalarType::Long);
  const int64_t* bounds = offsets.const_data_ptr<int64_t>();
  bool rising = bounds[0] == 0 && bounds[groups] == total;
  for (int64_t g = 0; g < groups; ++g) rising = rising && bounds[g] <= bounds[g + 1];
  STD_TORCH_CHECK(rising, "offsets must rise from 0 to ", total);
  const AdvantageOptions options{one_of<Scale>("scale", scale, {"group", "batch", "none", "max_min", "mad"}),
                                 one_of<Baseline>("baseline", baseline, {"mean", "leave_one_out", "batch_mean", "none"}),
                                 ddof, eps, eps_inside};
  Tensor advantages = empty({total}, ScalarType::Float), mean = empty({groups}, ScalarType::Float);
  Tensor std = empty({groups}, ScalarType::Float), degenerate = empty({groups}, ScalarType::Bool);
  const Advantages a{rewards.const_data_ptr<float>(), floats("weights", weights, total), bounds,
                     advantages.mutable_data_ptr<float>(), mean.mutable_data_ptr<float>(),
                     std.mutable_data_ptr<float>(), degenerate.mutable_data_ptr<bool>()};
  const bool of_batch = options.scale == Scale::batch || options.baseline == Baseline::batch_mean;
  const Moments2 batch = of_batch ? moments_of(a.rewards, total, ddof) : Moments2{};
  const int64_t average = total / (groups > 0 ? groups : 1) + 1;
  torch::stable::parallel_for(0, groups, kElementsPerTask / average + 1, [&](int64_t begin, int64_t end) {
    group_advantage(a, options, batch, begin, end);
  });
  return {advantages, mean, std, degenerate};
}

}  // namespace
}  // namespace rewardmap

STABLE_TORCH_LIBRARY(rewardmap, m) {
  m.def("capability() -> str");
  m.def("empty_matrix(int rows, int columns, ScalarType dtype) -> Tensor");
  m.def("row_statistics(Tensor logits, Tensor targets, float temperature, Tensor? temperatures, Tensor? keep)"
        " -> (Tensor lse, Tensor logprobs, Tensor entropy)");
  m.def("row_exponentials(Tensor logits, Tensor targets, float temperature, Tensor? temperatures, Tensor? keep, "
        "Tensor(a!) values) -> (Tensor lse, Tensor logprobs, Tensor entropy, Tensor total)");
  m.def("row_exponentials_(Tensor(a!) logits, Tensor targets, float temperature, Tensor? temperatures, Tensor? keep)"
        " -> (Tensor lse, Tensor logprobs, Tensor entropy, Tensor total)");
  m.def("row_gradient(Tensor logits, Tensor targets, float temperature, Tensor? temperatures, Tensor lse, "
        "Tensor entropy, Tensor d_logprob, Tensor d_entropy, ScalarType dtype) -> Tensor");
  m.def("row_gradient_(Tensor(a!) logits, Tensor targets, float temperature, Tensor? temperatures, Tensor lse, "
        "Tensor entropy, Tensor d_logprob, Tensor d_entropy) -> ()");
  m.def("policy_rows(Tensor logits, " REWARDMAP_POLICY_SCHEMA ")"
        " -> (Tensor logprobs, Tensor entropy, Tensor d_logprob, Tensor gradient)");
  m.def("policy_rows_(Tensor(a!) logits, " REWARDMAP_POLICY_SCHEMA ")"
        " -> (Tensor logprobs, Tensor entropy, Tensor d_logprob)");
  m.def("group_advantage(Tensor rewards, Tensor offsets, str scale, int ddof, float eps, bool eps_inside, "
        "str baseline, Tensor? weights) -> (Tensor advantages, Tensor mean, Tensor std, Tensor degenerate)");
}

STABLE_TORCH_LIBRARY_IMPL(rewardmap, CompositeExplicitAutograd, m) {
  m.impl("capability", TORCH_BOX(&rewardmap::capability));
  m.impl("empty_matrix", TORCH_BOX(&rewardmap::empty_matrix));
}

STABLE_TORCH_LIBRARY_IMPL(rewardmap, CPU, m) {
  m.impl("row_statistics", TORCH_BOX(&rewardmap::row_statistics));
  m.impl("row_exponentials", TORCH_BOX(&rewardmap::row_exponentials));
  m.impl("row_exponentials_", TORCH_BOX(&rewardmap::row_exponentials_));
  m.impl("row_gradient", TORCH_BOX(&rewardmap::row_gradient));
  m.impl("row_gradient_", TORCH_BOX(&rewardmap::row_gradient_));
  m.impl("policy_rows", TORCH_BOX(&rewardmap::policy_rows));
  m.impl("policy_rows_", TORCH_BOX(&rewardmap::policy_rows_));
  m.impl("group_advantage", TORCH_BOX(&rewardmap::group_advantage_op));
}
