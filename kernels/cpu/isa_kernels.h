// The kernels, written once over a small vector type, compiled for each instruction set.
//
// A translation unit isa_*.cpp defines, in its unnamed namespace, and then includes this file:
//   F          kLanes floats: zero(), set1, load, store, from_bf16, from_f16, mul, fmadd(a, b, c) = a * b + c
//   Line       kLanes x 4 bytes of a weight line: load_line, low_nibbles, high_nibbles<M>,
//              values<bits, shift> -> F: the codes at a bit offset of the dwords, less the zero
//   Dot<bits, M>  kLanes integer dot products for one of M tokens: start(bias), add_low and add_high(Line of codes,
//              4 activations), to_float(bias); int8 has add_low alone
//   kLanes     1, 4, 8 or 16; kParts = 16 / kLanes
//   kTileTokens, kRowTokens, kRows: register blocks
//
// Every sum has one order whatever kLanes is: tiles have a chain a row; everything else has 16 chains, lane l
// taking elements l, l + 16, ..., joined as a tree. Multiply-adds are written out and the compiler may not fuse
// others (-ffp-contract=off). So the bits are the same everywhere.
//
// No header of the standard library with code in it may be used here: see packed_layout.h.
#pragma once

#include <math.h>
#include <string.h>

#include "flashmoe_cpu.h"
#include "isa.h"
#include "packed_layout.h"

