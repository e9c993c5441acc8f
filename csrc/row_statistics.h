// The runner-up of a row and the sum of the other exponentials, reading the row from memory once.
//
// The row is taken in pieces, or blocks, that stay in the L1 cache. A new runner-up rescales the sum so far; the target
// is left out by splitting the row around it. The runner-up is taken off again where much else is left; elsewhere the
// piece that holds it is summed without it, counting what equals it, which keeps the sum exact when it is tiny.
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

// Sums of 2^reference.distance(z) over z[0, n). False where some z may be larger than the reference.
template <class T>
LOKU_INLINE bool sum_piece(const T* z, int64_t n, const Reference& reference, Sums& sums) {
  Vector signs = broadcast(-1.0f);
  const auto take = [&](Vector x, Vector y, int k) LOKU_LAMBDA {
    const Vector far_x = reference.distance(x), far_y = reference.distance(y);
    signs = bits_of_all(signs, far_x, far_y);
    sums.sum[k] = sums.sum[k] + two_to_the(far_x);
    sums.sum[k + 1] = sums.sum[k + 1] + two_to_the(far_y);
  };
  const int64_t in_pairs = n - n % (kUnroll * kWidth);
  sweep_pairs_in_any_order(z, in_pairs, take);
  sweep_in_any_order(z + in_pairs, n - in_pairs,
                     [&](Vector x, int) LOKU_LAMBDA { take(x, broadcast(-INFINITY), 0); });
  return all_negative(signs);
}

// The sum of exp(z - top) over a block whose largest z is `top`, without one of those that are equal to it.
template <class T, class Sink>
float sum_of_others(const T* z, int64_t begin, int64_t end, float top_value, Sink sink) {
  const Vector top = broadcast(top_value), zero = broadcast(0.0f), one = broadcast(1.0f);
  Vector sum[2] = {zero, zero}, ties = zero;
  sink.each(z, begin, end, [&](Vector x, int k) LOKU_LAMBDA {
    const Mask is_top = equal(x, top);
    const Vector e = exponential_of_minus(top - x);
    sum[k % 2] = select(is_top, sum[k % 2], sum[k % 2] + e);
    ties = select(is_top, ties + one, ties);
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

// What row_statistics() knows of the columns seen so far. The piece that holds the runner-up stays apart until the row
// is done: a new runner-up then costs little more than finding it.
struct Search {
  float value = -INFINITY;
  int64_t begin = 0, end = 0;     // of the piece that holds it
  double rest = 0.0, held = 0.0;  // sums of exp(z - value) over the other pieces, and over this one
};

// Takes in columns that may hold a new runner-up. sum() is that of exp(z - finite_reference(best.value)) over them.
template <class T, class Sum>
LOKU_INLINE void take_piece(const T* z, int64_t begin, int64_t end, Sum sum, Search& best) {
  constexpr float kNear = 32.0f;  // as far above its reference as a float's exponential may be summed
  const float top = maximum(z + begin, end - begin);
  if (!(top > best.value)) {
    best.rest += sum();
    return;
  }
  const double shrink = std::exp(static_cast<double>(best.value) - top);
  const double rest = (best.rest + best.held) * shrink;
  const bool near = top - best.value < kNear;
  best = {top, begin, end, rest, near ? sum() * shrink : sum_exponentials(z, begin, end, top, Discard{})};
}

// Takes in [begin, end).
template <class T>
void take_columns(const T* z, int64_t begin, int64_t end, Search& best) {
  Reference reference(finite_reference(best.value));
  Sums sums;
  int64_t summed = 0;
  const auto flush = [&]() LOKU_LAMBDA {
    best.rest += sums.total() * reference.correction;
    sums = Sums();
    summed = 0;
  };
  for (int64_t size; begin < end; begin += size) {
    const bool is_known = best.value > -INFINITY && reference.is_usable;
    size = least(end - begin, kPiece);
    Sums piece;
    if (is_known && sum_piece(z + begin, size, reference, piece)) {
      sums.add(piece);
      if (++summed == kPiecesInASum) flush();
      continue;
    }
    flush();
    const auto sum = [&]() LOKU_LAMBDA {
      return is_known ? piece.total() * reference.correction
                      : sum_exponentials(z, begin, begin + size, reference.value, Discard{});
    };
    take_piece(z, begin, begin + size, sum, best);
    reference = Reference(finite_reference(best.value));
  }
  flush();
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
    take_columns(z, begin, end, best);
  });
  RunnerUp result(columns, target);
  result.rest = best.rest;
  if (best.value > -INFINITY) {
    result.value = best.value;
    result.index = best.begin + find(z + best.begin, best.end - best.begin, best.value);
    const double others = best.held - 1.0;
    result.rest += best.rest + others > 1.0 ? others : sum_of_others(z, best.begin, best.end, best.value, Discard{});
  }
  return result;
}

}  // namespace loku::LOKU_ISA
