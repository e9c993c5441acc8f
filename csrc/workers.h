// Work shared out among torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "types.h"

namespace loku {

// Does pieces [0, count), `step` at a time. Every thread calls start() once, for what it needs to work, and then what
// that returned, as f(first, last), on the next pieces whenever it is free.
template <class Start>
void share_pieces(int64_t count, int64_t step, const Start& start) {
  const int64_t workers = std::min<int64_t>(torch::stable::get_num_threads(), pieces_of(count, step));
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    const auto f = start();
    for (int64_t worker = begin; worker < end; ++worker) {
      for (int64_t first; (first = next.fetch_add(step)) < count;) f(first, std::min(first + step, count));
    }
  });
}

// Calls f(first, last) until [0, rows) is done. Threads take the next few rows as they become free: ignored rows cost
// nothing, and they come in runs. What is computed for a row does not depend on the thread.
template <class F>
void share_rows(int64_t rows, int64_t columns, const F& f) {
  constexpr int64_t kLeastWork = 32768;  // elements; about 3 microseconds
  // Turns per thread: enough to even out, and few enough that each is a long run of memory, which prefetching needs.
  constexpr int64_t kTurns = 32;
  const int64_t least = kLeastWork / std::max<int64_t>(1, columns);
  const int64_t step = std::max<int64_t>({1, least, rows / (torch::stable::get_num_threads() * kTurns)});
  share_pieces(rows, step, [&] { return [&](int64_t first, int64_t last) { f(first, last); }; });
}

}  // namespace loku
