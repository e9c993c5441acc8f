// The diagonal Fisher of a linear layer, on whichever simd_*.h came before.
//
// A matrix product per sequence whose result is squared while it is in registers: a tile of F, 8 rows by 3 vectors with
// AVX-512, sums grad_outputs^T inputs over the tokens of a sequence, is squared, weighted and added to F. A block of F
// takes all tokens before the next block begins, chunk by chunk. The chunk's operands are packed first, in strips as
// wide as a tile: a strip of inputs then stays in the L1 cache while strips of grad_outputs pass by, of as many rows as
// the L2 cache holds beside the inputs. A sequence longer than a chunk leaves its partial sums in scratch memory.
//
// What is added up for an element of F, and in which order, depends neither on the block nor on the thread.
//
// Bytes that cross memory, mostly from L3: F twice a chunk, inputs out / 1024 times, grad_outputs in / 768 times.
#pragma once

#include "fisher.h"
#include "sweep.h"

namespace loku::LOKU_ISA {

constexpr int kTileRows = kWidth == 16 ? 8 : 6;  // 24 or 12 sums, in 32 or 16 registers
constexpr int kTileVectors = kWidth == 16 ? 3 : 2;
constexpr int kTileColumns = kTileVectors * kWidth;
constexpr int64_t kPanelRows = kFisherRows / kTileRows * kTileRows;

// A step of the sum multiplies words of 32 bits: the floats of one token.
template <class T>
struct Step {
  static constexpr int kTokens = 1;
  LOKU_INLINE static Vector multiply_add(Vector a, Vector b, Vector sum) { return LOKU_ISA::multiply_add(a, b, sum); }
  LOKU_INLINE static const float* words(const T* token, const T*, int64_t columns, float* buffer) {
    for (int64_t i = 0; i < columns; i += kWidth) {
      if (columns - i < kWidth) {
        store_first(buffer + i, columns - i, load_first(token + i, columns - i, 0.0f));
      } else {
        store(buffer + i, load(token + i));
      }
    }
    return buffer;
  }
};

template <>
LOKU_INLINE const float* Step<float>::words(const float* token, const float*, int64_t, float*) {
  return token;
}

#if defined(LOKU_BF16_INSTRUCTIONS)
// Here a word has two tokens. Their products are exact in float32; subnormal numbers count as zero.
template <>
struct Step<BFloat16> {
  static constexpr int kTokens = 2;
  LOKU_INLINE static Vector multiply_add(Vector a, Vector b, Vector sum) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
  LOKU_INLINE static const float* words(const BFloat16* first, const BFloat16* second, int64_t columns, float* buffer) {
    for (int64_t i = 0; i < columns; ++i) {
      const uint32_t word = first[i].bits | (second ? static_cast<uint32_t>(second[i].bits) << 16 : 0);
      std::memcpy(buffer + i, &word, sizeof word);
    }
    return buffer;
  }
};
#endif

template <class T>
constexpr int64_t count_steps(int64_t tokens) {
  return (tokens + Step<T>::kTokens - 1) / Step<T>::kTokens;
}

// Lays a piece's columns out in strips: panel[strip][step][kStrip], zeros past the last column.
template <int kStrip, class T>
void pack(const T* rows, int64_t stride, int64_t tokens, int64_t columns, float* panel, int64_t strip_stride,
          float* buffer) {
  for (int64_t t = 0; t < tokens; t += Step<T>::kTokens, panel += kStrip) {
    const T* token = rows + t * stride;
    const float* words = Step<T>::words(token, t + 1 < tokens ? token + stride : nullptr, columns, buffer);
    int64_t strip = 0;
    for (; (strip + 1) * kStrip <= columns; ++strip) {
      std::memcpy(panel + strip * strip_stride, words + strip * kStrip, kStrip * sizeof(float));
    }
    if (const int64_t rest = columns - strip * kStrip; rest > 0) {
      std::memset(panel + strip * strip_stride, 0, kStrip * sizeof(float));
      std::memcpy(panel + strip * strip_stride, words + strip * kStrip, rest * sizeof(float));
    }
  }
}

// The part of F that one tile of sums belongs to; all of it is there.
struct Tile {
  float* fisher;
  int64_t stride;
  float* partial_sums;  // kTileRows x kTileColumns
};

// Adds a chunk's pieces to a tile, kVectors vectors wide.
template <class T, int kVectors>
void add_to_tile(const Tile& tile, const FisherPiece* pieces, int count, const float* grad_outputs,
                 const float* inputs) {
  const auto each = [](auto visit) LOKU_LAMBDA {
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 3
      for (int v = 0; v < kVectors; ++v) visit(r, v);
    }
  };
  each([&](int r, int v) LOKU_LAMBDA { __builtin_prefetch(tile.fisher + r * tile.stride + v * kWidth, 1); });
  for (const FisherPiece* piece = pieces; piece < pieces + count; ++piece) {
    Vector sum[kTileRows][kVectors];
    each([&](int r, int v) LOKU_LAMBDA { sum[r][v] = broadcast(0.0f); });
    for (int64_t step = count_steps<T>(piece->tokens); step > 0; --step) {
      Vector input[kVectors];
#pragma GCC unroll 3
      for (int v = 0; v < kVectors; ++v) input[v] = load(inputs + v * kWidth);
      each([&](int r, int v) LOKU_LAMBDA {
        sum[r][v] = Step<T>::multiply_add(broadcast(grad_outputs[r]), input[v], sum[r][v]);
      });
      grad_outputs += kTileRows;
      inputs += kTileColumns;
    }
    const auto partial = [&](int r, int v) LOKU_LAMBDA { return tile.partial_sums + r * kTileColumns + v * kWidth; };
    if (!piece->opens) each([&](int r, int v) LOKU_LAMBDA { sum[r][v] = sum[r][v] + load(partial(r, v)); });
    if (piece->closes) {
      const Vector weight = broadcast(piece->weight);
      each([&](int r, int v) LOKU_LAMBDA {
        float* f = tile.fisher + r * tile.stride + v * kWidth;
        store(f, multiply_add(weight, sum[r][v] * sum[r][v], load(f)));
      });
    } else {
      each([&](int r, int v) LOKU_LAMBDA { store(partial(r, v), sum[r][v]); });
    }
  }
}

