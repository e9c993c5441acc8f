// A^T A x for a thin x, on whichever simd_*.h came before.
//
// A product with A and one with A^T read it twice, and a library lays it out anew for both, which for 16 to 64 columns
// takes longer than the multiplications. Here A is laid out once, for as many products as are wanted: a panel of 48 rows
// is multiplied by x tile by tile, and a second time, from the cache, before the next panel comes. Laid out as a library
// has it, the pieces of a panel lie on a page each: the processor then waits for their addresses half of the time.
//
// Bytes that cross memory: A once; x and out once a panel, mostly from the L2 or L3 cache.
#pragma once

#include "gram.h"

namespace loku::LOKU_ISA {

constexpr int kGramVectors = 4;
constexpr int kGramSums = kWidth == 16 ? 24 : 12;  // in 32 or 16 registers

// c (kGramSums / kVectors rows, kVectors vectors) += a (rows, steps) b (steps, kVectors vectors), with rows of b and c
// `width` apart; a lies in a tile, its rows kRow apart and its steps kStep. Asks for the lines from `ahead` on, a part of
// a later tile as large as this one, while it works: tiles that come from memory then cost no time.
template <int kVectors, int kRow, int kStep>
void add_gram_tile(const float* a, int64_t steps, const float* b, float* c, int64_t width, const float* ahead) {
  constexpr int kLine = 16;  // floats
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
  for (; steps > 0; --steps, a += kStep, b += width) {
    for (int i = 0; i < pieces_of(kRows, kLine); ++i, ahead += kLine) __builtin_prefetch(ahead, 0, 2);
    Vector row[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) row[v] = load(b + v * kWidth);
    each([&](int r, int v) LOKU_LAMBDA { sum[r][v] = multiply_add(broadcast(a[r * kRow]), row[v], sum[r][v]); });
  }
  each([&](int r, int v) LOKU_LAMBDA {
    float* place = c + r * width + v * kWidth;
    store(place, load(place) + sum[r][v]);
  });
}

// c (kGramSide, width) += a (kGramSide, steps) b (steps, width).
template <int kRow, int kStep, int kVectors = kGramVectors>
void add_gram_product(const float* a, int64_t steps, const float* b, float* c, int64_t width,
                      int64_t first_column = 0) {
  constexpr int kRows = kGramSums / kVectors;
  static_assert(kGramSide % kRows == 0, "tiles hold whole groups of rows");
  for (; first_column + kVectors * kWidth <= width; first_column += kVectors * kWidth) {
    for (int64_t r = 0; r < kGramSide; r += kRows) {
      add_gram_tile<kVectors, kRow, kStep>(a + r * kRow, steps, b + first_column, c + r * width + first_column, width,
                                           a + (2 * kGramSide + r) * kGramSide);
    }
  }
  if constexpr (kVectors > 1) add_gram_product<kRow, kStep, kVectors - 1>(a, steps, b, c, width, first_column);
}

inline void pack_gram_panels(const GramSource& source, int64_t first, int64_t last, float* tiles) {
  const bool by_rows = source.by_rows();
  const int64_t across = pieces_of(source.columns, kGramSide);
  const int64_t stride = by_rows ? source.row_stride : source.column_stride;
  const int64_t scale_stride = by_rows ? source.scale_row_stride : source.scale_column_stride;
  for (int64_t number = first * across; number < last * across; ++number) {
    float* tile = tiles + number * kGramSide * kGramSide;
    const int64_t row = number / across * kGramSide, column = number % across * kGramSide;
    const int64_t rows = least(kGramSide, source.rows - row), columns = least(kGramSide, source.columns - column);
    if (rows < kGramSide || columns < kGramSide) std::memset(tile, 0, kGramSide * kGramSide * sizeof(float));
    const float* from = source.matrix + row * source.row_stride + column * source.column_stride;
    const float* scales = source.scales + row * source.scale_row_stride + column * source.scale_column_stride;
    const int64_t lines = by_rows ? rows : columns, length = by_rows ? columns : rows;
    for (int64_t i = 0; i < lines; ++i, tile += kGramSide, from += stride, scales += scale_stride) {
      if (scale_stride == 0) {
        for (int64_t j = 0; j < length; ++j) tile[j] = from[j] * scales[j];
      } else {
        for (int64_t j = 0; j < length; ++j) tile[j] = from[j] * scales[0];
      }
    }
  }
}

// kToRow and kToColumn: how far rows and columns are apart in a tile.
template <int kToRow, int kToColumn>
void add_gram_panels(const GramProblem& problem, int64_t first, int64_t last, float* out, float* products) {
  const int64_t width = problem.width, across = problem.tiles_of_panel;
  for (int64_t panel = first; panel < last; ++panel) {
    const float* tiles = problem.tiles + panel * across * kGramSide * kGramSide;
    std::memset(products, 0, kGramSide * width * sizeof(float));
    for (int64_t t = 0; t < across; ++t) {
      const int64_t column = t * kGramSide;
      add_gram_product<kToRow, kToColumn>(tiles + column * kGramSide, least(kGramSide, problem.columns - column),
                                          problem.x + column * width, products, width);
    }
    for (int64_t t = 0; t < across; ++t) {
      const int64_t column = t * kGramSide;
      add_gram_product<kToColumn, kToRow>(tiles + column * kGramSide, kGramSide, products, out + column * width, width);
    }
  }
}

inline void add_gram_products(const GramProblem& problem, int64_t first, int64_t last, float* out, float* products) {
  const auto add = problem.by_rows ? add_gram_panels<kGramSide, 1> : add_gram_panels<1, kGramSide>;
  add(problem, first, last, out, products);
}

const GramKernels gram_kernels = {pack_gram_panels, add_gram_products};

}  // namespace loku::LOKU_ISA
