// Which instruction set this processor's kernels are taken of.
#pragma once

#include <cstdlib>
#include <string>

namespace rewardmap {

enum class Instructions { scalar, avx2, avx512 };

// The best. ATEN_CPU_CAPABILITY lowers it, as it lowers torch's own.
inline Instructions instructions() {
  static const Instructions chosen = [] {
#if defined(__x86_64__)
    const char* wanted = std::getenv("ATEN_CPU_CAPABILITY");
    const std::string most = wanted ? wanted : "avx512";
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (most == "avx512" && avx512) return Instructions::avx512;
    if (most != "default" && avx2) return Instructions::avx2;
#endif
    return Instructions::scalar;
  }();
  return chosen;
}

}  // namespace rewardmap
