// The Fisher kernels as torch operators; loku_kernels/backends/cpp.py calls them with arguments that it has checked.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <memory>

#include "dispatch.h"
#include "fisher.h"
#include "workers.h"

namespace loku {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Element element_of(const Tensor& values) {
  const ScalarType type = values.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half,
                  "values must be float32, bfloat16 or float16");
  return type == ScalarType::Float ? kFloat : type == ScalarType::BFloat16 ? kBFloat16 : kHalf;
}

int64_t row_stride(const Tensor& matrix) {
  STD_TORCH_CHECK(matrix.dim() == 2 && (matrix.stride(1) == 1 || matrix.size(1) <= 1 || matrix.size(0) == 0),
                  "a matrix must have two dimensions and adjacent columns");
  return matrix.stride(0);
}

// One side of the blocks: `pieces` of nearly equal size, a multiple of the tile.
int64_t block_side(int64_t size, int64_t pieces, int64_t tile) {
  return pieces_of(pieces_of(size, pieces), tile) * tile;
}

int64_t longest_sequence(const FisherProblem& problem) {
  int64_t longest = 0;
  for (int64_t s = 0; s < problem.sequences; ++s) longest = std::max(longest, problem.length(s));
  return longest;
}

// How F (out, in) is cut into blocks: as large as the scratch memory allows, for packing costs 1 / rows + 1 / columns,
// but with four for every thread where a side of 64 or more is left.
struct Grid {
  int64_t rows, columns, across;

  Grid(const FisherKernelTable& kernels, const FisherProblem& problem, int64_t threads) {
    const int64_t out = problem.out, in = problem.in;
    const int64_t limit = longest_sequence(problem) > kFisherSteps ? kFisherRows : kFisherMostRows;
    const int64_t most_rows = limit / kernels.tile_rows * kernels.tile_rows;
    const int64_t most_columns = kFisherColumns / kernels.tile_columns * kernels.tile_columns;
    rows = block_side(out, pieces_of(out, most_rows), kernels.tile_rows);
    columns = block_side(in, pieces_of(in, most_columns), kernels.tile_columns);
    while (pieces_of(out, rows) * pieces_of(in, columns) < 4 * threads && std::max(rows, columns) >= 128) {
      if (rows >= columns) {
        rows = block_side(rows, 2, kernels.tile_rows);
      } else {
        columns = block_side(columns, 2, kernels.tile_columns);
      }
    }
    across = pieces_of(in, columns);
  }

  FisherBlock block(int64_t number, int64_t out, int64_t in) const {
    const int64_t row = number / across * rows, column = number % across * columns;
    return {row, std::min(rows, out - row), column, std::min(columns, in - column)};
  }
};

void fisher_accumulate_(Tensor fisher, Tensor inputs, Tensor grad_outputs, Tensor offsets, Tensor weights,
                        int64_t instruction_set) {
  const FisherProblem problem{static_cast<float*>(fisher.data_ptr()),
                              inputs.data_ptr(),
                              grad_outputs.data_ptr(),
                              row_stride(fisher),
                              row_stride(inputs),
                              row_stride(grad_outputs),
                              inputs.size(0),
                              fisher.size(0),
                              fisher.size(1),
                              static_cast<const int64_t*>(offsets.data_ptr()),
                              static_cast<const float*>(weights.data_ptr()),
                              weights.numel()};
  STD_TORCH_CHECK(fisher.scalar_type() == ScalarType::Float, "fisher must be float32");
  STD_TORCH_CHECK(inputs.scalar_type() == grad_outputs.scalar_type(), "inputs and grad_outputs must share a dtype");
  STD_TORCH_CHECK(inputs.size(1) == problem.in && grad_outputs.size(1) == problem.out &&
                      grad_outputs.size(0) == problem.tokens,
                  "inputs must be (tokens, in), grad_outputs (tokens, out) and fisher (out, in)");
  STD_TORCH_CHECK(offsets.scalar_type() == ScalarType::Long && offsets.is_contiguous() &&
                      offsets.numel() == problem.sequences + 1,
                  "offsets must be (S + 1,) int64, contiguous");
  STD_TORCH_CHECK(weights.scalar_type() == ScalarType::Float && weights.is_contiguous(),
                  "weights must be (S,) float32, contiguous");
  if (problem.out == 0 || problem.in == 0) return;
  const FisherKernelTable& kernels = LOKU_KERNELS(instruction_set, fisher_kernels);
  const auto accumulate = kernels.of[element_of(inputs)].accumulate;
  const Grid grid(kernels, problem, torch::stable::get_num_threads());
  const int64_t blocks = pieces_of(problem.out, grid.rows) * grid.across;
  share_pieces(blocks, 1, [&] {
    return [&, scratch = std::unique_ptr<FisherScratch>(new FisherScratch)](int64_t first, int64_t last) {
      for (; first < last; ++first) accumulate(problem, grid.block(first, problem.out, problem.in), *scratch);
    };
  });
}

void fisher_accumulate_grad_(Tensor fisher, Tensor grad, double scale, int64_t instruction_set) {
  STD_TORCH_CHECK(fisher.scalar_type() == ScalarType::Float && fisher.is_contiguous(),
                  "fisher must be float32, contiguous");
  STD_TORCH_CHECK(grad.is_contiguous() && grad.numel() == fisher.numel(),
                  "grad must be contiguous and of fisher's shape");
  constexpr int64_t kLeastWork = 32768;  // elements
  const Element element = element_of(grad);
  const auto accumulate = LOKU_KERNELS(instruction_set, fisher_kernels).of[element].accumulate_grad;
  float* f = static_cast<float*>(fisher.data_ptr());
  const char* g = static_cast<const char*>(grad.data_ptr());
  // A thread gets the same part each time, some of which its own cache may still hold.
  torch::stable::parallel_for(0, fisher.numel(), kLeastWork, [&](int64_t begin, int64_t end) {
    accumulate(f + begin, g + begin * (element == kFloat ? 4 : 2), static_cast<float>(scale), end - begin);
  });
}

}  // namespace
}  // namespace loku

STABLE_TORCH_LIBRARY_FRAGMENT(loku_kernels_cpp, library) {
  library.def(
      "fisher_accumulate_(Tensor(a!) fisher, Tensor inputs, Tensor grad_outputs, Tensor offsets, Tensor weights, int "
      "instruction_set) -> ()");
  library.def("fisher_accumulate_grad_(Tensor(a!) fisher, Tensor grad, float scale, int instruction_set) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(loku_kernels_cpp, CPU, library) {
  library.impl("fisher_accumulate_", TORCH_BOX(&loku::fisher_accumulate_));
  library.impl("fisher_accumulate_grad_", TORCH_BOX(&loku::fisher_accumulate_grad_));
}