namespace flashmoe {
namespace {

constexpr int kParts = 16 / kLanes;

inline float as_float(uint32_t bits) {
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
inline uint32_t as_bits(float f) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  return bits;
}
inline int32_t load_i32(const int8_t* p) {
  int32_t v;
  memcpy(&v, p, 4);
  return v;
}

// ---- tiles ----------------------------------------------------------------------------------------------------

// Weights are asked for this far ahead, into the second-level cache (the 2: prefetcht1). One thread then reads int4 at
// 0.95 of the roof; 2 KiB ahead into the first level gave 0.85, and leaving out the scales' lines 0.81 (docs/log.md).
constexpr int kPrefetchBytes = 8192;
inline void prefetch(const uint8_t* p) { __builtin_prefetch(p, 0, 2); }

template <int kBits, int M>
void tile_int8_activations(const uint8_t* tile, int64_t groups, const Block& a, float* out) {
  for (int part = 0; part < kParts; part++) {
    F acc[M];
    for (int m = 0; m < M; m++) acc[m] = zero();
    for (int64_t g = 0; g < groups; g++) {
      const uint8_t* superblock = tile + g / 2 * superblock_bytes(kBits);
      const uint8_t* scales = superblock + 32 * (g & 1) + 2 * kLanes * part;
      const uint8_t* lines = superblock + kScaleBytes + 64 * kBits * (g & 1) + 4 * kLanes * part;
      const int8_t* q = a.q + 32 * M * g;
      if (part == 0 && g % 2 == 0) prefetch(superblock + kPrefetchBytes);
      Dot<kBits, M> dot[M];
      for (int m = 0; m < M; m++) dot[m].start(a.bias[g * M + m]);
#pragma GCC unroll 8
      for (int c = 0; c < kBits; c++) {
        const Line line = load_line(lines + 64 * c);
        if (part == 0) prefetch(lines + 64 * c + kPrefetchBytes);
        if (kBits == 4) {
          const Line low = low_nibbles(line), high = high_nibbles<M>(line);
#pragma GCC unroll 8
          for (int m = 0; m < M; m++) {
            dot[m].add_low(low, load_i32(q + 4 * m));
            dot[m].add_high(high, load_i32(q + 4 * (M + m)));
          }
          q += 8 * M;
        } else {
#pragma GCC unroll 8
          for (int m = 0; m < M; m++) dot[m].add_low(line, load_i32(q + 4 * m));
          q += 4 * M;
        }
      }
      const F scale = from_f16(scales);
#pragma GCC unroll 8
      for (int m = 0; m < M; m++)
        acc[m] = fmadd(dot[m].to_float(a.bias[g * M + m]), mul(scale, set1(a.scale[g * M + m])), acc[m]);
    }
    for (int m = 0; m < M; m++) store(out + kTileRows * m + kLanes * part, acc[m]);
  }
}

// The part of one line that a shift selects, times the activations of its columns.
template <int kBits, int M, int kShift>
inline void add_codes(const Line line, const float* x, F* sum) {
  const F code = values<kBits, kShift>(line);
#pragma GCC unroll 8
  for (int m = 0; m < M; m++) sum[m] = fmadd(code, set1(x[m]), sum[m]);
}

template <int kBits, int M>
void tile_exact(const uint8_t* tile, int64_t groups, const Block& a, float* out) {
  for (int part = 0; part < kParts; part++) {
    F acc[M];
    for (int m = 0; m < M; m++) acc[m] = zero();
    for (int64_t g = 0; g < groups; g++) {
      const uint8_t* superblock = tile + g / 2 * superblock_bytes(kBits);
      const uint8_t* scales = superblock + 32 * (g & 1) + 2 * kLanes * part;
      const uint8_t* lines = superblock + kScaleBytes + 64 * kBits * (g & 1) + 4 * kLanes * part;
      const float* x = a.values + kGroup * M * g;
      if (part == 0 && g % 2 == 0) prefetch(superblock + kPrefetchBytes);
      F sum[M];
      for (int m = 0; m < M; m++) sum[m] = zero();
#pragma GCC unroll 2
      for (int c = 0; c < kBits; c++, x += (kBits == 4 ? 8 : 4) * M) {
        const Line line = load_line(lines + 64 * c);
        if (part == 0) prefetch(lines + 64 * c + kPrefetchBytes);
        if (kBits == 4) {
          add_codes<kBits, M, 0>(line, x, sum);
          add_codes<kBits, M, 8>(line, x + M, sum);
          add_codes<kBits, M, 16>(line, x + 2 * M, sum);
          add_codes<kBits, M, 24>(line, x + 3 * M, sum);
          add_codes<kBits, M, 4>(line, x + 4 * M, sum);
          add_codes<kBits, M, 12>(line, x + 5 * M, sum);
          add_codes<kBits, M, 20>(line, x + 6 * M, sum);
          add_codes<kBits, M, 28>(line, x + 7 * M, sum);
        } else {
          add_codes<kBits, M, 0>(line, x, sum);
          add_codes<kBits, M, 8>(line, x + M, sum);
          add_codes<kBits, M, 16>(line, x + 2 * M, sum);
          add_codes<kBits, M, 24>(line, x + 3 * M, sum);
        }
      }
      const F scale = from_f16(scales);
      for (int m = 0; m < M; m++) acc[m] = fmadd(sum[m], scale, acc[m]);
    }
    for (int m = 0; m < M; m++) store(out + kTileRows * m + kLanes * part, acc[m]);
  }
}

// ---- rows as in the checkpoint --------------------------------------------------------------------------------

struct Bf16 {
  static constexpr int kBytes = 2;
  static F widen(const uint8_t* p) { return from_bf16(p); }
};
struct F16 {
  static constexpr int kBytes = 2;
  static F widen(const uint8_t* p) { return from_f16(p); }
};
struct F32 {
  static constexpr int kBytes = 4;
  static F widen(const uint8_t* p) { return load((const float*)(const void*)p); }
};

inline float join_lanes(const F* parts) {
  float lanes[16];
  for (int p = 0; p < kParts; p++) store(lanes + kLanes * p, parts[p]);
  for (int half = 8; half > 0; half /= 2)
    for (int l = 0; l < half; l++) lanes[l] += lanes[l + half];
  return lanes[0];
}

template <class W, int R, int M>
void rows_kernel(const uint8_t* w, int64_t row_bytes, int64_t columns, const float* x, int64_t x_step, float* out,
                 int64_t out_step) {
  F acc[R][M][kParts];
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++)
      for (int p = 0; p < kParts; p++) acc[r][m][p] = zero();
  const int64_t whole = columns / 16 * 16;
  for (int64_t k = 0; k < whole; k += 16) {
    for (int p = 0; p < kParts; p++) {
      const int64_t at = k + kLanes * p;
      F xs[M];
#pragma GCC unroll 8
      for (int m = 0; m < M; m++) xs[m] = load(x + m * x_step + at);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        const uint8_t* from = w + r * row_bytes + W::kBytes * at;
        if (R > 1 && (W::kBytes * at) % 64 == 0) prefetch(from + R * row_bytes);
        const F weight = W::widen(from);
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) acc[r][m][p] = fmadd(weight, xs[m], acc[r][m][p]);
      }
    }
  }
  if (whole < columns) {  // x is padded with zeros, the weights are not
    for (int r = 0; r < R; r++) {
      uint8_t rest[16 * W::kBytes] = {};
      memcpy(rest, w + r * row_bytes + W::kBytes * whole, W::kBytes * (columns - whole));
      for (int p = 0; p < kParts; p++) {
        const F weight = W::widen(rest + W::kBytes * kLanes * p);
        for (int m = 0; m < M; m++)
          acc[r][m][p] = fmadd(weight, load(x + m * x_step + whole + kLanes * p), acc[r][m][p]);
      }
    }
  }
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++) out[m * out_step + r] = join_lanes(acc[r][m]);
}

