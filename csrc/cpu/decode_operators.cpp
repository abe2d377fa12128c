// The decoding operators as torch sees them.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "decode.h"
#include "processor.h"

namespace rewardmap {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = const std::optional<Tensor>&;

const DecodeKernels& kernels() {
#if defined(__x86_64__)
  if (instructions() == Instructions::avx512) return kAvx512Decode;
  if (instructions() == Instructions::avx2) return kAvx2Decode;
#endif
  return kScalarDecode;
}

// Data of a contiguous float32 tensor of this shape.
float* floats(const char* name, const Tensor& t, std::initializer_list<int64_t> sizes) {
  bool fits = t.is_cpu() && t.scalar_type() == ScalarType::Float && t.is_contiguous() && t.dim() == static_cast<int64_t>(sizes.size());
  int64_t dim = 0;
  for (const int64_t size : sizes) fits = fits && t.size(dim++) == size;
  STD_TORCH_CHECK(fits, name, " must be contiguous float32 on the CPU, and of the shape that the others give");
  return static_cast<float*>(t.data_ptr());
}

const int64_t* indices(const char* name, const Tensor& t, int64_t count, int64_t below) {
  STD_TORCH_CHECK(t.is_cpu() && t.dim() == 1 && t.size(0) == count && t.is_contiguous() && t.scalar_type() == ScalarType::Long,
                  name, " must be contiguous int64 [", count, "] on the CPU");
  const int64_t* values = t.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < count; ++i)
    STD_TORCH_CHECK(values[i] >= 0 && values[i] < below, name, "[", i, "] = ", values[i], " is outside [0, ", below, ")");
  return values;
}

int64_t width_of(int64_t width) {
  STD_TORCH_CHECK(width > 0 && width % 16 == 0, "the width must be a multiple of 16, got ", width);
  return width;
}

Tensor decode_attention(Tensor query, Tensor key, Tensor value, Tensor cos, Tensor sin, Tensor prompt_keys,
                        Tensor prompt_values, Tensor prompt_begin, Tensor group, Tensor keys, Tensor values,
                        int64_t length, double scale, std::optional<Tensor> query_norm, std::optional<Tensor> key_norm,
                        double epsilon) {
  STD_TORCH_CHECK(query.dim() == 2 && keys.dim() == 4 && prompt_keys.dim() == 4, "query must be [S, Q], keys [S, H, R, D]");
  Decode d{};
  d.answers = keys.size(0), d.heads = keys.size(1), d.room = keys.size(2), d.width = width_of(keys.size(3));
  const int64_t head = d.heads * d.width, groups = prompt_keys.size(0);
  d.shared = head > 0 ? query.size(1) / head : 0;
  d.prompt = prompt_keys.size(2), d.length = length;
  STD_TORCH_CHECK(length >= 0 && length < d.room, "length = ", length, " leaves no room in ", d.room);
  d.query = floats("query", query, {d.answers, d.shared * head});
  d.key = floats("key", key, {d.answers, head});
  d.value = floats("value", value, {d.answers, head});
  d.keys = floats("keys", keys, {d.answers, d.heads, d.room, d.width});
  d.values = floats("values", values, {d.answers, d.heads, d.room, d.width});
  d.prompt_keys = floats("prompt_keys", prompt_keys, {groups, d.heads, d.prompt, d.width});
  d.prompt_values = floats("prompt_values", prompt_values, {groups, d.heads, d.prompt, d.width});
  d.prompt_begin = indices("prompt_begin", prompt_begin, groups, d.prompt + 1);
  d.group = indices("group", group, d.answers, groups);
  for (const auto& [name, t] : {std::pair{"cos", &cos}, {"sin", &sin}})
    STD_TORCH_CHECK(t->is_cpu() && t->scalar_type() == ScalarType::Float && t->dim() == 2 && t->size(0) == d.answers &&
                        t->size(1) == d.width && t->stride(1) == 1 && t->stride(0) == cos.stride(0),
                    name, " must be float32 [", d.answers, ", ", d.width, "] with rows of stride 1");
  d.cos = cos.const_data_ptr<float>(), d.sin = sin.const_data_ptr<float>(), d.table = cos.stride(0);
  d.query_norm = query_norm ? floats("query_norm", *query_norm, {d.width}) : nullptr;
  d.key_norm = key_norm ? floats("key_norm", *key_norm, {d.width}) : nullptr;
  d.scale = static_cast<float>(scale), d.epsilon = static_cast<float>(epsilon);
  Tensor out = torch::stable::empty({d.answers, d.shared * head}, ScalarType::Float);
  d.out = out.mutable_data_ptr<float>();
  // What repays waking a thread: some 100,000 multiplications.
  const int64_t each = 50000 / std::max<int64_t>(1, d.shared * (d.prompt + length + 1) * d.width) + 1;
  torch::stable::parallel_for(0, d.answers * d.heads, each, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(d.scratch() + d.width);
    kernels().attend(d, scratch.data(), begin, end);
  });
  return out;
}

Tensor add_norm_(Tensor hidden, std::optional<Tensor> update, Tensor weight, double epsilon) {
  STD_TORCH_CHECK(hidden.dim() == 2, "hidden must be [N, H]");
  const int64_t rows = hidden.size(0), width = width_of(hidden.size(1));
  float* x = floats("hidden", hidden, {rows, width});
  const float* more = update ? floats("update", *update, {rows, width}) : nullptr;
  const float* scale = floats("weight", weight, {width});
  Tensor out = torch::stable::empty({rows, width}, ScalarType::Float);
  float* to = out.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, rows, (1 << 15) / width + 1, [&](int64_t begin, int64_t end) {
    kernels().norm(x, more, scale, static_cast<float>(epsilon), width, to, begin, end);
  });
  return out;
}

}  // namespace
}  // namespace rewardmap

STABLE_TORCH_LIBRARY_FRAGMENT(rewardmap, m) {
  m.def("decode_attention(Tensor query, Tensor key, Tensor value, Tensor cos, Tensor sin, Tensor prompt_keys, "
        "Tensor prompt_values, Tensor prompt_begin, Tensor group, Tensor(a!) keys, Tensor(b!) values, int length, "
        "float scale, Tensor? query_norm, Tensor? key_norm, float epsilon) -> Tensor");
  m.def("add_norm_(Tensor(a!) hidden, Tensor? update, Tensor weight, float epsilon) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(rewardmap, CPU, m) {
  m.impl("decode_attention", TORCH_BOX(&rewardmap::decode_attention));
  m.impl("add_norm_", TORCH_BOX(&rewardmap::add_norm_));
}
