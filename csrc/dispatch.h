// Which of the kernels of all instruction sets an operator calls.
#pragma once

#include <torch/csrc/stable/library.h>

#include "cpu.h"

// The `name` (a table of kernels, or one) of the instruction set asked for.
#if defined(__x86_64__)
#define LOKU_KERNELS(instruction_set, name) \
  ::loku::choose(instruction_set, portable::name, avx2::name, avx512::name, avx512bf16::name)
#else
#define LOKU_KERNELS(instruction_set, name) \
  ::loku::choose(instruction_set, portable::name, portable::name, portable::name, portable::name)
#endif

namespace loku {

template <class Kernels>
const Kernels& choose(int64_t instruction_set, const Kernels& portable, const Kernels& avx2, const Kernels& avx512,
                      const Kernels& avx512bf16) {
  const InstructionSet set = static_cast<InstructionSet>(instruction_set);
  STD_TORCH_CHECK(is_supported(set), "this processor lacks instruction set ", instruction_set);
  switch (set) {
    case kAvx512Bf16: return avx512bf16;
    case kAvx512: return avx512;
    case kAvx2: return avx2;
    default: return portable;
  }
}

}  // namespace loku
