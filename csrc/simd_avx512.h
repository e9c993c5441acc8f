// Sixteen floats in an AVX-512 register. Included once per object file, after LOKU_ISA names its namespace.
#pragma once

#include <immintrin.h>

#include "types.h"

namespace loku::LOKU_ISA {

using Vector = __m512;
using Mask = __mmask16;
constexpr int kWidth = 16;

LOKU_INLINE Vector broadcast(float x) { return _mm512_set1_ps(x); }
LOKU_INLINE Vector load(const float* p) { return _mm512_loadu_ps(p); }
LOKU_INLINE Vector widen(__m256i bits, BFloat16) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
LOKU_INLINE Vector widen(__m256i bits, Half) { return _mm512_cvtph_ps(bits); }
template <class T>
LOKU_INLINE Vector load(const T* p) {
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), T());
}
// The 2 kWidth elements at p, without the shuffle that their order would cost.
LOKU_INLINE void load_in_any_order(const BFloat16* p, Vector& even, Vector& odd) {
  const __m512i bits = _mm512_loadu_si512(p);
  even = _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
  odd = _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}

LOKU_INLINE __m256i narrow(Vector x, Half) { return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT); }
#if defined(LOKU_BF16_INSTRUCTIONS)
LOKU_INLINE __m256i narrow(Vector x, BFloat16) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)); }
#else
LOKU_INLINE __m256i narrow(Vector x, BFloat16) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  const Mask is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, is_nan, _mm512_set1_epi32(0x7fc0)));
}
#endif
LOKU_INLINE void store(float* p, Vector x) { _mm512_storeu_ps(p, x); }
template <class T>
LOKU_INLINE void store(T* p, Vector x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(x, T()));
}

// Past the caches, to memory aligned to kWidth elements. finish_streaming() orders these stores before later ones.
LOKU_INLINE void stream(float* p, Vector x) { _mm512_stream_ps(p, x); }
template <class T>
LOKU_INLINE void stream(T* p, Vector x) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow(x, T()));
}
LOKU_INLINE void finish_streaming() { _mm_sfence(); }

// The first `count` < kWidth elements; lanes beyond them hold `fill`, and memory beyond them is not touched.
LOKU_INLINE Mask first_lanes(int64_t count) { return static_cast<Mask>((1u << count) - 1); }
LOKU_INLINE Vector load_first(const float* p, int64_t count, float fill) {
  return _mm512_mask_loadu_ps(broadcast(fill), first_lanes(count), p);
}
template <class T>
LOKU_INLINE Vector load_first(const T* p, int64_t count, float fill) {
  const __m256i bits = _mm256_maskz_loadu_epi16(first_lanes(count), p);
  return _mm512_mask_mov_ps(broadcast(fill), first_lanes(count), widen(bits, T()));
}
LOKU_INLINE void store_first(float* p, int64_t count, Vector x) { _mm512_mask_storeu_ps(p, first_lanes(count), x); }
template <class T>
LOKU_INLINE void store_first(T* p, int64_t count, Vector x) {
  _mm256_mask_storeu_epi16(p, first_lanes(count), narrow(x, T()));
}

