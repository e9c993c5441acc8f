// The instruction sets that kernels are built for, the best last, and whether this processor has them.
#pragma once

namespace loku {

enum InstructionSet { kPortable, kAvx2, kAvx512, kAvx512Bf16, kInstructionSets };

inline bool is_supported(InstructionSet set) {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  switch (set) {
    case kPortable: return true;
    case kAvx2: return avx2;
    case kAvx512: return avx512;
    case kAvx512Bf16: return avx512 && __builtin_cpu_supports("avx512bf16");
    default: return false;
  }
#else
  return set == kPortable;
#endif
}

}  // namespace loku
