// Row kernels without vector instructions: any processor.
#include "row_kernels.h"

#include "decode_kernels.h"

namespace rewardmap {
namespace {

struct Scalar {
  using F = float;
  static constexpr int64_t width = 1;
  static F set(float x) { return x; }
  static F load(const float* p) { return *p; }
  static F load(const uint16_t* p) { return widened<uint16_t>(*p); }
  template <class T>
  static F load_some(const T* p, int64_t) {
    return load(p);
  }
  static void store(float* p, F x) { *p = x; }
  static void store(uint16_t* p, F x) { narrowed(x, p); }
  template <class U>
  static void store_some(U* p, F x, int64_t) {
    store(p, x);
  }
  static F fma(F a, F b, F c) { return a * b + c; }
  // The second where either is not a number.
  static F max(F a, F b) { return a > b ? a : b; }
  static F round(F x) { return rintf(x); }
  static F times_power_of_2(F x, F n) {
    // Below 2^-126 the caller puts 0; not a number has no integer.
    const uint32_t bits = static_cast<uint32_t>(n > -127.0f ? static_cast<int32_t>(n) + 127 : 0) << 23;
    float power;
    __builtin_memcpy(&power, &bits, 4);
    return x * power;
  }
  static F zero_below(F x, F bound, F value) { return x < bound ? 0.0f : value; }
  static float largest(F x) { return x; }
  static float sum(F x) { return x; }
};

}  // namespace

const Kernels kScalarKernels = kernels_of<Scalar>("scalar");
const DecodeKernels kScalarDecode = decode_of<Scalar>();

}  // namespace rewardmap
