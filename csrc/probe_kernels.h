// The probes, on whichever simd_*.h came before.
#pragma once

#include "probes.h"
#include "row_kernels.h"

namespace loku::LOKU_ISA {

static uint32_t read(const void* data, int64_t bytes) {
  const float* p = static_cast<const float*>(data);
  const int64_t n = bytes / static_cast<int64_t>(sizeof(float));
  Vector seen[4];
  for (Vector& s : seen) s = broadcast(0.0f);
  for (int64_t i = 0; i + 8 * kWidth <= n; i += 8 * kWidth) {
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      seen[k] = bits_of_any(seen[k], load(p + i + 2 * k * kWidth), load(p + i + (2 * k + 1) * kWidth));
    }
  }
  seen[0] = bits_of_any(bits_of_any(seen[0], seen[1], seen[2]), seen[3], seen[3]);
  float lanes[kWidth];
  store(lanes, seen[0]);
  uint32_t result = 0;
  for (const float& lane : lanes) {
    uint32_t bits;
    std::memcpy(&bits, &lane, sizeof bits);
    result |= bits;
  }
  return result;
}

static float exponentials(const float* values, int64_t n) {
  const Reference reference(0.0f);
  Sums sums;
  sweep_in_any_order(values, n, [&](Vector x, int k) LOKU_LAMBDA {
    sums.sum[k] = sums.sum[k] + two_to_the(reference.distance(x));
  });
  return sum_of(sums.lanes());
}

const Probes probes = {read, exponentials};

}  // namespace loku::LOKU_ISA
