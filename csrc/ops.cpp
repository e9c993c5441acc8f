// The row kernels as torch operators, on torch's stable ABI: one binary serves every torch from 2.10.
//
// The operators are internal: loku_kernels/backends/cpp.py calls them with arguments that it has checked, and says
// what they compute. Every output is allocated there and passed in.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "dispatch.h"
#include "rows.h"
#include "workers.h"

namespace loku {
namespace {

using torch::stable::Tensor;
using torch::headeronly::ScalarType;

const RowKernels& choose(int64_t instruction_set, const Tensor& logits) {
  const ScalarType type = logits.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half,
                  "logits must be float32, bfloat16 or float16");
  const Element element = type == ScalarType::Float ? kFloat : type == ScalarType::BFloat16 ? kBFloat16 : kHalf;
  return LOKU_KERNELS(instruction_set, row_kernels)[element];
}

Rows rows_of(const Tensor& logits) {
  STD_TORCH_CHECK(logits.dim() == 3 && (logits.stride(2) == 1 || logits.size(2) == 1),
                  "logits must be (B, T, V) with adjacent columns");
  return {logits.data_ptr(), logits.size(1), logits.stride(0), logits.stride(1), logits.size(2)};
}

int64_t count_rows(const Tensor& logits) { return logits.size(0) * logits.size(1); }

PerRow per_row(const Tensor& values, int64_t rows) {
  STD_TORCH_CHECK(values.scalar_type() == ScalarType::Float && values.dim() == 1 && values.size(0) == rows,
                  "a value per row must be (N,) float32");
  return {static_cast<const float*>(values.data_ptr()), values.stride(0)};
}

RowWeight row_weight(const std::optional<Tensor>& values, double factor, int64_t rows) {
  return {values ? per_row(*values, rows) : PerRow{nullptr, 0}, static_cast<float>(factor)};
}

const int64_t* integers(const Tensor& values, int64_t rows) {
  STD_TORCH_CHECK(values.scalar_type() == ScalarType::Long && values.dim() == 1 && values.size(0) == rows &&
                      values.is_contiguous(),
                  "labels and index must be (N,) int64, contiguous");
  return static_cast<const int64_t*>(values.data_ptr());
}

// An output of its own that no cache would hold until it is used.
bool streams(const Tensor& logits, const Tensor& out) {
  constexpr int64_t kLargestCache = 32 << 20;
  return out.data_ptr() != logits.data_ptr() && out.numel() * static_cast<int64_t>(out.element_size()) > kLargestCache;
}

Transform transform_of(double scale, double softcap) { return {static_cast<float>(scale), static_cast<float>(softcap)}; }

LossProblem loss_problem(const Tensor& logits, const Tensor& labels, const std::optional<Tensor>& ihl_weight,
                         double ihl_factor, const std::optional<Tensor>& ce_weight, double ce_factor,
                         const Tensor& table, const Tensor& index, int64_t ignore_index, double scale, double softcap) {
  const int64_t n = count_rows(logits);
  STD_TORCH_CHECK(table.scalar_type() == ScalarType::Float && table.is_contiguous() && table.numel() == 7 * n,
                  "the table must be (7, N) float32, contiguous");
  return {rows_of(logits),
          {integers(labels, n), ignore_index},
          row_weight(ihl_weight, ihl_factor, n),
          row_weight(ce_weight, ce_factor, n),
          transform_of(scale, softcap),
          {static_cast<float*>(table.data_ptr()), const_cast<int64_t*>(integers(index, n)), n}};
}

void row_losses(Tensor logits, Tensor labels, std::optional<Tensor> ihl_weight, double ihl_factor,
                std::optional<Tensor> ce_weight, double ce_factor, Tensor table, Tensor index, int64_t ignore_index,
                double scale, double softcap, int64_t instruction_set) {
  const RowKernels& kernels = choose(instruction_set, logits);
  const LossProblem problem = loss_problem(logits, labels, ihl_weight, ihl_factor, ce_weight, ce_factor, table, index,
                                           ignore_index, scale, softcap);
  share_rows(count_rows(logits), logits.size(2),
             [&](int64_t first, int64_t last) { kernels.losses(problem, first, last); });
}

void row_losses_and_gradient_(Tensor logits, Tensor labels, std::optional<Tensor> ihl_weight, double ihl_factor,
                              std::optional<Tensor> ce_weight, double ce_factor, Tensor table, Tensor index,
                              int64_t ignore_index, double scale, double softcap, int64_t instruction_set) {
  const RowKernels& kernels = choose(instruction_set, logits);
  const LossProblem problem = loss_problem(logits, labels, ihl_weight, ihl_factor, ce_weight, ce_factor, table, index,
                                           ignore_index, scale, softcap);
  share_rows(count_rows(logits), logits.size(2),
             [&](int64_t first, int64_t last) { kernels.losses_and_gradient(problem, first, last); });
}

void row_gradient(Tensor logits, Tensor labels, Tensor index, Tensor coefficients, Tensor upstream, Tensor out,
                  int64_t ignore_index, double scale, double softcap, int64_t instruction_set) {
  const RowKernels& kernels = choose(instruction_set, logits);
  const int64_t n = count_rows(logits);
  STD_TORCH_CHECK(out.scalar_type() == logits.scalar_type() && count_rows(out) == n && out.size(2) == logits.size(2),
                  "out must have the logits' shape and dtype");
  STD_TORCH_CHECK(coefficients.scalar_type() == ScalarType::Float && coefficients.dim() == 2 &&
                      coefficients.size(0) == 4 && coefficients.size(1) == n,
                  "coefficients must be (4, N) float32");
  const auto coefficient = [&](int64_t field) -> PerRow {
    return {static_cast<const float*>(coefficients.data_ptr()) + field * coefficients.stride(0),
            coefficients.stride(1)};
  };
  const GradientProblem problem{rows_of(logits),      rows_of(out),
                                {integers(labels, n), ignore_index},
                                integers(index, n),   coefficient(0),
                                coefficient(1),       coefficient(2),
                                coefficient(3),       per_row(upstream, n),
                                transform_of(scale, softcap),
                                streams(logits, out)};
  share_rows(n, logits.size(2), [&](int64_t first, int64_t last) { kernels.gradient(problem, first, last); });
}

int64_t first_invalid_label(Tensor labels, int64_t vocabulary, int64_t ignore_index) {
  const int64_t rows = labels.numel();
  const int64_t* label = integers(labels, rows);
  for (int64_t n = 0; n < rows; ++n) {
    if (label[n] != ignore_index && (label[n] < 0 || label[n] >= vocabulary)) return n;
  }
  return -1;
}

// value = factor * the sum of losses; factor: 1 or, for a mean, the inverse of how many labels count.
void reduce_losses(Tensor losses, Tensor labels, Tensor value, Tensor factor, int64_t ignore_index, bool mean) {
  const int64_t rows = labels.numel();
  const int64_t* label = integers(labels, rows);
  const PerRow loss = per_row(losses, rows);
  double sum = 0.0;
  int64_t counted = 0;
  for (int64_t n = 0; n < rows; ++n) {
    sum += loss[n];
    counted += label[n] != ignore_index;
  }
  const double share = mean ? 1.0 / static_cast<double>(std::max<int64_t>(1, counted)) : 1.0;
  STD_TORCH_CHECK(value.scalar_type() == ScalarType::Float && value.numel() == 1, "value must be one float32");
  STD_TORCH_CHECK(factor.scalar_type() == ScalarType::Float && factor.numel() == 1, "factor must be one float32");
  *static_cast<float*>(value.data_ptr()) = static_cast<float>(sum * share);
  *static_cast<float*>(factor.data_ptr()) = static_cast<float>(share);
}

bool supports(int64_t instruction_set) { return is_supported(static_cast<InstructionSet>(instruction_set)); }

}  // namespace
}  // namespace loku

