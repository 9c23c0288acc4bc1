// What each instruction set provides: one table of functions. The layers above call through it and are compiled
// once; the functions are compiled once an instruction set, from isa_kernels.h, in isa_*.cpp.
#pragma once

#include <cstdint>

namespace flashmoe {

constexpr int kMaxTokens = 8;  // of one kernel call

// Activations of up to kMaxTokens tokens, as the kernels read them. Of `tokens` = M:
//   q       int8 [K/4][M][4]: one broadcast of 4 columns a token and weight line, at consecutive addresses
//   scale   fp32 [K/32][M]
//   bias    int32 [K/32][M]: -zero * sum of the group's q, where a kernel's dot product starts
//   values  fp32 [K][M], for the exact kernels
struct Block {
  const int8_t* q;
  const float* scale;
  const int32_t* bias;
  const float* values;
};

// 16 rows of a packed matrix times M tokens: out [M][16].
using TileKernel = void (*)(const uint8_t* tile, int64_t groups, const Block&, float* out);
// R rows of a row-major matrix, each `row_bytes` long, times M tokens x [M][x_step]: out [M][out_step].
using RowsKernel = void (*)(const uint8_t* rows, int64_t row_bytes, int64_t columns, const float* x, int64_t x_step,
                            float* out, int64_t out_step);

using MixKernel = void (*)(const float* p, int64_t p_step, const float* v, int64_t v_step, int64_t n, int64_t d,
                           float* out, int64_t out_step);

struct Isa {
  const char* name;
  int tile_tokens, row_tokens, rows;            // most tokens of a tile and a row kernel, rows of the latter
  TileKernel tile[2][2][kMaxTokens + 1];        // [int8?][exact?][M]
  RowsKernel many_rows[3][kMaxTokens + 1];      // [bf16, fp16, fp32][M], `rows` rows
  RowsKernel one_row[3][kMaxTokens + 1];
  // out [M][d] = p [M][n] V: rows of V, v_step floats apart, added in order with the weights p.
  MixKernel mix_rows[kMaxTokens + 1];
  // 32 values -> int8, written 4 at a time every q_step bytes; their scale and -zero * sum.
  void (*quantise_group)(const float* x, int32_t zero, int8_t* q, int64_t q_step, float* scale, int32_t* bias);
  // h = act(gate) * up over n values.
  void (*activate)(int32_t activation, float limit, float alpha, int64_t n, const float* gate, const float* up,
                   float* h);
  float (*dot)(const float* a, const float* b, int64_t n);
  void (*add_scaled)(float factor, const float* x, int64_t n, float* y);  // y += factor * x
  // x <- exp(x - max x); returns the sum.
  float (*exp_shifted)(float* x, int64_t n);
  // Pack 16 rows x K columns of fp32 (rows past `rows` do not exist) into one tile; see fm_pack_matrix.
  void (*pack_tile)(const float* source, int64_t rows, int64_t columns, int bits, const float* importance,
                    uint8_t* tile, double* error);
};

// Null where the compiler cannot build for it; whether the machine can run it is for the caller to ask.
const Isa* isa_scalar();
const Isa* isa_avx2();
const Isa* isa_avx2vnni();
const Isa* isa_avx512();
const Isa* isa_neon();

}  // namespace flashmoe
