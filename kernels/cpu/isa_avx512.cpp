// AVX-512 with VNNI: a weight line is one register.
#include "isa.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VNNI__)
#include <immintrin.h>

namespace flashmoe {
namespace {

constexpr int kLanes = 16, kTileTokens = 8, kRowTokens = 6, kRows = 4;

using F = __m512;
inline F zero() { return _mm512_setzero_ps(); }
inline F set1(float f) { return _mm512_set1_ps(f); }
inline F load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, F f) { _mm512_storeu_ps(p, f); }
inline F mul(F a, F b) { return _mm512_mul_ps(a, b); }
inline F fmadd(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
inline F from_bf16(const void* p) {
  const __m256i halves = _mm256_loadu_si256((const __m256i*)p);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}
inline F from_f16(const void* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }

using Line = __m512i;
inline Line load_line(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline Line low_nibbles(Line v) { return _mm512_and_si512(v, _mm512_set1_epi8(15)); }
// For one or two tokens the high nibbles stay where they are, sixteen times as large, and have sums of their own: fewer
// instructions, shorter chains.
template <int M>
constexpr bool kSplit = M <= 2;
template <int M>
inline Line high_nibbles(Line v) {
  if (kSplit<M>) return _mm512_and_si512(v, _mm512_set1_epi8(char(0xf0)));
  return _mm512_and_si512(_mm512_srli_epi16(v, 4), _mm512_set1_epi8(15));
}
template <int kBits, int kShift>
inline F values(Line v) {
  const __m512i shifted = _mm512_srli_epi32(v, kShift);
  if (kBits == 4)  // a table of 16, looked up by the low 4 bits
    return _mm512_permutexvar_ps(shifted, _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7));
  return _mm512_sub_ps(_mm512_cvtepi32_ps(_mm512_and_si512(shifted, _mm512_set1_epi32(255))), _mm512_set1_ps(128.f));
}

template <int kBits, int M>
struct Dot {
  __m512i sum, sum16;
  void start(int32_t bias) { sum = _mm512_set1_epi32(bias), sum16 = _mm512_setzero_si512(); }
  void add_low(Line v, int32_t q) { sum = _mm512_dpbusd_epi32(sum, v, _mm512_set1_epi32(q)); }
  void add_high(Line v, int32_t q) {
    if (kSplit<M>) sum16 = _mm512_dpbusd_epi32(sum16, v, _mm512_set1_epi32(q));
    else add_low(v, q);
  }
  F to_float(int32_t) const {
    const bool split = kBits == 4 && kSplit<M>;
    return _mm512_cvtepi32_ps(split ? _mm512_add_epi32(sum, _mm512_srai_epi32(sum16, 4)) : sum);
  }
};

}  // namespace
}  // namespace flashmoe

#include "isa_kernels.h"

namespace flashmoe {
const Isa* isa_avx512() {
  static const Isa isa = make_isa("avx512");
  return &isa;
}
}  // namespace flashmoe
#else
namespace flashmoe {
const Isa* isa_avx512() { return nullptr; }
}  // namespace flashmoe
#endif
