// The runner-up of a row and the sum of the other exponentials, reading the row from memory once.
//
// The exponentials are relative to one of the row's first logits, and a larger one is only remembered: beside the sums,
// looking for the runner-up costs a comparison. A much larger one becomes the reference of what follows.
#pragma once

#include "runner_up.h"

namespace loku::LOKU_ISA {

// Columns of a row: `runs` runs of `size` of them, `stride` apart, without the target.
struct Columns {
  int64_t begin, size, stride;
  int runs;
  int64_t target;

  // How far into a run the target is; `size` where no run holds it.
  LOKU_INLINE int64_t target_offset() const {
    for (int run = 0; run < runs; ++run) {
      const int64_t offset = target - begin - run * stride;
      if (offset >= 0 && offset < size) return offset;
    }
    return size;
  }

  // Calls visit(begin, end) for what is adjacent, from left to right.
  template <class Visit>
  LOKU_INLINE void each(Visit visit) const {
    for (int run = 0; run < runs; ++run) {
      const int64_t left = begin + run * stride, right = left + size;
      const bool is_split = target >= left && target < right;
      visit(left, is_split ? target : right);
      if (is_split) visit(target + 1, right);
    }
  }
};

template <class T>
float maximum(const T* z, const Columns& columns) {
  Tops tops;
  columns.each([&](int64_t begin, int64_t end) LOKU_LAMBDA {
    sweep_in_any_order(z + begin, end - begin, [&](Vector x, int k) LOKU_LAMBDA { tops.take(x, k); });
  });
  return largest(tops.lanes());
}

// The first of the columns that holds `value`, which one does.
template <class T>
int64_t find(const T* z, const Columns& columns, float value) {
  int64_t found = -1;
  columns.each([&](int64_t begin, int64_t end) LOKU_LAMBDA {
    if (found >= 0 || begin == end) return;
    const int64_t here = begin + find(z + begin, end - begin, value);
    if (to_float(z + here) == value) found = here;
  });
  return found;
}

// Of columns where no z is larger than `top`, the sum of exp(z - top) without one of those that are equal to it.
template <class T>
double sum_of_others(const T* z, const Columns& columns, float top) {
  BesideTop all{};
  columns.each([&](int64_t begin, int64_t end) LOKU_LAMBDA {
    const BesideTop here = beside_top(z, begin, end, top, Discard{});
    all = {all.equal + here.equal, all.smaller + here.smaller};
  });
  return all.without_one();
}

// In each lane, the largest z and the sum of exponential(z).
struct LaneSums {
  Vector top, sum;
};

// Over columns in one run, or in kRuns of a multiple of kGrain columns. `ahead` as in sweep_runs_in_any_order.
template <class T, class Exponential>
LOKU_INLINE LaneSums sum_lanes(const T* z, const Columns& columns, int64_t ahead, Exponential exponential) {
  Tops tops;
  Sums sums;
  const auto take = [&](Vector x, int k) LOKU_LAMBDA {
    tops.take(x, k);
    sums.sum[k] = sums.sum[k] + exponential(x);
  };
  Columns apart = columns;  // not in runs side by side: the grain around the target
  if (columns.runs == kRuns) {
    const int64_t grain = columns.target_offset() / kGrain * kGrain;
    for (int64_t from = 0, to = grain; from < columns.size; from = to + kGrain, to = columns.size) {
      sweep_runs_in_any_order(z + columns.begin + from, to - from, columns.stride, ahead, take);
    }
    apart.begin += grain;
    apart.size = least(kGrain, columns.size - grain);
  }
  apart.each([&](int64_t begin, int64_t end) LOKU_LAMBDA { sweep_in_any_order(z + begin, end - begin, take); });
  return {tops.lanes(), sums.lanes()};
}

// A row without its target, in blocks whose sums stay apart until the runner-up is known: to leave that out exactly,
// only the block that holds it is summed again.
template <class T>
class BlockwiseRow {
 public:
  // Sums a row of z. `next` is the row that will be wanted next.
  BlockwiseRow(const T* z, int64_t columns, int64_t target, const T* next)
      : z_(z),
        next_(next),
        columns_(columns),
        target_(target),
        stride_(columns < kRuns * kSize ? 0 : columns / (kRuns * kGrain) * kGrain) {
    size_ = pieces_of(stride_, (kMostBlocks - 1) * kGrain) * kGrain;
    if (size_ < kSize) size_ = kSize;
    blocks_ = pieces_of(stride_, size_) + 1;
    float seen = maximum(z, {0, least(columns, kRuns * kGrain), 0, 1, target});
    reference_ = Reference(finite_reference(seen));
    for (int64_t b = 0; b < blocks_; ++b) {
      if (seen == -INFINITY) {
        seen = maximum(z, block(b));
        reference_ = Reference(finite_reference(seen));
      }
      take(b);
    }
  }

