// The element types of the kernels, and the one attribute that all of them need.
#pragma once

#include <cstdint>
#include <cstring>

// Every vector helper is inlined into a kernel, so no vector register crosses a call.
#define LOKU_INLINE inline __attribute__((always_inline))
#define LOKU_LAMBDA __attribute__((always_inline))

namespace loku {

struct BFloat16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

}  // namespace loku
