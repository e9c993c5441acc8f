// loku_kernels/backends/formulas.py for one row, in double: what a row's statistics say about its loss and gradient.
#pragma once

#include <cmath>

namespace loku::LOKU_ISA {

// The logits of target and runner-up, and the sum of exp(z_v - runner_up) over all others.
struct Statistics {
  double target, runner_up, rest;
};

struct Partials {
  double loss, target, runner_up, rest;
};

inline Partials combine(const Statistics& row, double ihl_weight, double ce_weight) {
  // A logit of +inf has overflowed: NaN, as torch's losses give, rather than what is left of the row.
  const bool is_infinite = row.target == INFINITY || row.runner_up == INFINITY;
  const double distance = is_infinite ? NAN : row.target - row.runner_up;
  const double smaller = std::exp(-std::fabs(distance));
  const double e_t = distance > 0 ? 1.0 : smaller, e_m = distance > 0 ? smaller : 1.0;
  const double r = row.rest * e_m, total = e_t + e_m + r;
  const double p_t = e_t / total, p_m = e_m / total;
  Partials sum{0.0, 0.0, 0.0, 0.0};
  if (ihl_weight != 0) {
    const double gap = std::copysign(std::expm1(-std::fabs(distance)), -distance) / total;  // p_m - p_t
    sum.loss += ihl_weight * (r + 2 * e_t) / total;
    sum.target += ihl_weight * p_t * (r + 2 * e_m) / total;
    sum.runner_up -= ihl_weight * p_m * (r + 2 * e_t) / total;
    sum.rest += ihl_weight * p_m * gap;
  }
  if (ce_weight != 0) {
    const double loss = distance > 0 ? std::log1p(e_m + r) : std::log1p(e_t + r) - distance;
    sum.loss += ce_weight * loss;
    sum.target -= ce_weight * (e_m + r) / total;
    sum.runner_up += ce_weight * p_m;
    sum.rest += ce_weight * p_m;
  }
  return sum;
}

}  // namespace loku::LOKU_ISA
