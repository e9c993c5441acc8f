// Losses and gradients of rows of logits, on whichever simd_*.h came before.
//
// The gradient that comes with the loss keeps the exponentials of the loss, over the row itself (float) or in a scratch
// row (16 bits), and multiplies them once the row's coefficients are known: a row of 10^5 columns is still in the L2
// cache by then.
//
// Bytes that cross memory: losses V * sizeof(T) per row; losses_and_gradient and gradient 2 V * sizeof(T).
#pragma once

#include <cmath>
#include <memory>
#include <type_traits>

#include "formulas.h"
#include "row_statistics.h"
#include "rows.h"

namespace loku::LOKU_ISA {

using Scratch = std::unique_ptr<float[]>;

enum class Label { kValid, kIgnored, kInvalid };

LOKU_INLINE Label classify(const Labels& labels, int64_t n, int64_t columns) {
  const int64_t label = labels.data[n];
  if (label == labels.ignore_index) return Label::kIgnored;
  return label >= 0 && label < columns ? Label::kValid : Label::kInvalid;
}

// The next row before `last` whose label is valid, or n itself.
LOKU_INLINE int64_t next_valid(const Labels& labels, int64_t n, int64_t last, int64_t columns) {
  for (int64_t next = n + 1; next < last; ++next) {
    if (classify(labels, next, columns) == Label::kValid) return next;
  }
  return n;
}

// What a row without a valid label gets: zeros where it is ignored, NaN otherwise.
LOKU_INLINE float placeholder(Label label) { return label == Label::kIgnored ? 0.0f : NAN; }

inline void write_placeholder(const Table& table, int64_t n, Label label) {
  for (int field = 0; field < 7; ++field) table(field, n) = placeholder(label);
  table.index[n] = -1;
}

inline Partials write_row(const LossProblem& problem, int64_t n, float target, const RunnerUp& best) {
  const Partials partials =
      combine({target, best.value, best.rest}, problem.ihl_weight[n], problem.ce_weight[n]);
  const double fields[7] = {partials.loss,   target,           best.rest,    best.value,
                            partials.target, partials.runner_up, partials.rest};
  for (int field = 0; field < 7; ++field) problem.table(field, n) = static_cast<float>(fields[field]);
  problem.table.index[n] = best.index;
  return partials;
}

// z of a row of logits. `scratch` holds one row.
template <class T>
void transform_row(const T* logits, int64_t columns, const Transform& transform, float* scratch) {
  const Vector scale = broadcast(transform.scale);
  if (transform.softcap > 0) {
    const Vector cap = broadcast(transform.softcap);
    sweep(logits, columns, [&](int64_t i, Vector x, int lanes, int) LOKU_LAMBDA {
      store_lanes(scratch + i, lanes, cap * hyperbolic_tangent(x * scale / cap));
    });
  } else {
    sweep(logits, columns, [&](int64_t i, Vector x, int lanes, int) LOKU_LAMBDA {
      store_lanes(scratch + i, lanes, x * scale);
    });
  }
}

template <class T>
void row_losses(const LossProblem& problem, int64_t first, int64_t last) {
  const FlushSubnormals flushed;
  const int64_t columns = problem.logits.columns;
  const Scratch z(new float[problem.transform.is_identity() ? 0 : columns]);
  for (int64_t n = first; n < last; ++n) {
    const Label label = classify(problem.labels, n, columns);
    if (label != Label::kValid) {
      write_placeholder(problem.table, n, label);
      continue;
    }
    const int64_t target = problem.labels.data[n];
    const T* logits = problem.logits.row<T>(n);
    if (problem.transform.is_identity()) {
      const T* next = problem.logits.row<T>(next_valid(problem.labels, n, last, columns));
      write_row(problem, n, to_float(logits + target), row_statistics(logits, columns, target, next));
    } else {
      transform_row(logits, columns, problem.transform, z.get());
      write_row(problem, n, z[target], row_statistics(z.get(), columns, target, z.get()));
    }
  }
}

// What a row's gradient is made of: rest * exp(z - runner_up_logit), except in two columns.
struct Gradient {
  int64_t target_column, runner_up_column;
  float runner_up_logit;
  double target, runner_up, rest;
};

// dz / dlogit.
LOKU_INLINE double chain_rule(const Transform& t, double logit) {
  if (t.softcap == 0) return t.scale;
  const double cosh = std::cosh(logit * t.scale / t.softcap);
  return t.scale / (cosh * cosh);
}

// The gradient with respect to a row of logits, of which `z` is the transform; put(position, lanes, gradient) takes it.
// Two columns are left wrong.
template <class T, class Z, class Put>
LOKU_INLINE void sweep_gradient(const T* logits, const Z* z, int64_t columns, const Gradient& g,
                                const Transform& transform, Put put) {
  const Vector top = broadcast(finite_reference(g.runner_up_logit));
  const Vector rest = broadcast(static_cast<float>(g.rest * transform.scale));
  if (transform.softcap > 0) {
    const Vector scale = broadcast(transform.scale), cap = broadcast(transform.softcap);
    sweep(z, columns, [&](int64_t i, Vector x, int lanes, int) LOKU_LAMBDA {
      const Vector slope = derivative_of_tangent(load_lanes(logits + i, lanes) * scale / cap);
      put(i, lanes, rest * exponential_of_minus(top - x) * slope);
    });
  } else {
    sweep(z, columns, [&](int64_t i, Vector x, int lanes, int) LOKU_LAMBDA {
      put(i, lanes, rest * exponential_of_minus(top - x));
    });
  }
}

// The two columns that the sweeps leave wrong. The target comes last: a vocabulary of one has no other column.
template <class T>
LOKU_INLINE void patch(T* out, const Gradient& g, double target, double runner_up) {
  put_float(out + g.runner_up_column, runner_up);
  put_float(out + g.target_column, target);
}

// `out` may be `logits`.
template <class T, class Z>
void write_gradient(const T* logits, const Z* z, T* out, int64_t columns, const Gradient& g,
                    const Transform& transform) {
  const double target = g.target * chain_rule(transform, to_float(logits + g.target_column));
  const double runner_up = g.runner_up * chain_rule(transform, to_float(logits + g.runner_up_column));
  sweep_gradient(logits, z, columns, g, transform, [&](int64_t i, int lanes, Vector x) LOKU_LAMBDA {
    store_lanes(out + i, lanes, x);
  });
  patch(out, g, target, runner_up);
}

// The same past the caches, which spares reading `out` before it is overwritten: 1.2 times faster where the whole
// output is larger than the caches. Streaming stores are aligned.
template <class T, class Z>
void stream_gradient(const T* logits, const Z* z, T* out, int64_t columns, const Gradient& g,
                     const Transform& transform) {
  const int64_t past_boundary = reinterpret_cast<uintptr_t>(out) / sizeof(T) % kWidth;
  const int64_t to_boundary = past_boundary == 0 ? 0 : kWidth - past_boundary;
  const int64_t head = to_boundary < columns ? to_boundary : columns;
  sweep_gradient(logits, z, head, g, transform, [&](int64_t i, int lanes, Vector x) LOKU_LAMBDA {
    store_lanes(out + i, lanes, x);
  });
  sweep_gradient(logits + head, z + head, columns - head, g, transform, [&](int64_t i, int lanes, Vector x) LOKU_LAMBDA {
    lanes == kWidth ? stream(out + head + i, x) : store_first(out + head + i, lanes, x);
  });
  patch(out, g, g.target * chain_rule(transform, to_float(logits + g.target_column)),
        g.runner_up * chain_rule(transform, to_float(logits + g.runner_up_column)));
}

template <class T>
void row_gradient(const GradientProblem& problem, int64_t first, int64_t last) {
  const FlushSubnormals flushed;
  const int64_t columns = problem.logits.columns;
  const Scratch z(new float[problem.transform.is_identity() ? 0 : columns]);
  for (int64_t n = first; n < last; ++n) {
    T* out = problem.out.row<T>(n);
    const Label label = classify(problem.labels, n, columns);
    if (label != Label::kValid) {
      fill(out, columns, placeholder(label));
      continue;
    }
    const double upstream = problem.upstream[n];
    const int64_t index = problem.index[n];
    const Gradient g{problem.labels.data[n],
                     index >= 0 && index < columns ? index : 0,
                     problem.runner_up[n],
                     upstream * problem.g_target[n],
                     upstream * problem.g_runner_up[n],
                     upstream * problem.g_rest[n]};
    const T* logits = problem.logits.row<T>(n);
    if (problem.transform.is_identity()) {
      (problem.streams ? stream_gradient<T, T> : write_gradient<T, T>)(logits, logits, out, columns, g, problem.transform);
    } else {
      transform_row(logits, columns, problem.transform, z.get());
      (problem.streams ? stream_gradient<T, float> : write_gradient<T, float>)(logits, z.get(), out, columns, g,
                                                                              problem.transform);
    }
  }
  if (problem.streams) finish_streaming();
}

// One row whose z are its logits. `kept` has room for the row's exponentials and may be the row itself; `references`
// has room for the runner-up that each block's exponentials are relative to.
template <class T>
void loss_and_gradient(const LossProblem& problem, int64_t n, float* kept, float* references) {
  const int64_t columns = problem.logits.columns, target = problem.labels.data[n];
  T* row = problem.logits.row<T>(n);
  const float target_logit = to_float(row + target);
  RunnerUp best(columns, target);
  for_each_block(columns, target, [&](int64_t number, int64_t begin, int64_t end) {
    take_block(row, begin, end, best, Keep{kept});
    references[number] = best.value;
  });
  const Partials g = write_row(problem, n, target_logit, best);
  for_each_block(columns, target, [&](int64_t number, int64_t begin, int64_t end) {
    const double distance = references[number] == best.value ? 0.0 : references[number] - static_cast<double>(best.value);
    const Vector factor = broadcast(static_cast<float>(g.rest * std::exp(distance)));
    sweep(kept + begin, end - begin, [&](int64_t i, Vector e, int lanes, int) LOKU_LAMBDA {
      store_lanes(row + begin + i, lanes, e * factor);
    });
  });
  patch(row, {target, best.index, best.value, 0, 0, 0}, g.target, g.runner_up);
}

template <class T>
void row_losses_and_gradient(const LossProblem& problem, int64_t first, int64_t last) {
  const FlushSubnormals flushed;
  const int64_t columns = problem.logits.columns;
  const bool in_row = std::is_same<T, float>::value && problem.transform.is_identity();
  const Scratch scratch(new float[in_row ? 0 : columns]), references(new float[most_blocks(columns)]);
  for (int64_t n = first; n < last; ++n) {
    T* row = problem.logits.row<T>(n);
    const Label label = classify(problem.labels, n, columns);
    if (label != Label::kValid) {
      write_placeholder(problem.table, n, label);
      fill(row, columns, placeholder(label));
    } else if (problem.transform.is_identity()) {
      loss_and_gradient<T>(problem, n, in_row ? reinterpret_cast<float*>(row) : scratch.get(), references.get());
    } else {
      const int64_t target = problem.labels.data[n];
      transform_row(row, columns, problem.transform, scratch.get());
      const RunnerUp best = row_statistics(scratch.get(), columns, target, scratch.get());
      const Partials g = write_row(problem, n, scratch[target], best);
      write_gradient(row, scratch.get(), row, columns, {target, best.index, best.value, g.target, g.runner_up, g.rest},
                     problem.transform);
    }
  }
}

template <class T>
constexpr RowKernels row_kernels_of() {
  return {row_losses<T>, row_losses_and_gradient<T>, row_gradient<T>};
}

const RowKernelTable row_kernels = {row_kernels_of<float>(), row_kernels_of<BFloat16>(), row_kernels_of<Half>()};

}  // namespace loku::LOKU_ISA
