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
inline F sub(F a, F b) { return _mm512_sub_ps(a, b); }
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
inline Line high_nibbles(Line v) { return _mm512_and_si512(_mm512_srli_epi16(v, 4), _mm512_set1_epi8(15)); }
template <int kShift, int kMask>
inline F codes(Line v) {
  return _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(v, kShift), _mm512_set1_epi32(kMask)));
}

template <int kBits>
struct Dot {
  __m512i sum;
  void start(int32_t bias) { sum = _mm512_set1_epi32(bias); }
  void add(Line v, int32_t activations) { sum = _mm512_dpbusd_epi32(sum, v, _mm512_set1_epi32(activations)); }
  F to_float(int32_t) const { return _mm512_cvtepi32_ps(sum); }
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
