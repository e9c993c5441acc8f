// The interface between the operator (gram_ops.cpp) and the kernel, of which every instruction set has one.
#pragma once

#include "types.h"

namespace loku {

// M (rows, columns), of which either rows or columns have adjacent elements, and x (columns, width).
struct GramProblem {
  const float* matrix;
  int64_t row_stride, column_stride;  // in elements; one of them is 1
  int64_t rows, columns;
  const float* scales;  // (rows,)
  const float* x;
  int64_t width;  // a multiple of kGramWidth
};

constexpr int64_t kGramSide = 48;   // of the square tiles that M is cut into
constexpr int64_t kGramWidth = 16;  // floats in the widest vector

// out (columns rounded up to whole tiles, width) += sum over rows first * kGramSide <= i < last * kGramSide of
// (scales[i] M_i)^T (scales[i] M_i x). scratch: kGramSide rows of as many floats as out has rows, and width more.
using GramKernel = void (*)(const GramProblem&, int64_t first, int64_t last, float* out, float* scratch);

namespace portable {
extern const GramKernel gram_product;
}
namespace avx2 {
extern const GramKernel gram_product;
}
namespace avx512 {
extern const GramKernel gram_product;
}
namespace avx512bf16 {
extern const GramKernel gram_product;
}

}  // namespace loku
