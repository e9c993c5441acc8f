// exp and tanh of a vector, on whichever simd_*.h came before.
#pragma once

#include <cmath>

namespace loku::LOKU_ISA {

// e^-y for y >= -88, within 2 ulp, NaN for NaN. Where a float would be subnormal (y > 87.3) what comes is smaller than
// 1.2e-38, and exactly 0 from y = 88.1 on, under FlushSubnormals.
//
// -y = n ln 2 + r with a multiple n of 2^-kTableBits and |r| <= ln 2 / 2^(kTableBits + 1). The polynomial's
// coefficients minimise the relative error of e^r; a longer table needs fewer of them. The largest y allowed has
// n = -127, for which power_of_two gives 0.
LOKU_INLINE Vector exponential_of_minus(Vector y) {
  y = smaller(broadcast(88.0296919f), y);
  const Vector shifted = multiply_add(y, broadcast(-1.44269504f), broadcast(rounder(kTableBits)));
  const Vector n = shifted - broadcast(rounder(kTableBits));
  const Vector minus_r = add_multiple_of_log2(y, n);
  Vector p;
  if constexpr (kTableBits == 5) {
    p = multiply_add(minus_r, broadcast(0.500000179f), broadcast(-1.00001466f));
  } else if constexpr (kTableBits == 3) {
    p = multiply_add(minus_r, broadcast(-0.166642979f), broadcast(0.500064790f));
    p = multiply_add(minus_r, p, broadcast(-1.0f));
  } else {
    p = multiply_add(minus_r, broadcast(0.00138436537f), broadcast(-0.00837415550f));
    p = multiply_add(minus_r, p, broadcast(0.0416680016f));
    p = multiply_add(minus_r, p, broadcast(-0.166664317f));
    p = multiply_add(minus_r, p, broadcast(0.49999994f));
    p = multiply_add(minus_r, p, broadcast(-1.0f));
  }
  p = multiply_add(minus_r, p, broadcast(1.0f));
  return p * power_of_two(shifted, n);
}

// 2^t for t <= 127, within 2 ulp, 0 for -inf, NaN for NaN; smaller than 1.2e-38 where a float would be subnormal. The
// rest that split_power leaves is on one side of 0 where kTableBits is 5.
LOKU_INLINE Vector two_to_the(Vector t) {
  Vector rest;
  const Vector power = split_power(t, rest);
  Vector p;
  if constexpr (kTableBits == 5) {
    p = multiply_add(rest, broadcast(0.242652506f), broadcast(0.693123758f));
  } else if constexpr (kTableBits == 3) {
    p = multiply_add(rest, broadcast(0.0554962195f), broadcast(0.240257621f));
    p = multiply_add(rest, p, broadcast(0.693147242f));
  } else {
    p = multiply_add(rest, broadcast(0.000153533503f), broadcast(0.00133988727f));
    p = multiply_add(rest, p, broadcast(0.00961843692f));
    p = multiply_add(rest, p, broadcast(0.0555033237f));
    p = multiply_add(rest, p, broadcast(0.240226477f));
    p = multiply_add(rest, p, broadcast(0.693147182f));
  }
  p = multiply_add(rest, p, broadcast(1.0f));
  return p * power;
}

// e^(z - value) for sums over a row, as 2^(z log2(e) - exponent): an operation less than from the difference, and no
// worse near the top. What rounding `exponent` shifted all of them by, `correction` undoes in the sum.
struct Reference {
  static constexpr float kLog2E = 1.44269504f;

  float value;
  bool is_usable;  // where rounding the exponent shifts by less than 1
  float exponent;
  double correction;

  explicit Reference(float top)
      : value(top),
        is_usable(std::fabs(top) < 1e7f),
        exponent(top * kLog2E),
        correction(kFusesMultiplyAdd && is_usable ? std::exp2(exponent - static_cast<double>(top) * kLog2E) : 1.0) {}

  // The exponent of 2, negative only where z is not larger than `value`, and wherever it is noticeably smaller.
  LOKU_INLINE Vector distance(Vector z) const {
    if constexpr (kFusesMultiplyAdd) {
      return multiply_add(z, broadcast(kLog2E), broadcast(-exponent));
    } else {
      return (z - broadcast(value)) * broadcast(kLog2E);
    }
  }
};

// tanh within 2 ulp: an odd polynomial near 0, 1 - 2 e^-2|x| / (1 + e^-2|x|) elsewhere, where less than half of the
// error of the exponential is left.
LOKU_INLINE Vector hyperbolic_tangent(Vector x) {
  const Vector magnitude = absolute(x);
  const Vector square = x * x;
  Vector p = broadcast(0.00214294484f);
  p = multiply_add(square, p, broadcast(-0.00817737658f));
  p = multiply_add(square, p, broadcast(0.0217006970f));
  p = multiply_add(square, p, broadcast(-0.0539467633f));
  p = multiply_add(square, p, broadcast(0.133332059f));
  p = multiply_add(square, p, broadcast(-0.333333313f));
  const Vector near_zero = multiply_add(square * magnitude, p, magnitude);
  const Vector e = exponential_of_minus(magnitude + magnitude);
  const Vector far = broadcast(1.0f) - (e + e) / (broadcast(1.0f) + e);
  return copy_sign(select(less(magnitude, broadcast(0.625f)), near_zero, far), x);
}

// The derivative of tanh: 1 - tanh^2, which would be all rounding error where tanh is close to 1, as
// 4 e^-2|x| / (1 + e^-2|x|)^2.
LOKU_INLINE Vector derivative_of_tangent(Vector x) {
  const Vector magnitude = absolute(x);
  const Vector e = exponential_of_minus(magnitude + magnitude);
  const Vector inverse = broadcast(2.0f) / (broadcast(1.0f) + e);
  return e * inverse * inverse;
}

}  // namespace loku::LOKU_ISA
