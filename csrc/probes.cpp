// The probes as torch operators.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "dispatch.h"
#include "probes.h"
#include "workers.h"

namespace loku {
namespace {

using torch::stable::Tensor;

int64_t read_probe(Tensor data, int64_t instruction_set) {
  STD_TORCH_CHECK(data.is_contiguous(), "data must be contiguous");
  constexpr int64_t kPiece = 1 << 18;
  const Probes& probes = LOKU_KERNELS(instruction_set, probes);
  const char* bytes = static_cast<const char*>(data.data_ptr());
  const int64_t count = data.numel() * static_cast<int64_t>(data.element_size());
  std::atomic<uint32_t> seen{0};
  share_rows((count + kPiece - 1) / kPiece, kPiece, [&](int64_t first, int64_t last) {
    seen |= probes.read(bytes + first * kPiece, std::min(last * kPiece, count) - first * kPiece);
  });
  return seen;
}

double exponential_probe(int64_t count, int64_t instruction_set) {
  constexpr int64_t kPiece = 1 << 15;  // floats; 128 KiB, in the L2 cache of any processor
  const Probes& probes = LOKU_KERNELS(instruction_set, probes);
  const std::vector<float> values(kPiece, -1.0f);
  std::atomic<float> last_sum{0.0f};
  share_rows((count + kPiece - 1) / kPiece, kPiece, [&](int64_t first, int64_t last) {
    for (; first < last; ++first) last_sum = probes.exponentials(values.data(), kPiece);
  });
  return last_sum;
}

}  // namespace
}  // namespace loku

STABLE_TORCH_LIBRARY_FRAGMENT(loku_kernels_cpp, library) {
  library.def("read_probe(Tensor data, int instruction_set) -> int");
  library.def("exponential_probe(int count, int instruction_set) -> float");
}

STABLE_TORCH_LIBRARY_IMPL(loku_kernels_cpp, CPU, library) {
  library.impl("read_probe", TORCH_BOX(&loku::read_probe));
}

STABLE_TORCH_LIBRARY_IMPL(loku_kernels_cpp, CompositeExplicitAutograd, library) {
  library.impl("exponential_probe", TORCH_BOX(&loku::exponential_probe));
}
