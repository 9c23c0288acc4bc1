// The C interface of the CPU kernels. Raw pointers in, results into the caller's memory; nothing here knows files,
// caches or Python. All functions but fm_create may be called from one thread at a time per context.
//
// Axis letters: T tokens, D hidden, F expert width, N rows, K columns, H query heads, G key/value heads, d head size.
// Every result is the same, bit for bit, for any number of threads, for any instruction set, and whether a token
// is computed alone or among others: each value is one chain of operations in a fixed order (docs/kernels.md).
#pragma once

#include <cstdint>

extern "C" {

// How a matrix [N, K] is stored. int4 and int8: tiles of packed_layout.h. The others: rows, as in safetensors.
enum fm_format : int32_t { FM_INT4 = 0, FM_INT8 = 1, FM_BF16 = 2, FM_F16 = 3, FM_F32 = 4 };

// What gates an expert: h = act(gate) * up. FM_SWIGLU_CLAMPED is gpt-oss's: gate <= limit, |up| <= limit,
// h = (up + 1) * gate * sigmoid(alpha * gate).
enum fm_activation : int32_t {
  FM_SILU = 0, FM_GELU = 1, FM_GELU_TANH = 2, FM_RELU = 3, FM_SWIGLU_CLAMPED = 4
};

struct fm_matrix {
  const void* data;
  int32_t format;
  int32_t rows, columns;
};

// One MoE layer's experts. exact: fp32 activations also for int4 and int8 weights, which otherwise meet
// activations rounded to int8 in groups of 32.
struct fm_experts {
  int32_t hidden, width, format, activation, exact;
  float limit, alpha;  // of FM_SWIGLU_CLAMPED
};

// Attention of one layer, its norms included. qk_norm: 0 none, 1 each head, 2 all heads together (before the
// clipping). Norms, biases, keys and values are fp32; keys and values are [context, G, d], as far from the beginning
// of each sequence's memory as these addresses say.
struct fm_attention {
  int32_t hidden, heads, kv_heads, head_dim, qk_norm, window, exact;  // window 0: all tokens
  float eps, clip;                                                    // clip 0: none
  const float *input_norm, *qkv_bias, *q_norm, *k_norm, *o_bias;      // null where there is none
  fm_matrix qkv, o;
  float *keys, *values;
};

// New tokens of one sequence: where its memory begins, how many tokens it has already, and how many come.
struct fm_sequence {
  uint64_t memory;
  int64_t position, tokens;
};

// The router of one layer and the norm before it. weight [experts, hidden] fp32.
struct fm_router {
  int32_t hidden, experts, top_k, renormalise;
  float eps;
  const float *norm, *weight;
};

struct fm_context;  // threads, workspace, instruction set

// threads >= 1; isa: a name from fm_isa_names, or null for the best one. Null where that is not available.
fm_context* fm_create(int32_t threads, const char* isa);
void fm_destroy(fm_context*);
const char* fm_isa(const fm_context*);
// Names of the instruction sets that this machine can run, best first, separated by spaces.
const char* fm_isa_names();
// Seconds spent inside this context's calls so far, and the bytes of its workspace.
double fm_busy_s(const fm_context*);
int64_t fm_workspace_bytes(const fm_context*);

// y [T, N] = x [T, K] W^T + bias; y_step: floats from one row of y to the next.
void fm_linear(fm_context*, const fm_matrix*, const float* bias, const float* x, int64_t tokens, int32_t exact,
               float* y, int64_t y_step);

// A MoE layer in steps, so that experts may be computed as they arrive: begin once, experts any number of times,
// end once. products has a row [D] for each (token, k), row t * top_k + k.
//   table      3 pointers an expert: gate, up, down; int4 and int8 use the first only, a packed expert
//   row_begin  [n + 1], rows: which rows of products each expert owes
//   end        y [T, D] += sum over k, in order, of weights[t, k] * products[t * top_k + k]
void fm_moe_begin(fm_context*, const fm_experts*, const float* x, int64_t tokens, int32_t top_k);
void fm_moe_experts(fm_context*, const void* const* table, int64_t n, const int32_t* row_begin, const int32_t* rows,
                    float* products);
void fm_moe_end(fm_context*, const float* products, const float* weights, float* y);

// h [D] = activation-gated network of a dense layer or shared expert, added to y with a factor:
// y [T, D] += factor[t] * down(act(gate x) * up x); factor null: 1. FM_SWIGLU_CLAMPED with gpt-oss's limit 7 and alpha 1.702.
void fm_mlp(fm_context*, int32_t activation, const fm_matrix* gate, const fm_matrix* up, const fm_matrix* down,
            const float* x, int64_t tokens, int32_t exact, const float* factor, float* y);

// New tokens of n sequences, T in all, one sequence behind the other: x [T, D] += attention(norm(x)), each within its
// own. cos, sin [context, d]. Keys and values are stored. A token's bits do not depend on who runs beside it.
void fm_attend(fm_context*, const fm_attention*, const float* cos, const float* sin, const fm_sequence* sequences,
               int64_t n, float* x);

// h [T, D] = norm(x); the top-k experts of each token, likeliest first (the lower id where two are equal), and their
// weights [T, top_k]. probabilities [T, experts]: softmax over all.
void fm_route(fm_context*, const fm_router*, const float* x, int64_t tokens, float* h, float* probabilities,
              int32_t* ids, float* weights);

// h [T, D] = x / rms(x) * weight
void fm_rms_norm(fm_context*, const float* x, const float* weight, int64_t tokens, int64_t hidden, float eps, float* h);

// Rows of a matrix, widened to fp32: out [n, K].
void fm_gather_rows(const fm_matrix*, const int64_t* ids, int64_t n, float* out);

// Packing. source [N, K] in FM_BF16, FM_F16 or FM_F32; format FM_INT4 or FM_INT8. importance [K] or null weighs the
// squared error of each column. error[0] += sum of weighted squared errors, error[1] += of weighted squares.
int64_t fm_packed_matrix_bytes(int32_t format, int64_t rows, int64_t columns);
int64_t fm_packed_expert_bytes(int32_t format, int64_t hidden, int64_t width);
void fm_pack_matrix(fm_context*, const fm_matrix* source, int32_t format, const float* importance, uint8_t* out,
                    double* error);
void fm_pack_expert(fm_context*, const fm_matrix* gate, const fm_matrix* up, const fm_matrix* down, int32_t format,
                    const float* importance_in, const float* importance_hidden, uint8_t* out, double* error);
// Tiles of given codes [N, K] (int4: -8 to 7, int8: -127 to 127) and scales, fp16 [N, ceil(K / 32)]; those of an expert are
// three pointers each: gate, up, down.
void fm_lay_out_matrix(fm_context*, int32_t format, int64_t rows, int64_t columns, const int8_t* codes,
                       const uint16_t* scales, uint8_t* out);
void fm_lay_out_expert(fm_context*, int32_t format, int64_t hidden, int64_t width, const int8_t* const* codes,
                       const uint16_t* const* scales, uint8_t* out);
// A packed matrix, or a packed expert's three, widened to fp32 rows.
void fm_unpack_matrix(const fm_matrix* packed, float* out);
void fm_unpack_expert(int32_t format, int64_t hidden, int64_t width, const uint8_t* packed, float* gate, float* up,
                      float* down);
}