  RunnerUp runner_up() const {
    Vector top = lanes_[0].top;
    for (int64_t b = 1; b < blocks_; ++b) top = larger(lanes_[b].top, top);
    RunnerUp result(columns_, target_);
    result.value = largest(top);
    int64_t holder = -1;
    Vector rest = broadcast(0.0f);
    for (int64_t b = 0; b < blocks_; ++b) {
      const bool holds = result.value > -INFINITY && first_equal(lanes_[b].top, broadcast(result.value)) < kWidth;
      if (holds) {
        const int64_t index = find(z_, block(b), result.value);
        result.index = holder < 0 ? index : least(index, result.index);
      }
      if (holds && holder < 0) {
        holder = b;
      } else {
        rest = rest + lanes_[b].sum;
      }
    }
    const double scale = reference_.correction * std::exp(reference_.value - static_cast<double>(result.value));
    if (holder < 0) {
      result.rest = sum_of(rest);
      return result;
    }
    const double others = sum_of(lanes_[holder].sum) * scale - 1.0;
    result.rest = sum_of(rest) * scale;
    result.rest += result.rest + others > 1.0 ? others : sum_of_others(z_, block(holder), result.value);
    return result;
  }

 private:
  static constexpr int64_t kSize = 1024, kMostBlocks = 64;
  // Further above the reference, exponents would lose bits that matter.
  static constexpr float kNear = 4.0f;

  // The last block is what the runs leave of the columns; of the others the first is smaller, where one must be.
  Columns block(int64_t b) const {
    if (b == blocks_ - 1) return {kRuns * stride_, columns_ - kRuns * stride_, 0, 1, target_};
    const int64_t end = stride_ - (blocks_ - 2 - b) * size_, begin = b == 0 ? 0 : end - size_;
    return {begin, end - begin, stride_, kRuns, target_};
  }

  LOKU_INLINE void take(int64_t b) {
    lanes_[b] = sum(b);
    if (all_negative(lanes_[b].top - broadcast(reference_.value + kNear))) return;
    refer_to(largest(lanes_[b].top), b);
    lanes_[b] = sum(b);
  }

  // Asks for the next block's lines meanwhile: where the runs end, for what they leave and for those of the next row.
  LaneSums sum(int64_t b) const {
    const bool ends_runs = b == blocks_ - 2;
    const int64_t ahead = ends_runs ? next_ - z_ - stride_ + size_ : size_;
    if (ends_runs) prefetch_lines(z_ + kRuns * stride_, columns_ - kRuns * stride_);
    if (!reference_.is_usable) {
      const Vector top = broadcast(reference_.value);
      return sum_lanes(z_, block(b), ahead, [&](Vector x) LOKU_LAMBDA { return exponential_of_minus(top - x); });
    }
    return sum_lanes(z_, block(b), ahead, [&](Vector x) LOKU_LAMBDA { return two_to_the(reference_.distance(x)); });
  }

  // `blocks` have been summed so far.
  void refer_to(float top, int64_t blocks) {
    const Reference before = reference_;
    reference_ = Reference(top);
    const double shrink = std::exp(static_cast<double>(before.value) - top) * before.correction / reference_.correction;
    for (int64_t b = 0; b < blocks; ++b) lanes_[b].sum = lanes_[b].sum * broadcast(static_cast<float>(shrink));
  }

  const T* const z_;
  const T* const next_;
  const int64_t columns_, target_, stride_;
  int64_t size_, blocks_;
  Reference reference_{0.0f};
  LaneSums lanes_[kMostBlocks];
};

template <class T>
RunnerUp row_statistics(const T* z, int64_t columns, int64_t target, const T* next) {
  return BlockwiseRow<T>(z, columns, target, next).runner_up();
}

}  // namespace loku::LOKU_ISA