// Columns [begin, begin + 16 C) of the weighted sum of n rows.
template <int M, int C>
inline void mix_columns(const float* p, int64_t p_step, const float* v, int64_t v_step, int64_t n, float* out,
                        int64_t out_step) {
  F acc[M][C][kParts];
  for (int m = 0; m < M; m++)
    for (int c = 0; c < C; c++)
      for (int part = 0; part < kParts; part++) acc[m][c][part] = zero();
  for (int64_t s = 0; s < n; s++)
#pragma GCC unroll 8
    for (int c = 0; c < C; c++)
#pragma GCC unroll 8
      for (int part = 0; part < kParts; part++) {
        const F values = load(v + s * v_step + 16 * c + kLanes * part);
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) acc[m][c][part] = fmadd(set1(p[m * p_step + s]), values, acc[m][c][part]);
      }
  for (int m = 0; m < M; m++)
    for (int c = 0; c < C; c++)
      for (int part = 0; part < kParts; part++) store(out + m * out_step + 16 * c + kLanes * part, acc[m][c][part]);
}

template <int M>
void mix_rows(const float* p, int64_t p_step, const float* v, int64_t v_step, int64_t n, int64_t d, float* out,
              int64_t out_step) {
  constexpr int C = kLanes == 16 ? 4 : 2;  // as many as registers hold for kRowTokens tokens
  int64_t begin = 0;
  for (; begin + 16 * C <= d; begin += 16 * C)
    mix_columns<M, C>(p, p_step, v + begin, v_step, n, out + begin, out_step);
  for (; begin + 16 <= d; begin += 16)
    mix_columns<M, 1>(p, p_step, v + begin, v_step, n, out + begin, out_step);
  for (; begin < d; begin++)
    for (int m = 0; m < M; m++) {
      float sum = 0.f;
      for (int64_t s = 0; s < n; s++) sum = __builtin_fmaf(p[m * p_step + s], v[s * v_step + begin], sum);
      out[m * out_step + begin] = sum;
    }
}

// ---- everything that is not weights ---------------------------------------------------------------------------

float dot(const float* a, const float* b, int64_t n) {
  F acc[kParts];
  for (int p = 0; p < kParts; p++) acc[p] = zero();
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)
    for (int p = 0; p < kParts; p++) acc[p] = fmadd(load(a + i + kLanes * p), load(b + i + kLanes * p), acc[p]);
  if (i < n) {
    float rest[2][16] = {};
    memcpy(rest[0], a + i, sizeof(float) * (n - i));
    memcpy(rest[1], b + i, sizeof(float) * (n - i));
    for (int p = 0; p < kParts; p++) acc[p] = fmadd(load(rest[0] + kLanes * p), load(rest[1] + kLanes * p), acc[p]);
  }
  return join_lanes(acc);
}

void add_scaled(float factor, const float* x, int64_t n, float* y) {
  for (int64_t i = 0; i < n; i++) y[i] = __builtin_fmaf(factor, x[i], y[i]);
}

constexpr float kRound = 12582912.f;  // 1.5 * 2^23: adding it rounds to a whole number, kept in the low bits

// e^x within 2 ulp, 0 below -87.3, and NaN for NaN. No branches, so that loops over it become vectors.
inline float exp_float(float x) {
  const float limited = x < -87.f ? -87.f : x > 88.f ? 88.f : x;
  const float shifted = __builtin_fmaf(limited, 1.44269504f, kRound);
  const float n = shifted - kRound;
  float r = __builtin_fmaf(n, -0.693359375f, limited);
  r = __builtin_fmaf(n, 2.12194440e-4f, r);
  float p = 1.9875691500e-4f;
  p = __builtin_fmaf(p, r, 1.3981999507e-3f);
  p = __builtin_fmaf(p, r, 8.3334519073e-3f);
  p = __builtin_fmaf(p, r, 4.1665795894e-2f);
  p = __builtin_fmaf(p, r, 1.6666665459e-1f);
  p = __builtin_fmaf(p, r, 5.0000001201e-1f);
  p = __builtin_fmaf(p, r * r, r) + 1.f;
  const float scale = as_float((as_bits(shifted) + 127u) << 23);  // 2^n: n is in shifted's low bits
  return x < -87.3f ? 0.f : p * scale;
}

float exp_shifted(float* x, int64_t n) {
  float largest = x[0];
  for (int64_t i = 1; i < n; i++) largest = x[i] > largest || x[i] != x[i] ? x[i] : largest;
  float lanes[16] = {};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)
    for (int l = 0; l < 16; l++) {
      x[i + l] = exp_float(x[i + l] - largest);
      lanes[l] += x[i + l];
    }
  for (int l = 0; i + l < n; l++) {
    x[i + l] = exp_float(x[i + l] - largest);
    lanes[l] += x[i + l];
  }
  for (int half = 8; half > 0; half /= 2)
    for (int l = 0; l < half; l++) lanes[l] += lanes[l + half];
  return lanes[0];
}

inline float sigmoid(float x) { return 1.f / (1.f + exp_float(-x)); }

