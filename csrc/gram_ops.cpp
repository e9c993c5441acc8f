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

int64_t gram_side() { return kGramSide; }

void check_tiles(const Tensor& tiles, int64_t columns) {
  STD_TORCH_CHECK(tiles.scalar_type() == ScalarType::Float && tiles.is_contiguous() && tiles.dim() == 4 &&
                      tiles.size(1) == pieces_of(columns, kGramSide) && tiles.size(2) == kGramSide &&
                      tiles.size(3) == kGramSide,
                  "tiles must be (panels, tiles, ", kGramSide, ", ", kGramSide, ") float32, contiguous");
}

// scales * matrix, cut into tiles. Both (rows, columns); the matrix and what the scales repeat as in GramSource.
void gram_pack_(Tensor tiles, Tensor matrix, Tensor scales, int64_t instruction_set) {
  STD_TORCH_CHECK(matrix.scalar_type() == ScalarType::Float && scales.scalar_type() == ScalarType::Float,
                  "matrix and scales must be float32");
  STD_TORCH_CHECK(matrix.dim() == 2 && scales.dim() == 2 && scales.size(0) == matrix.size(0) &&
                      scales.size(1) == matrix.size(1),
                  "matrix and scales must have one shape, (rows, columns)");
  STD_TORCH_CHECK(matrix.stride(0) == 1 || matrix.stride(1) == 1, "matrix must have adjacent rows or columns");
  STD_TORCH_CHECK((scales.stride(0) == 0 && scales.stride(1) == 1) || (scales.stride(0) == 1 && scales.stride(1) == 0),
                  "scales must be those of rows or of columns, expanded");
  check_tiles(tiles, matrix.size(1));
  const int64_t panels = tiles.size(0);
  STD_TORCH_CHECK(panels == pieces_of(matrix.size(0), kGramSide), "tiles must have a panel for each ", kGramSide, " rows");
  const GramSource source{static_cast<const float*>(matrix.data_ptr()),
                          static_cast<const float*>(scales.data_ptr()),
                          matrix.stride(0),
                          matrix.stride(1),
                          scales.stride(0),
                          scales.stride(1),
                          matrix.size(0),
                          matrix.size(1)};
  const auto pack = LOKU_KERNELS(instruction_set, gram_kernels).pack;
  float* out = static_cast<float*>(tiles.data_ptr());
  share_pieces(panels, 1, [&] {
    return [&](int64_t first, int64_t last) { pack(source, first, last, out); };
  });
}

// Adds to out[i] the share of the i-th of out.size(0) equal parts of the panels.
void gram_product_(Tensor out, Tensor tiles, bool by_rows, Tensor x, int64_t instruction_set) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && x.is_contiguous() && x.dim() == 2 &&
                      x.size(1) % kGramWidth == 0,
                  "x must be (columns, a multiple of ", kGramWidth, ") float32, contiguous");
  check_tiles(tiles, x.size(0));
  const GramProblem problem{static_cast<const float*>(tiles.data_ptr()), by_rows, tiles.size(1), x.size(0),
                            static_cast<const float*>(x.data_ptr()), x.size(1)};
  const int64_t height = problem.tiles_of_panel * kGramSide;
  STD_TORCH_CHECK(out.scalar_type() == ScalarType::Float && out.is_contiguous() && out.dim() == 3 &&
                      out.size(1) == height && out.size(2) == problem.width,
                  "out must be (parts, columns rounded up to a multiple of ", kGramSide, ", width) float32, contiguous");
  const auto add_products = LOKU_KERNELS(instruction_set, gram_kernels).add_products;
  const int64_t panels = tiles.size(0), parts = out.size(0);
  float* sums = static_cast<float*>(out.data_ptr());
  share_pieces(parts, 1, [&] {
    return [&, products = std::unique_ptr<float[]>(new float[kGramSide * problem.width])](int64_t first, int64_t last) {
      for (; first < last; ++first) {
        add_products(problem, first * panels / parts, (first + 1) * panels / parts,
                     sums + first * height * problem.width, products.get());
      }
    };
  });
}

}  // namespace
}  // namespace loku

STABLE_TORCH_LIBRARY_FRAGMENT(loku_kernels_cpp, library) {
  library.def("gram_side() -> int");
  library.def("gram_pack_(Tensor(a!) tiles, Tensor matrix, Tensor scales, int instruction_set) -> ()");
  library.def("gram_product_(Tensor(a!) out, Tensor tiles, bool by_rows, Tensor x, int instruction_set) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(loku_kernels_cpp, CompositeExplicitAutograd, library) {
  library.impl("gram_side", TORCH_BOX(&loku::gram_side));
}

STABLE_TORCH_LIBRARY_IMPL(loku_kernels_cpp, CPU, library) {
  library.impl("gram_pack_", TORCH_BOX(&loku::gram_pack_));
  library.impl("gram_product_", TORCH_BOX(&loku::gram_product_));
}
