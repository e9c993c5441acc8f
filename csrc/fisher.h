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

  // Whatever the offsets say, there are no other tokens than 0 to tokens - 1.
  LOKU_INLINE int64_t first_token(int64_t sequence) const { return clamp(offsets[sequence], 0, tokens); }
  LOKU_INLINE int64_t length(int64_t sequence) const {
    const int64_t first = first_token(sequence);
    return clamp(offsets[sequence + 1], first, tokens) - first;
  }
  LOKU_INLINE static int64_t clamp(int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; }
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

// A block's operands for one chunk of tokens, in the L2 cache of a current processor, and its partial sums. Blocks of
// more than kFisherRows, a multiple of them, are for sequences that fit in a chunk, of which there are no partial sums.
constexpr int64_t kFisherRows = 256, kFisherColumns = 768, kFisherSteps = 224, kFisherPadding = 4;
constexpr int64_t kFisherMostRows = 4 * kFisherRows;

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
