// Plain C++, for any machine, and the oracle of the others.
#include <math.h>
#include <stdint.h>
#include <string.h>

namespace flashmoe {
namespace {

constexpr int kLanes = 1, kTileTokens = 4, kRowTokens = 1, kRows = 1;

using F = float;
F zero() { return 0.f; }
F set1(float f) { return f; }
F load(const float* p) {
  float f;
  memcpy(&f, p, 4);
  return f;
}
void store(float* p, F f) { *p = f; }
F mul(F a, F b) { return a * b; }
F fmadd(F a, F b, F c) { return __builtin_fmaf(a, b, c); }
F from_bf16(const void* p) {
  uint16_t half;
  memcpy(&half, p, 2);
  const uint32_t bits = uint32_t(half) << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
F from_f16(const void* p) {
  uint16_t h;
  memcpy(&h, p, 2);
  const uint32_t sign = uint32_t(h & 0x8000u) << 16, exponent = h >> 10 & 31u, mantissa = h & 1023u;
  if (exponent == 0) return (sign ? -1.f : 1.f) * float(mantissa) * 5.9604644775390625e-08f;
  const uint32_t bits = sign | (exponent == 31 ? 255u : exponent + 112u) << 23 | mantissa << 13;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

struct Line {
  uint32_t bytes;
};
Line load_line(const uint8_t* p) {
  Line line;
  memcpy(&line.bytes, p, 4);
  return line;
}
Line low_nibbles(Line v) { return {v.bytes & 0x0f0f0f0fu}; }
template <int M>
Line high_nibbles(Line v) { return {v.bytes >> 4 & 0x0f0f0f0fu}; }
template <int kBits, int kShift>
F values(Line v) {
  return float(v.bytes >> kShift & ((1u << kBits) - 1u)) - (kBits == 4 ? 8.f : 128.f);
}

template <int kBits, int M>
struct Dot {
  int32_t sum;
  void start(int32_t bias) { sum = bias; }
  void add_high(Line v, int32_t activations) { add_low(v, activations); }
  void add_low(Line v, int32_t activations) {
    for (int j = 0; j < 4; j++)
      sum += int32_t(v.bytes >> 8 * j & 255u) * int8_t(uint8_t(uint32_t(activations) >> 8 * j & 255u));
  }
  F to_float(int32_t) const { return float(sum); }
};

}  // namespace
}  // namespace flashmoe

#include "isa_kernels.h"

namespace flashmoe {
const Isa* isa_scalar() {
  static const Isa isa = make_isa("scalar");
  return &isa;
}
}  // namespace flashmoe
