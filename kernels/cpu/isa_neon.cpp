// Arm NEON with the dot product instructions (Armv8.2): a quarter of a weight line a register.
#include "isa.h"

#if defined(__ARM_NEON) && defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#include <string.h>

namespace flashmoe {
namespace {

constexpr int kLanes = 4, kTileTokens = 8, kRowTokens = 3, kRows = 2;

using F = float32x4_t;
inline F zero() { return vdupq_n_f32(0.f); }
inline F set1(float f) { return vdupq_n_f32(f); }
inline F load(const float* p) { return vld1q_f32(p); }
inline void store(float* p, F f) { vst1q_f32(p, f); }
inline F mul(F a, F b) { return vmulq_f32(a, b); }
inline F fmadd(F a, F b, F c) { return vfmaq_f32(c, a, b); }
inline uint16x4_t load_halves(const void* p) {
  uint16x4_t halves;
  memcpy(&halves, p, 8);
  return halves;
}
inline F from_bf16(const void* p) { return vreinterpretq_f32_u32(vshll_n_u16(load_halves(p), 16)); }
inline F from_f16(const void* p) { return vcvt_f32_f16(vreinterpret_f16_u16(load_halves(p))); }

using Line = uint8x16_t;
inline Line load_line(const uint8_t* p) { return vld1q_u8(p); }
inline Line low_nibbles(Line v) { return vandq_u8(v, vdupq_n_u8(15)); }
template <int M>
inline Line high_nibbles(Line v) { return vshrq_n_u8(v, 4); }
template <int kBits, int kShift>
inline F values(Line v) {
  const uint32x4_t shifted = vshlq_u32(vreinterpretq_u32_u8(v), vdupq_n_s32(-kShift));
  const uint32x4_t code = vandq_u32(shifted, vdupq_n_u32((1 << kBits) - 1));
  return vsubq_f32(vcvtq_f32_u32(code), vdupq_n_f32(kBits == 4 ? 8.f : 128.f));
}

// Signed times signed: an int4 code is a valid signed byte; an int8 code becomes its value.
template <int kBits, int M>
struct Dot {
  int32x4_t sum;
  void start(int32_t bias) { sum = vdupq_n_s32(kBits == 4 ? bias : 0); }
  void add_high(Line v, int32_t activations) { add_low(v, activations); }
  void add_low(Line v, int32_t activations) {
    const int8x16_t w = vreinterpretq_s8_u8(kBits == 4 ? v : veorq_u8(v, vdupq_n_u8(0x80)));
    sum = vdotq_s32(sum, w, vreinterpretq_s8_s32(vdupq_n_s32(activations)));
  }
  F to_float(int32_t) const { return vcvtq_f32_s32(sum); }
};

}  // namespace
}  // namespace flashmoe

#include "isa_kernels.h"

namespace flashmoe {
const Isa* isa_neon() {
  static const Isa isa = make_isa("neon");
  return &isa;
}
}  // namespace flashmoe
#else
namespace flashmoe {
const Isa* isa_neon() { return nullptr; }
}  // namespace flashmoe
#endif