template <class T, int kVectors = kTileVectors>
LOKU_INLINE void add_to_narrow_tile(int vectors, const Tile& tile, const FisherPiece* pieces, int count,
                                    const float* grad_outputs, const float* inputs) {
  if constexpr (kVectors > 1) {
    if (vectors < kVectors) {
      return add_to_narrow_tile<T, kVectors - 1>(vectors, tile, pieces, count, grad_outputs, inputs);
    }
  }
  add_to_tile<T, kVectors>(tile, pieces, count, grad_outputs, inputs);
}

inline void copy_rows(const float* from, int64_t from_stride, float* to, int64_t to_stride, int64_t rows,
                      int64_t columns) {
  for (int64_t r = 0; r < rows; ++r) std::memcpy(to + r * to_stride, from + r * from_stride, columns * sizeof(float));
}

// A tile that F ends in: works on a copy, so that no kernel needs a mask.
template <class T>
void add_to_edge(const Tile& tile, int64_t rows, int64_t columns, const FisherPiece* pieces, int count,
                 const float* grad_outputs, const float* inputs) {
  alignas(64) float copy[kTileRows * kTileColumns] = {};
  copy_rows(tile.fisher, tile.stride, copy, kTileColumns, rows, columns);
  add_to_narrow_tile<T>(static_cast<int>((columns + kWidth - 1) / kWidth), {copy, kTileColumns, tile.partial_sums},
                        pieces, count, grad_outputs, inputs);
  copy_rows(copy, kTileColumns, tile.fisher, tile.stride, rows, columns);
}

// Where the next chunk begins: a sequence, and how many of its tokens are done.
struct Cursor {
  int64_t sequence = 0, done = 0;
};

// The next chunk: whole sequences while they fit, or one of the equal parts of a sequence longer than a chunk.
template <class T>
int next_chunk(const FisherProblem& problem, Cursor& at, FisherPiece* pieces) {
  constexpr int64_t kTokens = Step<T>::kTokens, kMost = kFisherSteps * kTokens;
  int count = 0;
  for (int64_t room = kFisherSteps; at.sequence < problem.sequences; ++at.sequence, at.done = 0) {
    const int64_t begin = problem.first_token(at.sequence), length = problem.length(at.sequence);
    if (length == 0) continue;
    if (count > 0 && count_steps<T>(length) > room) break;
    const int64_t parts = (length + kMost - 1) / kMost;
    const int64_t part = count_steps<T>((length + parts - 1) / parts) * kTokens;
    const int64_t tokens = least(length - at.done, part);
    const bool opens = at.done == 0, closes = at.done + tokens == length;
    pieces[count++] = {begin + at.done, tokens, problem.weights[at.sequence], opens, closes};
    if (!closes) {
      at.done += tokens;
      break;
    }
    room -= count_steps<T>(tokens);
  }
  return count;
}

