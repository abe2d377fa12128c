// The matrix product as torch sees it: which kernel, into which tiles, by which threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <string>

#include "processor.h"
#include "products.h"

namespace rewardmap {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#if defined(__x86_64__)
// Whether the processor has tile registers for bfloat16 and Linux lets this process use them.
bool tile_registers() {
#if defined(__linux__)
  constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kAmxBf16) && (d & kAmxTile) &&
         syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}

// ONEDNN_MAX_CPU_ISA lowers these products as it lowers torch's own.
bool allowed(std::initializer_list<const char*> names) {
  const char* most = std::getenv("ONEDNN_MAX_CPU_ISA");
  return !most || std::strstr(most, "ALL") || std::any_of(names.begin(), names.end(), [&](const char* name) { return std::strstr(most, name); });
}
#endif

// The product for operands that are both bfloat16, or not. Null without vectors. Intel's processors multiply pairs of
// bfloat16 by vectors no faster than they do float32.
const ProductKernel* product_kernel(bool bfloat16) {
#if defined(__x86_64__)
  static const bool tiles = allowed({"AMX"}) && tile_registers();
  static const bool pairs = allowed({"BF16", "FP16", "AMX"}) && __builtin_cpu_is("amd") && __builtin_cpu_supports("avx512bf16");
  if (instructions() == Instructions::avx512) {
    if (bfloat16 && tiles) return &kAmxProduct;
    return bfloat16 && pairs ? &kAvx512Bfloat16Product : &kAvx512Product;
  }
  if (instructions() == Instructions::avx2) return &kAvx2Product;
#endif
  return nullptr;
}

// Its name, empty without one.
std::string products(bool bfloat16) {
  const ProductKernel* kernel = product_kernel(bfloat16);
  return kernel ? kernel->name : "";
}

// `t` has the depth of the product in its dimension `depth`.
Operand operand(const char* name, const Tensor& t, int64_t depth) {
  STD_TORCH_CHECK(t.is_cpu() && t.dim() == 2, name, " must be a matrix on the CPU");
  const ScalarType dtype = t.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, name, " must be float32 or bfloat16");
  const auto runs_along = [&t](int64_t dim) { return t.stride(dim) == 1 || t.size(dim) == 1; };
  STD_TORCH_CHECK(runs_along(0) || runs_along(1), name, " must have rows or columns of stride 1");
  const bool along = runs_along(depth);
  return {t.data_ptr(), t.stride(along ? 1 - depth : depth), along,
          dtype == ScalarType::Float ? Dtype::float32 : Dtype::bfloat16};
}

struct Cut {  // of a product into tiles
  int64_t rows, columns, down, tiles;
};

// The whole product in the least time by as many threads, packing included.
Cut cut_of(int64_t rows, int64_t columns, const ProductKernel& kernel, int64_t threads) {
  constexpr int64_t kPacking = 8;  // multiplications in the time that an element is packed in
  const auto up = [](int64_t size, int64_t parts) { return (size + parts - 1) / parts; };
  const int64_t fewest_down = up(rows, kTileBlocks * block_rows(kernel.row_step)), fewest_across = up(columns, kTileColumns);
  Cut best{};
  int64_t least = INT64_MAX;
  for (int64_t i = fewest_down; i <= fewest_down + threads; ++i)
    for (int64_t j = fewest_across; j <= fewest_across + threads; ++j) {
      Cut cut{up(up(rows, i), kernel.row_step) * kernel.row_step, up(up(columns, j), kernel.column_step) * kernel.column_step, 0, 0};
      cut.down = up(rows, cut.rows);
      cut.tiles = cut.down * up(columns, cut.columns);
      const int64_t time = up(cut.tiles, threads) * (cut.rows * cut.columns + kPacking * (cut.rows + cut.columns));
      if (time < least) least = time, best = cut;
    }
  return best;
}

void product_(Tensor out, Tensor a, Tensor b, bool add) {
  const Operand left = operand("a", a, 1), right = operand("b", b, 0);
  const int64_t rows = a.size(0), columns = b.size(1), depth = a.size(1);
  const bool rows_run = out.is_cpu() && out.dim() == 2 && (out.stride(1) == 1 || out.size(1) == 1);
  STD_TORCH_CHECK(rows_run && out.scalar_type() == ScalarType::Float,
                  "out must be float32, a matrix on the CPU with rows of stride 1");
  STD_TORCH_CHECK(b.size(0) == depth && out.size(0) == rows && out.size(1) == columns && rows > 0 && columns > 0 && depth > 0,
                  "out [", out.size(0), ", ", out.size(1), "] cannot be a [", rows, ", ", depth, "] x b [", b.size(0), ", ",
                  columns, "]");
  const ProductKernel* kernel = product_kernel(left.dtype == Dtype::bfloat16 && right.dtype == Dtype::bfloat16);
  STD_TORCH_CHECK(kernel, "there is no product for this processor");
  const Product product{left, right, out.mutable_data_ptr<float>(), out.stride(0), rows, columns, depth, add};
  const int64_t threads = torch::stable::get_num_threads();
  const Cut cut = cut_of(rows, columns, *kernel, threads);
  const int64_t workers = std::min(threads, cut.tiles);
  Tensor packed = torch::stable::empty({workers, kPackedFloats}, ScalarType::Float);
  float* memory = packed.mutable_data_ptr<float>();
  // Whoever is free takes the next: a thread that the machine stops does not hold up the others.
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t worker, int64_t) {
    for (int64_t tile = next++; tile < cut.tiles; tile = next++) {
      const int64_t row = tile % cut.down * cut.rows, column = tile / cut.down * cut.columns;
      kernel->tile(product, {row, std::min(cut.rows, rows - row), column, std::min(cut.columns, columns - column)},
                   memory + worker * kPackedFloats);
    }
  });
}

}  // namespace
}  // namespace rewardmap

STABLE_TORCH_LIBRARY_FRAGMENT(rewardmap, m) {
  m.def("products(bool bfloat16) -> str");
  m.def("product_(Tensor(a!) out, Tensor a, Tensor b, bool add) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(rewardmap, CompositeExplicitAutograd, m) {
  m.impl("products", TORCH_BOX(&rewardmap::products));
}

STABLE_TORCH_LIBRARY_IMPL(rewardmap, CPU, m) {
  m.impl("product_", TORCH_BOX(&rewardmap::product_));
}
