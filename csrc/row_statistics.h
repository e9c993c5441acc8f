// The runner-up of a row and the sum of the other exponentials, reading the row from memory once.
//
// The row is taken in blocks that stay in the L1 cache. Where a block holds a new runner-up, the sum so far is rescaled
// and the block's own sum leaves the runner-up out; the target is left out by splitting the row around it. No part of
// the sum is ever taken off again, which is what keeps it exact when it is tiny.
#pragma once

#include "elementary.h"
#include "sweep.h"

namespace loku::LOKU_ISA {

constexpr int64_t kBlock = 1024;  // columns

template <class T>
float maximum(const T* z, int64_t n) {
  Vector best[kUnroll];
  for (Vector& b : best) b = broadcast(-INFINITY);
  sweep(z, n, [&](int64_t, Vector x, int, int k) LOKU_LAMBDA { best[k] = larger(x, best[k]); });
  return largest(larger(larger(best[0], best[1]), larger(best[2], best[3])));
}

// The first column that holds `value`.
template <class T>
int64_t find(const T* z, int64_t n, float value) {
  const Vector wanted = broadcast(value);
  for (int64_t i = 0; i < n; i += kWidth) {
    const int lane = first_equal(load_lanes(z + i, n - i < kWidth ? static_cast<int>(n - i) : kWidth), wanted);
    if (lane < kWidth) return i + lane;
  }
  return 0;
}

// Where exponentials go: nowhere, to a row of floats, or over the logits that they come from.
struct Discard {
  static constexpr bool kOverwrites = false;
  LOKU_INLINE Discard operator+(int64_t) const { return {}; }
  LOKU_INLINE void put(int, Vector) const {}
  LOKU_INLINE void put_one() const {}
};

template <bool overwrites>
struct Keep {
  static constexpr bool kOverwrites = overwrites;
  float* to;
  LOKU_INLINE Keep operator+(int64_t columns) const { return {to + columns}; }
  LOKU_INLINE void put(int lanes, Vector x) const { store_lanes(to, lanes, x); }
  LOKU_INLINE void put_one() const { *to = 1.0f; }
};

struct BlockSum {
  float sum;      // of exp(z - reference)
  bool exceeded;  // some z may be larger than the reference
};

template <class T, class Sink>
BlockSum sum_exponentials(const T* z, int64_t n, float reference, Sink sink) {
  const Vector top = broadcast(reference);
  Vector sum[kUnroll], signs[kUnroll];
  for (int k = 0; k < kUnroll; ++k) sum[k] = signs[k] = broadcast(0.0f);
  sweep(z, n, [&](int64_t i, Vector x, int lanes, int k) LOKU_LAMBDA {
    const Vector below = top - x;
    const Vector e = exponential_of_minus(below);
    (sink + i).put(lanes, e);
    signs[k] = bits_of_either(signs[k], below);
    sum[k] = sum[k] + e;
  });
  return {sum_of((sum[0] + sum[1]) + (sum[2] + sum[3])),
          any_negative(bits_of_either(bits_of_either(signs[0], signs[1]), bits_of_either(signs[2], signs[3])))};
}

// exp(-inf - -inf) would be NaN; a runner-up of -inf counts as 0.
LOKU_INLINE float finite_reference(float runner_up) { return runner_up == -INFINITY ? 0.0f : runner_up; }

struct RunnerUp {
  float value = -INFINITY;
  int64_t index;      // where every logit is -inf, the first column other than the target
  double rest = 0.0;  // sum of exp(z - value) over the columns seen, without the runner-up's

  RunnerUp(int64_t columns, int64_t target) : index(target == 0 && columns > 1) {}
};

template <class T, class Sink>
LOKU_INLINE void take_block(const T* z, int64_t begin, int64_t end, RunnerUp& best, Sink sink) {
  // After a few blocks a new runner-up is rare, so it pays to take the sum for granted and look afterwards.
  if (!Sink::kOverwrites && best.value > -INFINITY) {
    const BlockSum block = sum_exponentials(z + begin, end - begin, best.value, sink + begin);
    if (!block.exceeded) {
      best.rest += block.sum;
      return;
    }
  }
  const float top = maximum(z + begin, end - begin);
  if (!(top > best.value)) {
    best.rest += sum_exponentials(z + begin, end - begin, finite_reference(best.value), sink + begin).sum;
    return;
  }
  best.rest = (best.rest + 1.0) * std::exp(static_cast<double>(best.value) - top);
  best.value = top;
  best.index = begin + find(z + begin, end - begin, top);
  best.rest += sum_exponentials(z + begin, best.index - begin, top, sink + begin).sum;
  best.rest += sum_exponentials(z + best.index + 1, end - best.index - 1, top, sink + (best.index + 1)).sum;
  (sink + best.index).put_one();
}

// Calls visit(number, begin, end) for the row's blocks, which leave the target out.
template <class Visit>
LOKU_INLINE void for_each_block(int64_t columns, int64_t target, Visit visit) {
  int64_t number = 0;
  const auto segment = [&](int64_t begin, int64_t end) LOKU_LAMBDA {
    for (; begin < end; begin += kBlock) visit(number++, begin, end - begin < kBlock ? end : begin + kBlock);
  };
  segment(0, target);
  segment(target + 1, columns);
}

LOKU_INLINE int64_t most_blocks(int64_t columns) { return columns / kBlock + 2; }

template <class T>
RunnerUp row_statistics(const T* z, int64_t columns, int64_t target) {
  RunnerUp best(columns, target);
  for_each_block(columns, target,
                 [&](int64_t, int64_t begin, int64_t end) { take_block(z, begin, end, best, Discard{}); });
  return best;
}

}  // namespace loku::LOKU_ISA
