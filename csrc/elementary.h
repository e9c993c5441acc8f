// exp and tanh of a vector, on whichever simd_*.h came before.
#pragma once

namespace loku::LOKU_ISA {

// e^-y for y >= -88, within 2 ulp, NaN for NaN. Where a float would be subnormal (y > 87.3) what comes is smaller than
// 1.2e-38, and exactly 0 from y = 88.1 on.
//
// -y = n ln 2 / 2^b + r with an integer n and |r| <= ln 2 / 2^(b+1). Adding 1.5 * 2^23 rounds to that integer and
// leaves it in the low bits. The polynomial's coefficients minimise the relative error of e^r; a longer table
// (kTableBits = b) needs fewer of them. The largest y allowed has n = -127 * 2^b, for which power_of_two gives 0.
LOKU_INLINE Vector exponential_of_minus(Vector y) {
  constexpr float kSteps = 1 << kTableBits;
  const Vector rounder = broadcast(12582912.0f);
  y = smaller(broadcast(88.0296919f), y);
  const Vector shifted = multiply_add(y, broadcast(-1.44269504f * kSteps), rounder);
  const Vector n = shifted - rounder;
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
  return p * power_of_two(shifted);
}

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
