// The Gram product as a torch operator; loku_kernels/backends/cpp.py calls it with arguments that it has checked.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <memory>

#include "dispatch.h"
#include "gram.h"
#include "workers.h"

namespace loku {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Adds to out[i] the share of the i-th of out.size(0) equal parts of M's rows.
void gram_product_(Tensor out, Tensor matrix, Tensor scales, Tensor x, int64_t instruction_set) {
  for (const Tensor& tensor : {out, matrix, scales, x}) {
    STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float, "all tensors must be float32");
  }
  const GramProblem problem{static_cast<const float*>(matrix.data_ptr()),
                            matrix.stride(0),
                            matrix.stride(1),
                            matrix.size(0),
                            matrix.size(1),
                            static_cast<const float*>(scales.data_ptr()),
                            static_cast<const float*>(x.data_ptr()),
                            x.size(1)};
  STD_TORCH_CHECK(problem.row_stride == 1 || problem.column_stride == 1, "matrix must have adjacent rows or columns");
  STD_TORCH_CHECK(scales.is_contiguous() && scales.numel() == problem.rows, "scales must be (rows,), contiguous");
  STD_TORCH_CHECK(x.is_contiguous() && x.size(0) == problem.columns && problem.width % kGramWidth == 0,
                  "x must be (columns, a multiple of ", kGramWidth, "), contiguous");
  const int64_t height = pieces_of(problem.columns, kGramSide) * kGramSide;
  STD_TORCH_CHECK(out.is_contiguous() && out.dim() == 3 && out.size(1) == height && out.size(2) == problem.width,
                  "out must be (parts, columns rounded up to a multiple of ", kGramSide, ", width), contiguous");
  const GramKernel kernel = LOKU_KERNELS(instruction_set, gram_product);
  const int64_t panels = pieces_of(problem.rows, kGramSide), parts = out.size(0);
  float* sums = static_cast<float*>(out.data_ptr());
  share_pieces(parts, 1, [&] {
    const int64_t room = kGramSide * (height + problem.width);
    return [&, scratch = std::unique_ptr<float[]>(new float[room])](int64_t first, int64_t last) {
      for (; first < last; ++first) {
        kernel(problem, first * panels / parts, (first + 1) * panels / parts, sums + first * height * problem.width,
               scratch.get());
      }
    };
  });
}

}  // namespace
}  // namespace loku

STABLE_TORCH_LIBRARY_FRAGMENT(loku_kernels_cpp, library) {
  library.def("gram_product_(Tensor(a!) out, Tensor matrix, Tensor scales, Tensor x, int instruction_set) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(loku_kernels_cpp, CPU, library) {
  library.impl("gram_product_", TORCH_BOX(&loku::gram_product_));
}
