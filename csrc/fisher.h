// The interface between the operators (fisher_ops.cpp) and the Fisher kernels, of which every instruction set has one
// table.
#pragma once

#include "rows.h"

namespace loku {

// F (out, in) += sum over sequences s of weights[s] * (sum over its tokens of grad_outputs^T inputs)^2.
struct FisherProblem {
  float* fisher;             // (out, in)
  const void* inputs;        // (tokens, in)
  const void* grad_outputs;  // (tokens, out)
  int64_t fisher_stride, inputs_stride, grad_outputs_stride;  // between rows, in elements
  int64_t tokens, out, in;
  const int64_t* offsets;  // (sequences + 1,)
  const float* weights;    // (sequences,)
  int64_t sequences;
};

struct FisherBlock {
  int64_t first_row, rows, first_column, columns;
};

// Tokens that follow one another in a sequence, as many as are multiplied at a time.
struct FisherPiece {
  int64_t first_token, tokens;
  float weight;
  bool opens, closes;  // the sequence
};

// A block's operands for one chunk of tokens, in the L2 cache of a current processor, and its partial sums.
constexpr int64_t kFisherRows = 256, kFisherColumns = 768, kFisherSteps = 224, kFisherPadding = 4;

struct alignas(64) FisherScratch {  // 1.7 MiB
  float grad_outputs[kFisherRows * (kFisherSteps + kFisherPadding)];
  float inputs[kFisherColumns * (kFisherSteps + kFisherPadding)];
  float partial_sums[kFisherRows * kFisherColumns];
  float row[kFisherColumns];
  FisherPiece pieces[kFisherSteps];
};

struct FisherKernels {
  void (*accumulate)(const FisherProblem&, const FisherBlock&, FisherScratch&);
  // fisher[0, count) += scale * grad^2
  void (*accumulate_grad)(float* fisher, const void* grad, float scale, int64_t count);
};

struct FisherKernelTable {
  int64_t tile_rows, tile_columns;  // what blocks should be multiples of
  FisherKernels of[kElements];
};

namespace portable {
extern const FisherKernelTable fisher_kernels;
}
namespace avx2 {
extern const FisherKernelTable fisher_kernels;
}
namespace avx512 {
extern const FisherKernelTable fisher_kernels;
}
namespace avx512bf16 {
extern const FisherKernelTable fisher_kernels;
}

}  // namespace loku