template <int kStrip, class T>
void pack_chunk(const void* rows, int64_t stride, int64_t first_column, int64_t columns, const FisherPiece* pieces,
                int count, float* panel, int64_t strip_stride, float* buffer) {
  for (const FisherPiece* piece = pieces; piece < pieces + count; ++piece) {
    const T* data = static_cast<const T*>(rows) + piece->first_token * stride + first_column;
    pack<kStrip>(data, stride, piece->tokens, columns, panel, strip_stride, buffer);
    panel += count_steps<T>(piece->tokens) * kStrip;
  }
}

// Adds a chunk to the tiles of a panel, `rows` rows of a block from `first_row` on, whose strips are `steps` long.
template <class T>
void add_to_panel(const FisherProblem& problem, int64_t first_row, int64_t rows, const FisherBlock& block,
                  const FisherScratch& scratch, int count, int64_t steps, float* partial_sums) {
  for (int64_t column = 0; column < block.columns; column += kTileColumns) {
    const float* inputs = scratch.inputs + column * steps;
    const int64_t columns = least(kTileColumns, block.columns - column);
    for (int64_t row = 0; row < rows; row += kTileRows, partial_sums += kTileRows * kTileColumns) {
      const float* grad_outputs = scratch.grad_outputs + row * steps;
      float* fisher = problem.fisher + (first_row + row) * problem.fisher_stride + block.first_column + column;
      const Tile tile{fisher, problem.fisher_stride, partial_sums};
      const int64_t tile_rows = least(kTileRows, rows - row);
      if (tile_rows == kTileRows && columns == kTileColumns) {
        add_to_tile<T, kTileVectors>(tile, scratch.pieces, count, grad_outputs, inputs);
      } else {
        add_to_edge<T>(tile, tile_rows, columns, scratch.pieces, count, grad_outputs, inputs);
      }
    }
  }
}

template <class T>
void fisher_accumulate(const FisherProblem& problem, const FisherBlock& block, FisherScratch& scratch) {
  Cursor at;
  while (const int count = next_chunk<T>(problem, at, scratch.pieces)) {
    int64_t steps = kFisherPadding;  // strips a power of two apart would share cache lines' places
    for (int i = 0; i < count; ++i) steps += count_steps<T>(scratch.pieces[i].tokens);
    pack_chunk<kTileColumns, T>(problem.inputs, problem.inputs_stride, block.first_column, block.columns,
                                scratch.pieces, count, scratch.inputs, steps * kTileColumns, scratch.row);
    for (int64_t done = 0; done < block.rows; done += kPanelRows) {
      const int64_t first_row = block.first_row + done, rows = least(kPanelRows, block.rows - done);
      pack_chunk<kTileRows, T>(problem.grad_outputs, problem.grad_outputs_stride, first_row, rows, scratch.pieces,
                               count, scratch.grad_outputs, steps * kTileRows, scratch.row);
      add_to_panel<T>(problem, first_row, rows, block, scratch, count, steps, scratch.partial_sums);
    }
  }
}

template <class T>
void fisher_accumulate_grad(float* fisher, const void* grad, float scale, int64_t count) {
  const Vector factor = broadcast(scale);
  const T* g = static_cast<const T*>(grad);
  sweep(g, count, [&](int64_t i, Vector x, int lanes, int) LOKU_LAMBDA {
    if (i % (kUnroll * kWidth) == 0) prefetch(fisher + i, kUnroll * kWidth * sizeof(float));
    store_lanes(fisher + i, lanes, multiply_add(factor, x * x, load_lanes(fisher + i, lanes)));
  });
}

template <class T>
constexpr FisherKernels fisher_kernels_of() {
  return {fisher_accumulate<T>, fisher_accumulate_grad<T>};
}

const FisherKernelTable fisher_kernels = {
    kTileRows,
    kTileColumns,
    {fisher_kernels_of<float>(), fisher_kernels_of<BFloat16>(), fisher_kernels_of<Half>()},
};

}  // namespace loku::LOKU_ISA