void activate(int32_t activation, float limit, float alpha, int64_t n, const float* gate, const float* up, float* h) {
  switch (activation) {
    case FM_SILU:
      for (int64_t i = 0; i < n; i++) h[i] = gate[i] * sigmoid(gate[i]) * up[i];
      return;
    case FM_GELU:
      for (int64_t i = 0; i < n; i++) h[i] = float(0.5 * gate[i] * (1 + ::erf(gate[i] * 0.70710678118654752))) * up[i];
      return;
    case FM_GELU_TANH:  // 0.5 (1 + tanh u) = sigmoid(2 u)
      for (int64_t i = 0; i < n; i++) {
        const float x = gate[i], cube = x * x * x;
        h[i] = x * sigmoid(1.5957691216f * __builtin_fmaf(0.044715f, cube, x)) * up[i];
      }
      return;
    case FM_RELU:
      for (int64_t i = 0; i < n; i++) h[i] = (gate[i] < 0.f ? 0.f : gate[i]) * up[i];
      return;
    case FM_SWIGLU_CLAMPED:
      for (int64_t i = 0; i < n; i++) {
        const float g = gate[i] > limit ? limit : gate[i];
        const float u = up[i] > limit ? limit : up[i] < -limit ? -limit : up[i];
        h[i] = (u + 1.f) * (g * sigmoid(alpha * g));
      }
      return;
  }
}

// The largest absolute value decides the scale. A value that is no number makes the scale NaN, so that it is seen
// in the result; a group below 1e-30 counts as zero.
void quantise_group(const float* x, int32_t zero_code, int8_t* q, int64_t q_step, float* scale, int32_t* bias) {
  uint32_t largest = 0;
  for (int k = 0; k < kGroup; k++) {
    const uint32_t bits = as_bits(x[k]) & 0x7fffffffu;
    largest = bits > largest ? bits : largest;
  }
  const bool finite = largest < 0x7f800000u, tiny = as_float(largest) < 1e-30f;
  if (!finite || tiny) {
    for (int k = 0; k < kGroup; k += 4) memset(q + k / 4 * q_step, 0, 4);
    *scale = finite ? 0.f : as_float(0x7fc00000u);
    *bias = 0;
    return;
  }
  const float inverse = 127.f / as_float(largest);
  int8_t codes_of_group[kGroup];
  int32_t sum = 0;
  for (int k = 0; k < kGroup; k++) {
    const float rounded = x[k] * inverse + kRound;
    const int32_t v = int32_t(as_bits(rounded) - as_bits(kRound));
    codes_of_group[k] = int8_t(v);
    sum += v;
  }
  for (int k = 0; k < kGroup; k += 4) memcpy(q + k / 4 * q_step, codes_of_group + k, 4);
  *scale = as_float(largest) / 127.f;
  *bias = -zero_code * sum;
}

#include "isa_pack.h"

// ---- the table ------------------------------------------------------------------------------------------------

#define FLASHMOE_TILES(kernel, bits)                                                                        \
  {nullptr,         kernel<bits, 1>, kernel<bits, 2>, kernel<bits, 3>, kernel<bits, 4>, kTileTokens < 5 ? nullptr : kernel<bits, 5>, \
   kTileTokens < 6 ? nullptr : kernel<bits, 6>, kTileTokens < 7 ? nullptr : kernel<bits, 7>, kTileTokens < 8 ? nullptr : kernel<bits, 8>}
#define FLASHMOE_ROWS(W, R)                                                                                 \
  {nullptr,           rows_kernel<W, R, 1>, rows_kernel<W, R, 2>, rows_kernel<W, R, 3>, rows_kernel<W, R, 4>, \
   rows_kernel<W, R, 5>, rows_kernel<W, R, 6>, nullptr, nullptr}

constexpr Isa make_isa(const char* name) {
  return Isa{
      name, kTileTokens, kRowTokens, kRows,
      {{FLASHMOE_TILES(tile_int8_activations, 4), FLASHMOE_TILES(tile_exact, 4)},
       {FLASHMOE_TILES(tile_int8_activations, 8), FLASHMOE_TILES(tile_exact, 8)}},
      {FLASHMOE_ROWS(Bf16, kRows), FLASHMOE_ROWS(F16, kRows), FLASHMOE_ROWS(F32, kRows)},
      {FLASHMOE_ROWS(Bf16, 1), FLASHMOE_ROWS(F16, 1), FLASHMOE_ROWS(F32, 1)},
      {nullptr, mix_rows<1>, mix_rows<2>, mix_rows<3>, mix_rows<4>, mix_rows<5>, mix_rows<6>, nullptr, nullptr},
      quantise_group, activate, dot, add_scaled, exp_shifted, pack_tile,
  };
}

}  // namespace
}  // namespace flashmoe
