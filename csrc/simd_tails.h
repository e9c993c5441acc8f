// What instruction sets below AVX-512 share. Without masked memory access, the last elements of a range pass through a
// small buffer.
#pragma once

#include "types.h"

namespace loku::LOKU_ISA {

template <class T>
LOKU_INLINE Vector load_first(const T* p, int64_t count, float fill) {
  T elements[kWidth];
  float lanes[kWidth];
  std::memset(elements, 0, sizeof elements);
  std::memcpy(elements, p, count * sizeof(T));
  store(lanes, load(elements));
  for (int64_t lane = count; lane < kWidth; ++lane) lanes[lane] = fill;
  return load(lanes);
}

template <class T>
LOKU_INLINE void store_first(T* p, int64_t count, Vector x) {
  T elements[kWidth];
  store(elements, x);
  std::memcpy(p, elements, count * sizeof(T));
}

LOKU_INLINE float sum_of(Vector x) {
  float lanes[kWidth];
  store(lanes, x);
  float result = lanes[0];
  for (int lane = 1; lane < kWidth; ++lane) result += lanes[lane];
  return result;
}

LOKU_INLINE float largest(Vector x) {
  float lanes[kWidth];
  store(lanes, x);
  float result = lanes[0];
  for (int lane = 1; lane < kWidth; ++lane) result = lanes[lane] > result ? lanes[lane] : result;
  return result;
}

// power_of_two is hardly ever subnormal here, and conversions to half may pass through subnormal numbers.
struct FlushSubnormals {
  FlushSubnormals() {}
};

// 2^(t - rest), for the `rest` of at most half of 2^-kTableBits that makes t - rest a multiple of that; 0 for t <= -127.
LOKU_INLINE Vector split_power(Vector t, Vector& rest) {
  t = larger(broadcast(-127.0f), t);
  const Vector shifted = t + broadcast(rounder(kTableBits));
  const Vector n = shifted - broadcast(rounder(kTableBits));
  rest = t - n;
  return power_of_two(shifted, n);
}

}  // namespace loku::LOKU_ISA
