// The largest of adjacent logits and the sum of the others' exponentials, and the two of a row whose exponentials are
// kept: in blocks that stay in the L1 cache, between which a new runner-up rescales the sum so far.
#pragma once

#include "elementary.h"
#include "sweep.h"

namespace loku::LOKU_ISA {

constexpr int64_t kBlock = 1024;  // columns

// The largest of many, in parts that do not wait for each other.
struct Tops {
  Vector top[kUnroll];

  LOKU_INLINE Tops() {
    for (Vector& t : top) t = broadcast(-INFINITY);
  }
  LOKU_INLINE void take(Vector x, int k) { top[k] = larger(x, top[k]); }
  LOKU_INLINE Vector lanes() const { return larger(larger(top[0], top[1]), larger(top[2], top[3])); }
};

template <class T>
float maximum(const T* z, int64_t n) {
  Tops tops;
  sweep_in_any_order(z, n, [&](Vector x, int k) LOKU_LAMBDA { tops.take(x, k); });
  return largest(tops.lanes());
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

// Where exponentials go: nowhere, to a row of floats, or over the logits that they come from. each() calls
// exponential(vector, accumulator number) over z[begin, end).
struct Discard {
  template <class T, class Exponential>
  LOKU_INLINE void each(const T* z, int64_t begin, int64_t end, Exponential exponential) const {
    sweep_in_any_order(z + begin, end - begin, [&](Vector x, int k) LOKU_LAMBDA { exponential(x, k); });
  }
};

struct Keep {
  float* row;
  template <class T, class Exponential>
  LOKU_INLINE void each(const T* z, int64_t begin, int64_t end, Exponential exponential) const {
    sweep(z + begin, end - begin, [&](int64_t i, Vector x, int lanes, int k) LOKU_LAMBDA {
      store_lanes(row + begin + i, lanes, exponential(x, k));
    });
  }
};

// A sum, in parts that do not wait for each other.
struct Sums {
  Vector sum[kUnroll] = {};

  LOKU_INLINE Vector lanes() const { return (sum[0] + sum[1]) + (sum[2] + sum[3]); }
};

// The sum of exp(z - reference), where no z is much larger than `reference`.
template <class T, class Sink>
LOKU_INLINE float sum_exponentials(const T* z, int64_t begin, int64_t end, float reference, Sink sink) {
  const Vector top = broadcast(reference);
  Sums sums;
  sink.each(z, begin, end, [&](Vector x, int k) LOKU_LAMBDA {
    const Vector e = exponential_of_minus(top - x);
    sums.sum[k] = sums.sum[k] + e;
    return e;
  });
  return sum_of(sums.lanes());
}

// Of columns where no z is larger than `top`: how many are equal to it, and the sum of exp(z - top) over the others.
struct BesideTop {
  double equal, smaller;

  LOKU_INLINE double without_one() const { return smaller + (equal - 1.0); }
};

template <class T, class Sink>
BesideTop beside_top(const T* z, int64_t begin, int64_t end, float top_value, Sink sink) {
  const Vector top = broadcast(top_value), zero = broadcast(0.0f), one = broadcast(1.0f);
  Vector sum[2] = {zero, zero}, equals = zero;
  sink.each(z, begin, end, [&](Vector x, int k) LOKU_LAMBDA {
    const Mask is_top = equal(x, top);
    const Vector e = exponential_of_minus(top - x);
    sum[k % 2] = select(is_top, sum[k % 2], sum[k % 2] + e);
    equals = select(is_top, equals + one, equals);
    return e;
  });
  return {sum_of(equals), sum_of(sum[0] + sum[1])};
}

// exp(-inf - -inf) would be NaN; a runner-up of -inf counts as 0.
LOKU_INLINE float finite_reference(float runner_up) { return runner_up == -INFINITY ? 0.0f : runner_up; }

struct RunnerUp {
  float value = -INFINITY;
  int64_t index;      // where every logit is -inf, the first column other than the target
  double rest = 0.0;  // sum of exp(z - value) over the columns seen, without the runner-up's

  RunnerUp(int64_t columns, int64_t target) : index(target == 0 && columns > 1) {}
};

// A block that may hold a new runner-up.
template <class T, class Sink>
LOKU_INLINE void take_block(const T* z, int64_t begin, int64_t end, RunnerUp& best, Sink sink) {
  const float top = maximum(z + begin, end - begin);
  if (!(top > best.value)) {
    best.rest += sum_exponentials(z, begin, end, finite_reference(best.value), sink);
    return;
  }
  best.rest = (best.rest + 1.0) * std::exp(static_cast<double>(best.value) - top);
  best.value = top;
  best.index = begin + find(z + begin, end - begin, top);
  best.rest += beside_top(z, begin, end, top, sink).without_one();
}

// Calls visit(number, begin, end) for the row's blocks, which leave the target out.
template <class Visit>
LOKU_INLINE void for_each_block(int64_t columns, int64_t target, Visit visit) {
  int64_t number = 0;
  const auto visit_blocks = [&](int64_t begin, int64_t side) LOKU_LAMBDA {
    for (; begin < side; begin += kBlock) visit(number++, begin, least(side, begin + kBlock));
  };
  visit_blocks(0, target);
  visit_blocks(target + 1, columns);
}

LOKU_INLINE int64_t most_blocks(int64_t columns) { return columns / kBlock + 2; }

}  // namespace loku::LOKU_ISA
