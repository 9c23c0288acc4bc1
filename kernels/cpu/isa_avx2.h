// The vectors of AVX2 + FMA + F16C: half a weight line a register. With AVX-VNNI (Alder Lake and later, Zen 5) the
// integer products are one instruction; without, int4 sums a whole group in 16 bits (8 x 2 x 15 x 127 = 30480 fits)
// and int8 multiplies |w| with the activation that has taken w's sign (255 x 127 x 2 would not fit).
#pragma once
#include <immintrin.h>

namespace flashmoe {
namespace {

constexpr int kLanes = 8, kTileTokens = 4, kRowTokens = 2, kRows = 2;

using F = __m256;
inline F zero() { return _mm256_setzero_ps(); }
inline F set1(float f) { return _mm256_set1_ps(f); }
inline F load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, F f) { _mm256_storeu_ps(p, f); }
inline F mul(F a, F b) { return _mm256_mul_ps(a, b); }
inline F fmadd(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
inline F from_bf16(const void* p) {
  const __m128i halves = _mm_loadu_si128((const __m128i*)p);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}
inline F from_f16(const void* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }

using Line = __m256i;
inline Line load_line(const uint8_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
inline Line low_nibbles(Line v) { return _mm256_and_si256(v, _mm256_set1_epi8(15)); }
template <int M>
inline Line high_nibbles(Line v) { return _mm256_and_si256(_mm256_srli_epi16(v, 4), _mm256_set1_epi8(15)); }
template <int kBits, int kShift>
inline F values(Line v) {
  const __m256i code = _mm256_and_si256(_mm256_srli_epi32(v, kShift), _mm256_set1_epi32((1 << kBits) - 1));
  return _mm256_sub_ps(_mm256_cvtepi32_ps(code), _mm256_set1_ps(kBits == 4 ? 8.f : 128.f));
}

#if defined(__AVXVNNI__)
template <int kBits, int M>
struct Dot {
  __m256i sum;
  void start(int32_t bias) { sum = _mm256_set1_epi32(bias); }
  void add_low(Line v, int32_t q) { sum = _mm256_dpbusd_avx_epi32(sum, v, _mm256_set1_epi32(q)); }
  void add_high(Line v, int32_t q) { add_low(v, q); }
  F to_float(int32_t) const { return _mm256_cvtepi32_ps(sum); }
};
#else
template <int kBits, int M>
struct Dot {
  __m256i sum;  // int4: 16 sums of 16 bits, in pairs; int8: 8 of 32
  void start(int32_t) { sum = _mm256_setzero_si256(); }
  void add_high(Line v, int32_t activations) { add_low(v, activations); }
  void add_low(Line v, int32_t activations) {
    const __m256i q = _mm256_set1_epi32(activations);
    if (kBits == 4) {
      sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(v, q));
    } else {
      const __m256i w = _mm256_xor_si256(v, _mm256_set1_epi8(char(0x80)));
      const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(q, w));
      sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
  }
  F to_float(int32_t bias) const {
    if (kBits == 8) return _mm256_cvtepi32_ps(sum);
    return _mm256_cvtepi32_ps(
        _mm256_add_epi32(_mm256_madd_epi16(sum, _mm256_set1_epi16(1)), _mm256_set1_epi32(bias)));
  }
};
#endif

}  // namespace
}  // namespace flashmoe

#include "isa_kernels.h"
