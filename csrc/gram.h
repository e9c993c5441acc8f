// The interface between the operators (gram_ops.cpp) and the kernels, of which every instruction set has one pair.
#pragma once

#include "types.h"

namespace loku {

constexpr int64_t kGramSide = 48;   // of the square tiles that a matrix is cut into
constexpr int64_t kGramWidth = 16;  // floats in the widest vector

// A matrix (rows, columns), of which rows or columns have adjacent elements, and what they are multiplied by: scales of
// the rows or of the columns, the other stride being 0.
struct GramSource {
  const float *matrix, *scales;
  int64_t row_stride, column_stride, scale_row_stride, scale_column_stride;
  int64_t rows, columns;

  LOKU_INLINE bool by_rows() const { return column_stride == 1; }
};

// A, cut into panels of kGramSide rows and these into tiles, (panels, tiles, kGramSide, kGramSide), zeros around it.
struct GramProblem {
  const float* tiles;
  bool by_rows;  // whether rows of a tile, or its columns, have adjacent elements
  int64_t tiles_of_panel, columns;
  const float* x;  // (columns, width)
  int64_t width;   // a multiple of kGramWidth
};

struct GramKernels {
  // Panels [first, last) of tiles, in the order of the source.
  void (*pack)(const GramSource&, int64_t first, int64_t last, float* tiles);
  // out (tiles_of_panel * kGramSide, width) += sum over panels P in [first, last) of P^T P x. products: scratch,
  // kGramSide x width floats.
  void (*add_products)(const GramProblem&, int64_t first, int64_t last, float* out, float* products);
};

namespace portable {
extern const GramKernels gram_kernels;
}
namespace avx2 {
extern const GramKernels gram_kernels;
}
namespace avx512 {
extern const GramKernels gram_kernels;
}
namespace avx512bf16 {
extern const GramKernels gram_kernels;
}

}  // namespace loku
