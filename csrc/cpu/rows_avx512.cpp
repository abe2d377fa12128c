// Row kernels for AVX-512, sixteen floats at a time. Compiled with -mavx512f -mavx512bw -mavx512dq -mavx512vl.
#include <immintrin.h>

#include "product_kernels.h"
#include "row_kernels.h"

#include "decode_kernels.h"

namespace rewardmap {
namespace {

struct Avx512 {
  using F = __m512;
  static constexpr int64_t width = 16;
  static F set(float x) { return _mm512_set1_ps(x); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static F load(const uint16_t* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  // The first n < 16 elements, -inf in the other lanes; the rest is not touched.
  static F load_some(const float* p, int64_t n) { return _mm512_mask_loadu_ps(set(-INFINITY), first(n), p); }
  static F load_some(const uint16_t* p, int64_t n) {
    return widen(_mm256_mask_loadu_epi16(_mm256_set1_epi16(static_cast<int16_t>(0xff80)), first(n), p));
  }
  static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
  static void store(uint16_t* p, F x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(x)); }
  static void store_some(float* p, F x, int64_t n) { _mm512_mask_storeu_ps(p, first(n), x); }
  static void store_some(uint16_t* p, F x, int64_t n) { _mm256_mask_storeu_epi16(p, first(n), narrow(x)); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  // The second where either is not a number.
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static F round(F x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static F times_power_of_2(F x, F n) { return _mm512_scalef_ps(x, n); }
  static F zero_below(F x, F bound, F value) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, bound, _CMP_NLT_UQ), value);
  }
  static float largest(F x) { return _mm512_reduce_max_ps(x); }
  static float sum(F x) { return _mm512_reduce_add_ps(x); }

 private:
  static __mmask16 first(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }
  static F widen(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
  // To nearest, ties to even.
  static __m256i narrow(F x) {
    const __m512i bits = _mm512_castps_si512(x), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(_mm512_srli_epi32(up, 16), nan, _mm512_set1_epi32(0x7fc0)));
  }
};

struct Avx512Product : Avx512 {
  static constexpr int64_t rows = 14, vectors = 2;
  static constexpr bool paired = false;
  static F dot(F a, F b, F c) { return fma(a, b, c); }
};

}  // namespace

const Kernels kAvx512Kernels = kernels_of<Avx512>("avx512");
const DecodeKernels kAvx512Decode = decode_of<Avx512>();
const ProductKernel kAvx512Product = product_of<ByVectors<Avx512Product>>("avx512");

}  // namespace rewardmap
