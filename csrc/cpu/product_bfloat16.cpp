// The matrix product of bfloat16 for AVX-512 with BF16, two of k at a step. Compiled with -mavx512f -mavx512bf16.
#include <immintrin.h>

#include "product_kernels.h"

namespace rewardmap {
namespace {

struct Bfloat16Product {
  using F = __m512;
  static constexpr int64_t width = 16, rows = 8, vectors = 2;
  static constexpr bool paired = true;
  static F set(float x) { return _mm512_set1_ps(x); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
  static F dot(F a, F b, F c) { return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b); }
};

}  // namespace

const ProductKernel kAvx512Bfloat16Product = product_of<ByVectors<Bfloat16Product>>("avx512_bf16");

}  // namespace rewardmap
