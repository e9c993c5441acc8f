// The runner-up of a row and the sum of the other exponentials, reading the row from memory once.
//
// The row is taken in pieces, or blocks, that stay in the L1 cache. A new runner-up rescales the sum so far; the piece
// that holds the runner-up is summed without it, counting what equals it; the target is left out by splitting the row
// around it. No part of the sum is ever taken off again, which keeps it exact when it is tiny.
#pragma once

#include "elementary.h"
#include "sweep.h"

namespace loku::LOKU_ISA {

constexpr int64_t kBlock = 1024;  // columns
// Columns between two looks for a new runner-up.
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

// A sum, in parts that do not wait for each other.
struct Sums {
  Vector sum[kUnroll] = {};

  LOKU_INLINE void add(const Sums& other) {
    for (int k = 0; k < kUnroll; ++k) sum[k] = sum[k] + other.sum[k];
  }
  LOKU_INLINE float total() const { return sum_of((sum[0] + sum[1]) + (sum[2] + sum[3])); }
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
  return sums.total();
}

// Sums of exp(z - reference) over a piece. False where some z is larger than `reference`, and the sums are useless.
template <class T>
LOKU_INLINE bool sum_piece(const T* piece, float reference, Sums& sums) {
  const Vector top = broadcast(reference);
  Vector signs = broadcast(0.0f);
  sweep_pairs_in_any_order(piece, kPiece, [&](Vector x, Vector y, int k) LOKU_LAMBDA {
    const Vector below_x = top - x, below_y = top - y;
    signs = bits_of_any(signs, below_x, below_y);
    sums.sum[k] = sums.sum[k] + exponential_of_minus(below_x);
    sums.sum[k + 1] = sums.sum[k + 1] + exponential_of_minus(below_y);
  });
  return !any_negative(signs);
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
    best.rest += sum_exponentials(z, begin, end, finite_reference(best.value), sink);
    return;
  }
  best.rest = (best.rest + 1.0) * std::exp(static_cast<double>(best.value) - top);
  best.value = top;
  best.index = begin + find(z + begin, end - begin, top);
  best.rest += sum_of_others(z, begin, end, top, sink);
}

// What row_statistics() knows of the columns seen so far. The piece that holds the runner-up stays apart, to be summed
// again without it when the row is done: a new runner-up then costs little more than finding it.
struct Search {
  float value = -INFINITY;
  int64_t begin = 0, end = 0;     // of the piece that holds it
  double rest = 0.0, held = 0.0;  // sums of exp(z - value) over the other pieces, and over this one
};

// Takes in a piece that may hold a new runner-up. `sum` is that of exp(z - finite_reference(best.value)).
template <class T>
void take_piece(const T* z, int64_t begin, int64_t end, double sum, Search& best) {
  constexpr float kNear = 32.0f;  // as far above its reference as a float's exponential may be summed
  const float top = maximum(z + begin, end - begin);
  if (!(top > best.value)) {
    best.rest += sum;
    return;
  }
  const double shrink = std::exp(static_cast<double>(best.value) - top);
  const double rest = (best.rest + best.held) * shrink;
  const bool near = top - best.value < kNear;
  best = {top, begin, end, rest, near ? sum * shrink : sum_exponentials(z, begin, end, top, Discard{})};
}

// Takes in whole pieces, and returns where the rest of [begin, end) begins.
template <class T>
int64_t take_pieces(const T* z, int64_t begin, int64_t end, Search& best) {
  Sums sums;
  int64_t summed = 0;
  const auto flush = [&]() LOKU_LAMBDA {
    best.rest += sums.total();
    sums = Sums();
    summed = 0;
  };
  for (; end - begin >= kPiece; begin += kPiece) {
    Sums piece;
    if (sum_piece(z + begin, finite_reference(best.value), piece) && best.value > -INFINITY) {
      sums.add(piece);
      if (++summed == kPiecesInASum) flush();
    } else {
      flush();
      take_piece(z, begin, begin + kPiece, piece.total(), best);
    }
  }
  flush();
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
  Search best;
  on_both_sides(columns, target, [&](int64_t begin, int64_t end) LOKU_LAMBDA {
    begin = take_pieces(z, begin, end, best);
    if (begin == end) return;
    take_piece(z, begin, end, sum_exponentials(z, begin, end, finite_reference(best.value), Discard{}), best);
  });
  RunnerUp result(columns, target);
  result.rest = best.rest;
  if (best.value > -INFINITY) {
    result.value = best.value;
    result.index = best.begin + find(z + best.begin, best.end - best.begin, best.value);
    result.rest += sum_of_others(z, best.begin, best.end, best.value, Discard{});
  }
  return result;
}

}  // namespace loku::LOKU_ISA
