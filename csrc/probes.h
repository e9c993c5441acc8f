// What any kernel could reach at best on this machine, for benchmarks to compare with: reading every byte once, and
// computing exponentials of floats that are in cache.
#pragma once

#include "types.h"

namespace loku {

struct Probes {
  uint32_t (*read)(const void* data, int64_t bytes);       // the bits of all whole vectors, or-ed together
  float (*exponentials)(const float* values, int64_t n);  // the sum of exp(values), which must not be positive
};

namespace portable {
extern const Probes probes;
}
namespace avx2 {
extern const Probes probes;
}
namespace avx512 {
extern const Probes probes;
}
namespace avx512bf16 {
extern const Probes probes;
}

}  // namespace loku