LOKU_INLINE Vector multiply_add(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
// The larger, or smaller, of x and y; y where either is NaN.
LOKU_INLINE Vector larger(Vector x, Vector y) { return _mm512_max_ps(x, y); }
LOKU_INLINE Vector smaller(Vector x, Vector y) { return _mm512_min_ps(x, y); }
LOKU_INLINE Vector bits_of_any(Vector x, Vector y, Vector z) {
  constexpr int kOr = 0xfe;
  return _mm512_castsi512_ps(
      _mm512_ternarylogic_epi32(_mm512_castps_si512(x), _mm512_castps_si512(y), _mm512_castps_si512(z), kOr));
}
LOKU_INLINE bool all_negative(Vector x) { return _mm512_movepi32_mask(_mm512_castps_si512(x)) == 0xffff; }
LOKU_INLINE float sum_of(Vector x) { return _mm512_reduce_add_ps(x); }
LOKU_INLINE float largest(Vector x) { return _mm512_reduce_max_ps(x); }
LOKU_INLINE Vector absolute(Vector x) { return _mm512_abs_ps(x); }
LOKU_INLINE Vector copy_sign(Vector magnitude, Vector sign) {
  return _mm512_or_ps(magnitude, _mm512_and_ps(sign, broadcast(-0.0f)));
}
LOKU_INLINE Mask less(Vector x, Vector y) { return _mm512_cmp_ps_mask(x, y, _CMP_LT_OQ); }
LOKU_INLINE Mask equal(Vector x, Vector y) { return _mm512_cmp_ps_mask(x, y, _CMP_EQ_OQ); }
LOKU_INLINE Vector select(Mask mask, Vector yes, Vector no) { return _mm512_mask_mov_ps(no, mask, yes); }
// The first lane at which x and y are equal, or kWidth.
LOKU_INLINE int first_equal(Vector x, Vector y) {
  return __builtin_ctz(_mm512_cmp_ps_mask(x, y, _CMP_EQ_OQ) | 1u << kWidth);
}

constexpr bool kFusesMultiplyAdd = true;

// While it lives, what would be subnormal is 0: forming such a number, as power_of_two can, takes over 100 cycles.
class FlushSubnormals {
 public:
  FlushSubnormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | _MM_FLUSH_ZERO_ON); }
  ~FlushSubnormals() { _mm_setcsr(before_); }

 private:
  const unsigned before_;
};

// 2^(j / 2^kTableBits), where the integer in the low bits of `shifted` is j modulo 2^kTableBits.
constexpr int kTableBits = 5;
LOKU_INLINE Vector fraction_of_power(Vector shifted) {
  const __m512 low = _mm512_castsi512_ps(_mm512_setr_epi32(
      0x3f800000, 0x3f82cd87, 0x3f85aac3, 0x3f88980f, 0x3f8b95c2, 0x3f8ea43a, 0x3f91c3d3, 0x3f94f4f0,
      0x3f9837f0, 0x3f9b8d3a, 0x3f9ef532, 0x3fa27043, 0x3fa5fed7, 0x3fa9a15b, 0x3fad583f, 0x3fb123f6));
  const __m512 high = _mm512_castsi512_ps(_mm512_setr_epi32(
      0x3fb504f3, 0x3fb8fbaf, 0x3fbd08a4, 0x3fc12c4d, 0x3fc5672a, 0x3fc9b9be, 0x3fce248c, 0x3fd2a81e,
      0x3fd744fd, 0x3fdbfbb8, 0x3fe0ccdf, 0x3fe5b907, 0x3feac0c7, 0x3fefe4ba, 0x3ff5257d, 0x3ffa83b3));
  return _mm512_permutex2var_ps(low, _mm512_castps_si512(shifted), high);
}

// 2^n, where n is a multiple of 2^-kTableBits and `shifted` is rounder(kTableBits) + n.
LOKU_INLINE Vector power_of_two(Vector shifted, Vector n) { return _mm512_scalef_ps(fraction_of_power(shifted), n); }

// 2^(t - rest), for the `rest` in [0, 2^-kTableBits) that makes t - rest a multiple of that. Without a clamp: the
// infinities leave no rest.
LOKU_INLINE Vector split_power(Vector t, Vector& rest) {
  constexpr int kDown = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
  rest = _mm512_reduce_ps(t, kTableBits << 4 | kDown);
  const Vector shifted = _mm512_add_round_ps(t, broadcast(rounder(kTableBits)), kDown);
  return _mm512_scalef_ps(fraction_of_power(shifted), t);
}

// y + n ln 2, where y is close to minus that product.
LOKU_INLINE Vector add_multiple_of_log2(Vector y, Vector n) { return multiply_add(n, broadcast(0.693147181f), y); }

}  // namespace loku::LOKU_ISA
