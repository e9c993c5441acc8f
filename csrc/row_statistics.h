// The runner-up of a row and the sum of the other exponentials, reading the row from memory once.
//
// The row is taken in blocks, or shorter pieces, that stay in the L1 cache. Where one holds a new runner-up, the sum so
// far is rescaled and its own sum leaves out what equals the runner-up, which is counted; the target is left out by
// splitting the row around it. No part of the sum is ever taken off again, which keeps it exact when it is tiny.
#pragma once

#include "elementary.h"
#include "sweep.h"

namespace loku::LOKU_ISA {

constexpr int64_t kBlock = 1024;  // columns
// Columns between two looks for a new runner-up, which costs a piece that is summed in vain and summed again.
constexpr int64_t kPiece = 8 * kUnroll * kWidth;
constexpr int64_t kPiecesInASum = 4;  // in float32, before it goes to float64

template <class T>
float maximum(const T* z, int64_t n) {
  Vector best[kUnroll];
  for (Vector& b : best) b = broadcast(-INFINITY);
  sweep_in_any_order(z, n, [&](Vector x, int k) LOKU_LAMBDA { best[k] = larger(x, best[k]); });
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

// Sums of exp(z - top), and the signs of top - z: set where some z is larger than `top`.
struct Sums {
  Vector sum[kUnroll] = {}, signs = {};

  LOKU_INLINE float total() const { return sum_of((sum[0] + sum[1]) + (sum[2] + sum[3])); }
};

template <class T, class Sink>
LOKU_INLINE Sums sum_exponentials(const T* z, int64_t begin, int64_t end, float reference, Sink sink) {
  const Vector top = broadcast(reference);
  Sums sums;
  sink.each(z, begin, end, [&](Vector x, int k) LOKU_LAMBDA {
    const Vector below = top - x;
    const Vector e = exponential_of_minus(below);
    sums.signs = bits_of_either(sums.signs, below);
    sums.sum[k] = sums.sum[k] + e;
    return e;
  });
  return sums;
}

// The sum of exp(z - top) over a block whose largest z is `top`, without one of those that are equal to it.
template <class T, class Sink>
float sum_of_others(const T* z, int64_t begin, int64_t end, float top_value, Sink sink) {
  const Vector top = broadcast(top_value), zero = broadcast(0.0f), one = broadcast(1.0f);
  Vector sum[2] = {zero, zero}, ties = zero;
  sink.each(z, begin, end, [&](Vector x, int k) LOKU_LAMBDA {
    const Mask is_top = equal(x, top);
    const Vector e = exponential_of_minus(top - x);
    sum[k % 2] = sum[k % 2] + select(is_top, zero, e);
    ties = ties + select(is_top, one, zero);
    return e;
  });
  return sum_of(sum[0] + sum[1]) + (sum_of(ties) - 1.0f);
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
    best.rest += sum_exponentials(z, begin, end, finite_reference(best.value), sink).total();
    return;
  }
  best.rest = (best.rest + 1.0) * std::exp(static_cast<double>(best.value) - top);
  best.value = top;
  best.index = begin + find(z + begin, end - begin, top);
  best.rest += sum_of_others(z, begin, end, top, sink);
}

// Takes in whole pieces from `begin` on, and returns where the first one begins that may hold a new runner-up.
template <class T>
int64_t take_pieces(const T* z, int64_t begin, int64_t end, RunnerUp& best) {
  bool exceeded = false;
  while (!exceeded && end - begin >= kPiece) {
    const int64_t stop = least(end, begin + kPiecesInASum * kPiece);
    Sums total;
    for (; stop - begin >= kPiece; begin += kPiece) {
      const Sums piece = sum_exponentials(z, begin, begin + kPiece, best.value, Discard{});
      exceeded = any_negative(piece.signs);
      if (exceeded) break;
      for (int k = 0; k < kUnroll; ++k) total.sum[k] = total.sum[k] + piece.sum[k];
    }
    best.rest += total.total();
  }
  return begin;
}

// Calls visit(begin, end) for the columns before and after the target.
template <class Visit>
LOKU_INLINE void on_both_sides(int64_t columns, int64_t target, Visit visit) {
  visit(0, target);
  visit(target + 1, columns);
}

// Calls visit(number, begin, end) for the row's blocks, which leave the target out.
template <class Visit>
LOKU_INLINE void for_each_block(int64_t columns, int64_t target, Visit visit) {
  int64_t number = 0;
  on_both_sides(columns, target, [&](int64_t begin, int64_t end) LOKU_LAMBDA {
    for (; begin < end; begin += kBlock) visit(number++, begin, least(end, begin + kBlock));
  });
}

LOKU_INLINE int64_t most_blocks(int64_t columns) { return columns / kBlock + 2; }

template <class T>
RunnerUp row_statistics(const T* z, int64_t columns, int64_t target) {
  RunnerUp best(columns, target);
  on_both_sides(columns, target, [&](int64_t begin, int64_t end) LOKU_LAMBDA {
    while (begin < end) {
      if (best.value > -INFINITY) begin = take_pieces(z, begin, end, best);
      const int64_t stop = least(end, begin + kPiece);
      if (begin < stop) take_block(z, begin, stop, best, Discard{});
      begin = stop;
    }
  });
  return best;
}

}  // namespace loku::LOKU_ISA
