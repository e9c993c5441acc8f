// Loops over the elements of a row, on whichever simd_*.h came before.
#pragma once

#include <cmath>

#include "types.h"

namespace loku::LOKU_ISA {

constexpr int kUnroll = 4;
constexpr int64_t kLine = 64;  // bytes that memory brings at a time

// Asks for the lines of `bytes` bytes, far ahead into the L2 cache and near into L1. The processor's own prefetching
// stops at every page; this runs on, into the next row. L1 has few lines on their way at a time, too few for memory's
// latency: with L1 alone a loss took 1.2 times as long. Of 0.5 to 4 KiB and 8 to 32 KiB, these measured best.
LOKU_INLINE void prefetch(const void* here, int64_t bytes) {
  constexpr int64_t kNear = 2048, kFar = 8192;
#pragma GCC unroll 4
  for (int64_t i = 0; i < bytes; i += kLine) {
    __builtin_prefetch(static_cast<const char*>(here) + i + kFar, 0, 2);
    __builtin_prefetch(static_cast<const char*>(here) + i + kNear);
  }
}

// Asks for the lines of p[0, n), into L1.
template <class T>
LOKU_INLINE void prefetch_lines(const T* p, int64_t n) {
#pragma GCC unroll 4
  for (int64_t i = 0; i < n; i += kLine / sizeof(T)) __builtin_prefetch(p + i);
}

template <class T>
LOKU_INLINE void load_two(const T* p, Vector& a, Vector& b) {
  a = load(p);
  b = load(p + kWidth);
}

// The same elements in whatever order is cheapest. Beside this, simd_*.h have one for bfloat16.
template <class T>
LOKU_INLINE void load_in_any_order(const T* p, Vector& a, Vector& b) {
  load_two(p, a, b);
}

template <class T, class Load, class Step>
LOKU_INLINE void sweep_by(Load load_pair, const T* p, int64_t n, Step step) {
  int64_t i = 0;
  for (; i + kUnroll * kWidth <= n; i += kUnroll * kWidth) {
    prefetch(p + i, kUnroll * kWidth * sizeof(T));
#pragma GCC unroll 2
    for (int k = 0; k < kUnroll; k += 2) {
      Vector x, y;
      load_pair(p + i + k * kWidth, x, y);
      step(i + k * kWidth, x, kWidth, k);
      step(i + (k + 1) * kWidth, y, kWidth, k + 1);
    }
  }
  for (; i + kWidth <= n; i += kWidth) step(i, load(p + i), kWidth, 0);
  if (i < n) step(i, load_first(p + i, n - i, -INFINITY), static_cast<int>(n - i), 0);
}

// Calls step(position, vector, lane count, accumulator number) over p[0, n); lanes past the end hold -inf.
template <class T, class Step>
LOKU_INLINE void sweep(const T* p, int64_t n, Step step) {
  sweep_by([](const T* here, Vector& a, Vector& b) LOKU_LAMBDA { load_two(here, a, b); }, p, n, step);
}

// Calls step(vector, accumulator number) over p[0, n) in whatever order is cheapest to load; the last lanes hold -inf.
template <class T, class Step>
LOKU_INLINE void sweep_in_any_order(const T* p, int64_t n, Step step) {
  sweep_by([](const T* here, Vector& a, Vector& b) LOKU_LAMBDA { load_in_any_order(here, a, b); }, p, n,
           [&](int64_t, Vector x, int, int k) LOKU_LAMBDA { step(x, k); });
}

// The same over kRuns runs of n elements at once, `stride` apart, n a multiple of kGrain. Asks for the lines `ahead`
// elements on. Memory serves several runs sooner than one, as the processor's own prefetching stops at every page, and
// starts again in each run at another time: out of memory a loss takes 0.85 of the time that it takes by one run. 2 to 8
// are much alike.
constexpr int kRuns = 4, kGrain = 2 * kWidth;
template <class T, class Step>
LOKU_INLINE void sweep_runs_in_any_order(const T* p, int64_t n, int64_t stride, int64_t ahead, Step step) {
  for (int64_t i = 0; i < n; i += kGrain) {
#pragma GCC unroll 4
    for (int run = 0; run < kRuns; ++run) {
      const T* here = p + run * stride + i;
      prefetch_lines(here + ahead, kGrain);
      Vector x, y;
      load_in_any_order(here, x, y);
      step(x, 2 * run % kUnroll);
      step(y, 2 * run % kUnroll + 1);
    }
  }
}

template <class T>
LOKU_INLINE void store_lanes(T* p, int lanes, Vector x) {
  lanes == kWidth ? store(p, x) : store_first(p, lanes, x);
}

template <class T>
LOKU_INLINE Vector load_lanes(const T* p, int lanes) {
  return lanes == kWidth ? load(p) : load_first(p, lanes, -INFINITY);
}

template <class T>
LOKU_INLINE float to_float(const T* p) {
  float lanes[kWidth];
  store(lanes, load_first(p, 1, 0.0f));
  return lanes[0];
}

template <class T>
void fill(T* out, int64_t n, float value) {
  const Vector x = broadcast(value);
  for (int64_t i = 0; i < n; i += kWidth) store_lanes(out + i, n - i < kWidth ? static_cast<int>(n - i) : kWidth, x);
}

template <class T>
LOKU_INLINE void put_float(T* p, double x) {
  store_first(p, 1, broadcast(static_cast<float>(x)));
}

}  // namespace loku::LOKU_ISA
