// Four floats in the compiler's own vectors: SSE2 on any x86-64, NEON on aarch64. The interface is that of
// simd_avx512.h.
#pragma once

#include "types.h"

namespace loku::LOKU_ISA {

using Vector = float __attribute__((vector_size(16)));
using Mask = int32_t __attribute__((vector_size(16)));
using Bits = uint32_t __attribute__((vector_size(16)));
using HalfBits = uint16_t __attribute__((vector_size(8)));
constexpr int kWidth = 4;

LOKU_INLINE Vector broadcast(float x) { return Vector{x, x, x, x}; }
LOKU_INLINE Vector select(Mask mask, Vector yes, Vector no) { return (Vector)(((Mask)yes & mask) | ((Mask)no & ~mask)); }
LOKU_INLINE Mask less(Vector x, Vector y) { return x < y; }
LOKU_INLINE Mask equal(Vector x, Vector y) { return x == y; }
LOKU_INLINE Vector larger(Vector x, Vector y) { return y < x ? x : y; }
LOKU_INLINE Vector smaller(Vector x, Vector y) { return x < y ? x : y; }
LOKU_INLINE Vector multiply_add(Vector a, Vector b, Vector c) { return a * b + c; }
LOKU_INLINE Vector bits_of_any(Vector x, Vector y, Vector z) { return (Vector)((Bits)x | (Bits)y | (Bits)z); }
LOKU_INLINE bool all_negative(Vector x) {
  const Mask signs = (Mask)x >> 31;
  return (signs[0] & signs[1] & signs[2] & signs[3]) != 0;
}
LOKU_INLINE Vector absolute(Vector x) { return (Vector)((Bits)x & 0x7fffffffu); }
LOKU_INLINE Vector copy_sign(Vector magnitude, Vector sign) {
  return (Vector)((Bits)magnitude | ((Bits)sign & 0x80000000u));
}

LOKU_INLINE Vector widen(Bits bits, BFloat16) { return (Vector)(bits << 16); }
// Exponent and mantissa move into place and a multiplication by 2^112 mends the exponent's bias, subnormals included.
LOKU_INLINE Vector widen(Bits bits, Half) {
  const Bits magnitude = (bits & 0x7fffu) << 13;
  const Vector finite = (Vector)magnitude * broadcast(0x1p112f);
  const Mask is_special = (Mask)(magnitude >= 0x0f800000u);
  return copy_sign(select(is_special, (Vector)(magnitude | 0x7f800000u), finite), (Vector)(bits << 16));
}
LOKU_INLINE Bits narrow(Vector x, BFloat16) {
  const Bits bits = (Bits)x;
  const Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Bits is_nan = (Bits)(x != x);
  return (rounded & ~is_nan) | (0x7fc0u & is_nan);
}
// Adding and taking off a power of two that depends on the exponent rounds the mantissa to what a half can hold.
LOKU_INLINE Bits narrow(Vector x, Half) {
  const Vector magnitude = absolute(x);
  const Bits exponent = (Bits)magnitude & 0x7f800000u;
  const Bits least = Bits{} + 0x38800000u;  // 2^-14, below which a half is subnormal
  const Bits clamped = (exponent & (Bits)(exponent >= least)) | (least & (Bits)(exponent < least));
  const Vector unit = (Vector)(clamped + (13u << 23));
  const Vector rounded = (magnitude + unit) - unit;
  const Bits finite = (Bits)(rounded * broadcast(0x1p-112f)) >> 13;
  const Bits overflow = (Bits)(magnitude >= broadcast(65520.0f));  // rounds to 65536 or more
  const Bits is_nan = (Bits)(x != x);
  const Bits bits = (finite & ~overflow) | (0x7c00u & overflow);
  return ((bits & ~is_nan) | (0x7e00u & is_nan)) | (((Bits)x >> 16) & 0x8000u);
}

LOKU_INLINE Vector load(const float* p) {
  Vector x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
template <class T>
LOKU_INLINE Vector load(const T* p) {
  HalfBits bits;
  std::memcpy(&bits, p, sizeof bits);
  return widen(__builtin_convertvector(bits, Bits), T());
}
LOKU_INLINE void load_in_any_order(const BFloat16* p, Vector& a, Vector& b) {
  Bits bits;
  std::memcpy(&bits, p, sizeof bits);
  a = (Vector)(bits << 16);
  b = (Vector)(bits & 0xffff0000u);
}
LOKU_INLINE void store(float* p, Vector x) { std::memcpy(p, &x, sizeof x); }
template <class T>
LOKU_INLINE void store(T* p, Vector x) {
  const HalfBits bits = __builtin_convertvector(narrow(x, T()), HalfBits);
  std::memcpy(p, &bits, sizeof bits);
}
template <class T>
LOKU_INLINE void stream(T* p, Vector x) {
  store(p, x);
}
LOKU_INLINE void finish_streaming() {}
LOKU_INLINE int first_equal(Vector x, Vector y) {
  int lane = 0;
  while (lane < kWidth && x[lane] != y[lane]) ++lane;
  return lane;
}

constexpr bool kFusesMultiplyAdd = false;

constexpr int kTableBits = 0;
LOKU_INLINE Vector power_of_two(Vector shifted, Vector) { return (Vector)(((Bits)shifted << 23) + 0x3f800000u); }

// As in simd_avx512.h, with ln 2 in two parts, the first of which multiplies n exactly, since
// there may be no fused multiply-add.
LOKU_INLINE Vector add_multiple_of_log2(Vector y, Vector n) {
  return (y + n * broadcast(0.693359375f)) + n * broadcast(-2.12194440e-4f);
}

}  // namespace loku::LOKU_ISA

#include "simd_tails.h"
