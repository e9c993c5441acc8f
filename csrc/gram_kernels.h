// M^T diag(scales)^2 M x for a thin x, on whichever simd_*.h came before.
//
// A product with M and one with M^T read it twice, and a library lays it out anew for both, which for 16 to 64 columns
// takes longer than the multiplications. Here a panel of 48 rows is copied into tiles of 48 x 48 while its product with
// x is formed, and is multiplied a second time from there before the next panel comes.
//
// Bytes that cross memory: M once; x and out once a panel, mostly from the L2 or L3 cache.
#pragma once

#include "gram.h"

namespace loku::LOKU_ISA {

constexpr int kGramVectors = 4;
constexpr int kGramSums = kWidth == 16 ? 24 : 12;  // in 32 or 16 registers

// c (kGramSums / kVectors rows, kVectors vectors) += a (rows, steps) b (steps, kVectors vectors), with rows of b and c
// `width` apart.
template <int kVectors>
void add_gram_tile(const float* a, int64_t a_row, int64_t a_step, int64_t steps, const float* b, float* c,
                   int64_t width) {
  constexpr int kRows = kGramSums / kVectors;
  const auto each = [](auto visit) LOKU_LAMBDA {
#pragma GCC unroll 24
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) visit(r, v);
    }
  };
  Vector sum[kRows][kVectors];
  each([&](int r, int v) LOKU_LAMBDA { sum[r][v] = broadcast(0.0f); });
  for (; steps > 0; --steps, a += a_step, b += width) {
    Vector row[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) row[v] = load(b + v * kWidth);
    each([&](int r, int v) LOKU_LAMBDA { sum[r][v] = multiply_add(broadcast(a[r * a_row]), row[v], sum[r][v]); });
  }
  each([&](int r, int v) LOKU_LAMBDA {
    float* place = c + r * width + v * kWidth;
    store(place, load(place) + sum[r][v]);
  });
}

// c (kGramSide, width) += a (kGramSide, steps) b (steps, width).
template <int kVectors = kGramVectors>
void add_gram_product(const float* a, int64_t a_row, int64_t a_step, int64_t steps, const float* b, float* c,
                      int64_t width, int64_t first_column = 0) {
  constexpr int kRows = kGramSums / kVectors;
  static_assert(kGramSide % kRows == 0, "tiles hold whole groups of rows");
  for (; first_column + kVectors * kWidth <= width; first_column += kVectors * kWidth) {
    for (int64_t r = 0; r < kGramSide; r += kRows) {
      add_gram_tile<kVectors>(a + r * a_row, a_row, a_step, steps, b + first_column, c + r * width + first_column,
                              width);
    }
  }
  if constexpr (kVectors > 1) add_gram_product<kVectors - 1>(a, a_row, a_step, steps, b, c, width, first_column);
}

// A tile of M, (rows, columns), with zeros around it, in M's own order.
inline void copy_tile(const GramProblem& problem, int64_t row, int64_t column, int64_t rows, int64_t columns,
                      float* tile) {
  const float* from = problem.matrix + row * problem.row_stride + column * problem.column_stride;
  const bool by_rows = problem.column_stride == 1;
  const int64_t lines = by_rows ? rows : columns, length = by_rows ? columns : rows;
  const int64_t stride = by_rows ? problem.row_stride : problem.column_stride;
  if (rows < kGramSide || columns < kGramSide) std::memset(tile, 0, kGramSide * kGramSide * sizeof(float));
  for (int64_t i = 0; i < lines; ++i) std::memcpy(tile + i * kGramSide, from + i * stride, length * sizeof(float));
}

inline void add_gram_panels(const GramProblem& problem, int64_t first, int64_t last, float* out, float* scratch) {
  const int64_t width = problem.width, tiles = pieces_of(problem.columns, kGramSide);
  const bool by_rows = problem.column_stride == 1;
  const int64_t to_row = by_rows ? kGramSide : 1, to_column = by_rows ? 1 : kGramSide;
  float* products = scratch + tiles * kGramSide * kGramSide;  // (kGramSide, width): the panel times x
  for (int64_t panel = first; panel < last; ++panel) {
    const int64_t row = panel * kGramSide, rows = least(kGramSide, problem.rows - row);
    std::memset(products, 0, kGramSide * width * sizeof(float));
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t column = t * kGramSide, columns = least(kGramSide, problem.columns - column);
      float* tile = scratch + t * kGramSide * kGramSide;
      copy_tile(problem, row, column, rows, columns, tile);
      add_gram_product(tile, to_row, to_column, columns, problem.x + column * width, products, width);
    }
    for (int64_t r = 0; r < rows; ++r) {
      const Vector scale = broadcast(problem.scales[row + r]);  // its square might not be a float
      for (float* p = products + r * width; p < products + (r + 1) * width; p += kWidth) {
        store(p, scale * (scale * load(p)));
      }
    }
    for (int64_t t = 0; t < tiles; ++t) {
      const float* tile = scratch + t * kGramSide * kGramSide;
      add_gram_product(tile, to_column, to_row, rows, products, out + t * kGramSide * width, width);
    }
  }
}

const GramKernel gram_product = add_gram_panels;

}  // namespace loku::LOKU_ISA