STABLE_TORCH_LIBRARY(loku_kernels_cpp, library) {
  library.def("supports(int instruction_set) -> bool");
  library.def("first_invalid_label(Tensor labels, int vocabulary, int ignore_index) -> int");
  library.def(
      "row_losses(Tensor logits, Tensor labels, Tensor? ihl_weight, float ihl_factor, Tensor? ce_weight, float "
      "ce_factor, Tensor(a!) table, Tensor(b!) index, int ignore_index, float scale, float softcap, int "
      "instruction_set) -> ()");
  library.def(
      "row_losses_and_gradient_(Tensor(c!) logits, Tensor labels, Tensor? ihl_weight, float ihl_factor, Tensor? "
      "ce_weight, float ce_factor, Tensor(a!) table, Tensor(b!) index, int ignore_index, float scale, float softcap, "
      "int instruction_set) -> ()");
  library.def(
      "row_gradient(Tensor logits, Tensor labels, Tensor index, Tensor coefficients, Tensor upstream, Tensor(a!) out, "
      "int ignore_index, float scale, float softcap, int instruction_set) -> ()");
  library.def(
      "reduce_losses(Tensor losses, Tensor labels, Tensor(a!) value, Tensor(b!) factor, int ignore_index, bool mean) -> "
      "()");
}

STABLE_TORCH_LIBRARY_IMPL(loku_kernels_cpp, CompositeExplicitAutograd, library) {
  library.impl("supports", TORCH_BOX(&loku::supports));
}

STABLE_TORCH_LIBRARY_IMPL(loku_kernels_cpp, CPU, library) {
  library.impl("first_invalid_label", TORCH_BOX(&loku::first_invalid_label));
  library.impl("row_losses", TORCH_BOX(&loku::row_losses));
  library.impl("row_losses_and_gradient_", TORCH_BOX(&loku::row_losses_and_gradient_));
  library.impl("row_gradient", TORCH_BOX(&loku::row_gradient));
  library.impl("reduce_losses", TORCH_BOX(&loku::reduce_losses));
}
