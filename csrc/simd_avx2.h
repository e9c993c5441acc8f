// Eight floats in an AVX2 register, with FMA and F16C. The interface is that of simd_avx512.h.
#pragma once

#include <immintrin.h>

#include "types.h"

namespace loku::LOKU_ISA {

using Vector = __m256;
using Mask = __m256;
constexpr int kWidth = 8;

LOKU_INLINE Vector broadcast(float x) { return _mm256_set1_ps(x); }
LOKU_INLINE Vector load(const float* p) { return _mm256_loadu_ps(p); }
LOKU_INLINE Vector widen(__m128i bits, BFloat16) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
LOKU_INLINE Vector widen(__m128i bits, Half) { return _mm256_cvtph_ps(bits); }
template <class T>
LOKU_INLINE Vector load(const T* p) {
  return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), T());
}
LOKU_INLINE void load_in_any_order(const BFloat16* p, Vector& even, Vector& odd) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  even = _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
  odd = _mm256_castsi256_ps(_mm256_blend_epi16(_mm256_setzero_si256(), bits, 0xaa));
}

LOKU_INLINE __m128i narrow(Vector x, Half) { return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT); }
LOKU_INLINE __m128i narrow(Vector x, BFloat16) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const __m256i words = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), is_nan);
  return _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}
LOKU_INLINE void store(float* p, Vector x) { _mm256_storeu_ps(p, x); }
template <class T>
LOKU_INLINE void store(T* p, Vector x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(x, T()));
}

LOKU_INLINE void stream(float* p, Vector x) { _mm256_stream_ps(p, x); }
template <class T>
LOKU_INLINE void stream(T* p, Vector x) {
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), narrow(x, T()));
}
LOKU_INLINE void finish_streaming() { _mm_sfence(); }

LOKU_INLINE Vector multiply_add(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
LOKU_INLINE Vector larger(Vector x, Vector y) { return _mm256_max_ps(x, y); }
LOKU_INLINE Vector smaller(Vector x, Vector y) { return _mm256_min_ps(x, y); }
LOKU_INLINE Vector bits_of_any(Vector x, Vector y, Vector z) { return _mm256_or_ps(_mm256_or_ps(x, y), z); }
LOKU_INLINE bool all_negative(Vector x) { return _mm256_movemask_ps(x) == 0xff; }
LOKU_INLINE Vector absolute(Vector x) { return _mm256_andnot_ps(broadcast(-0.0f), x); }
LOKU_INLINE Vector copy_sign(Vector magnitude, Vector sign) {
  return _mm256_or_ps(magnitude, _mm256_and_ps(sign, broadcast(-0.0f)));
}
LOKU_INLINE Mask less(Vector x, Vector y) { return _mm256_cmp_ps(x, y, _CMP_LT_OQ); }
LOKU_INLINE Mask equal(Vector x, Vector y) { return _mm256_cmp_ps(x, y, _CMP_EQ_OQ); }
LOKU_INLINE Vector select(Mask mask, Vector yes, Vector no) { return _mm256_blendv_ps(no, yes, mask); }
LOKU_INLINE int first_equal(Vector x, Vector y) {
  return __builtin_ctz(_mm256_movemask_ps(_mm256_cmp_ps(x, y, _CMP_EQ_OQ)) | 1 << kWidth);
}

constexpr bool kFusesMultiplyAdd = true;

constexpr int kTableBits = 3;
// Each entry of the table has j << (23 - kTableBits) taken off, which the addition of the whole integer brings back.
LOKU_INLINE Vector power_of_two(Vector shifted, Vector) {
  const __m256 table = _mm256_castsi256_ps(_mm256_setr_epi32(
      0x3f800000, 0x3f7b95c2, 0x3f7837f0, 0x3f75fed7, 0x3f7504f3, 0x3f75672a, 0x3f7744fd, 0x3f7ac0c7));
  const __m256i n = _mm256_castps_si256(shifted);
  const __m256i fraction = _mm256_castps_si256(_mm256_permutevar8x32_ps(table, n));
  return _mm256_castsi256_ps(_mm256_add_epi32(fraction, _mm256_slli_epi32(n, 23 - kTableBits)));
}

LOKU_INLINE Vector add_multiple_of_log2(Vector y, Vector n) { return multiply_add(n, broadcast(0.693147181f), y); }

}  // namespace loku::LOKU_ISA

#include "simd_tails.h"
