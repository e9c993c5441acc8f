// The element types of the kernels, and the one attribute that all of them need.
#pragma once

#include <cstdint>
#include <cstring>

// Every vector helper is inlined into a kernel, so no vector register crosses a call.
#define LOKU_INLINE inline __attribute__((always_inline))
#define LOKU_LAMBDA __attribute__((always_inline))

namespace loku {

// How many pieces cover `size`, the last one perhaps in part.
LOKU_INLINE int64_t pieces_of(int64_t size, int64_t piece) { return (size + piece - 1) / piece; }
// std::min would be an inline function that the linker takes from any one of the instruction sets' object files.
LOKU_INLINE int64_t least(int64_t x, int64_t y) { return x < y ? x : y; }

// Adding it rounds a float to a multiple of 2^-bits, and leaves that multiple in the low bits.
constexpr float rounder(int bits) { return 12582912.0f / (1 << bits); }

struct BFloat16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

}  // namespace loku
