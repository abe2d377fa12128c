// Row kernels for AVX2 with FMA, eight floats at a time. Compiled with -mavx2 -mfma.
#include <immintrin.h>

#include "product_kernels.h"
#include "row_kernels.h"

#include "decode_kernels.h"

namespace rewardmap {
namespace {

struct Avx2 {
  using F = __m256;
  static constexpr int64_t width = 8;
  static F set(float x) { return _mm256_set1_ps(x); }
  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static F load(const uint16_t* p) {
    const __m128i narrow = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(narrow), 16));
  }
  // The first n < 8 elements, -inf in the other lanes.
  template <class T>
  static F load_some(const T* p, int64_t n) {
    float lanes[8];
    for (int i = 0; i < 8; ++i) lanes[i] = i < n ? widened<T>(p[i]) : -INFINITY;
    return _mm256_loadu_ps(lanes);
  }
  static void store(float* p, F x) { _mm256_storeu_ps(p, x); }
  static void store(uint16_t* p, F x) {
    const __m256i bits = _mm256_castps_si256(x), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd), 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
    const __m128i low = _mm256_castsi256_si128(rounded), high = _mm256_extracti128_si256(rounded, 1);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packus_epi32(low, high));
  }
  template <class U>
  static void store_some(U* p, F x, int64_t n) {
    float lanes[8];
    _mm256_storeu_ps(lanes, x);
    for (int64_t i = 0; i < n; ++i) narrowed(lanes[i], p + i);
  }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  // The second where either is not a number.
  static F max(F a, F b) { return _mm256_max_ps(a, b); }
  static F round(F x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static F times_power_of_2(F x, F n) {
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return x * _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
  }
  static F zero_below(F x, F bound, F value) { return _mm256_andnot_ps(_mm256_cmp_ps(x, bound, _CMP_LT_OQ), value); }
  static float largest(F x) {
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_shuffle_ps(m, m, 1)));
  }
  static float sum(F x) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
  }
};

struct Avx2Product : Avx2 {
  static constexpr int64_t rows = 6, vectors = 2;
  static constexpr bool paired = false;
  static F dot(F a, F b, F c) { return fma(a, b, c); }
};

}  // namespace

const Kernels kAvx2Kernels = kernels_of<Avx2>("avx2");
const DecodeKernels kAvx2Decode = decode_of<Avx2>();
const ProductKernel kAvx2Product = product_of<ByVectors<Avx2Product>>("avx2");

}  // namespace rewardmap
