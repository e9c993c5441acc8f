// The interface between the operators (ops.cpp) and the row kernels, of which every instruction set has one table.
// Neither side's headers reach the other: the kernels' object files see nothing of torch.
#pragma once

#include "types.h"

namespace loku {

// Rows of adjacent elements: row n starts at data + (n / rows_per_batch) * batch_stride + (n % rows_per_batch) *
// row_stride, in elements.
struct Rows {
  void* data;
  int64_t rows_per_batch, batch_stride, row_stride, columns;

  template <class T>
  LOKU_INLINE T* row(int64_t n) const {
    return static_cast<T*>(data) + n / rows_per_batch * batch_stride + n % rows_per_batch * row_stride;
  }
};

// A number per row; stride 0 gives every row the same one.
struct PerRow {
  const float* data;
  int64_t stride;

  LOKU_INLINE float operator[](int64_t n) const { return data[n * stride]; }
};

// What a row's loss is multiplied by: the factor, times the row's own number where rows have one (data not null).
struct RowWeight {
  PerRow values;
  float factor;

  LOKU_INLINE float operator[](int64_t n) const { return values.data ? factor * values[n] : factor; }
};

// z = scale * logit, or softcap * tanh(scale * logit / softcap) where softcap > 0.
struct Transform {
  float scale, softcap;

  LOKU_INLINE bool is_identity() const { return scale == 1.0f && softcap == 0.0f; }
};

struct Labels {
  const int64_t* data;
  int64_t ignore_index;
};

// The (7, N) table of loku_kernels/backends/formulas.py and the runner-up's column, for all N rows.
struct Table {
  float* data;
  int64_t* index;
  int64_t count;

  LOKU_INLINE float& operator()(int field, int64_t n) const { return data[field * count + n]; }
};

struct LossProblem {
  Rows logits;  // read, or overwritten with the gradient
  Labels labels;
  RowWeight ihl_weight, ce_weight;
  Transform transform;
  Table table;
};

struct GradientProblem {
  Rows logits, out;  // may be the same memory
  Labels labels;
  const int64_t* index;
  PerRow runner_up, g_target, g_runner_up, g_rest, upstream;
  Transform transform;
  bool streams;  // write past the caches
};

enum Element { kFloat, kBFloat16, kHalf, kElements };

// Each function serves rows [first, last), may run on several threads at once, and keeps at most a few floats per
// column of memory of its own.
struct RowKernels {
  void (*losses)(const LossProblem&, int64_t first, int64_t last);
  void (*losses_and_gradient)(const LossProblem&, int64_t first, int64_t last);
  void (*gradient)(const GradientProblem&, int64_t first, int64_t last);
};

using RowKernelTable = RowKernels[kElements];

namespace portable {
extern const RowKernelTable row_kernels;
}
namespace avx2 {
extern const RowKernelTable row_kernels;
}
namespace avx512 {
extern const RowKernelTable row_kernels;
}
namespace avx512bf16 {
extern const RowKernelTable row_kernels;
}

}  // namespace loku
