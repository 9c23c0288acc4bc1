// What surrounds the matrices of a layer: norms, rotary embedding, attention over the KV cache, the router.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "context.h"

using namespace flashmoe;

namespace {

// Work that is some microseconds in all is not worth waking anybody for.
constexpr int64_t kSmallWork = 1 << 14;  // multiply-adds

template <class Work>
void run_if_large(fm_context* c, int64_t items, int64_t cost_of_item, const Work& work) {
  if (items * cost_of_item > kSmallWork) return c->pool.run(items, work);
  for (int64_t i = 0; i < items; i++) work(i);
}

void rms_norm(const Isa& isa, const float* x, const float* weight, int64_t n, float eps, float* y) {
  const float scale = 1.f / std::sqrt(isa.dot(x, x, n) / float(n) + eps);
  for (int64_t i = 0; i < n; i++) y[i] = x[i] * scale * weight[i];
}

// Halves paired as in Hugging Face checkpoints: x cos + (-x2, x1) sin.
void rotate(float* x, const float* cos, const float* sin, int64_t d) {
  const int64_t half = d / 2;
  for (int64_t i = 0; i < half; i++) {
    const float a = x[i], b = x[i + half];
    x[i] = a * cos[i] - b * sin[i];
    x[i + half] = b * cos[i + half] + a * sin[i + half];
  }
}

// Queries or keys of one token: norms, clipping, rotation, in the order of the families that have them.
void prepare_heads(const Isa& isa, const fm_attention& a, float* x, int64_t heads, const float* norm, const float* cos,
                   const float* sin) {
  const int64_t d = a.head_dim;
  if (a.qk_norm == 2) rms_norm(isa, x, norm, heads * d, a.eps, x);
  if (a.clip > 0.f)
    for (int64_t i = 0; i < heads * d; i++) x[i] = x[i] > a.clip ? a.clip : x[i] < -a.clip ? -a.clip : x[i];
  for (int64_t h = 0; h < heads; h++) {
    if (a.qk_norm == 1) rms_norm(isa, x + h * d, norm, d, a.eps, x + h * d);
    rotate(x + h * d, cos, sin, d);
  }
}

// Keys or values of one sequence.
float* within(const fm_sequence& sequence, const float* offset) {
  return reinterpret_cast<float*>(uintptr_t(sequence.memory) + reinterpret_cast<uintptr_t>(offset));
}

// `count` queries of one head, the first at `position`, against the keys and values that each of them sees.
// q, y: the first query's head; token_step floats from token to token. scores: count x (seen by any of them).
void attend_block(const Isa& isa, const fm_attention& a, const fm_sequence& of, int64_t head, int64_t position,
                  int count, const float* q, int64_t q_step, float* scores, float* y, int64_t y_step) {
  const int64_t d = a.head_dim, row = int64_t(a.kv_heads) * d, kv = head / (a.heads / a.kv_heads) * d;
  const auto first_seen = [&](int m) { return a.window > 0 ? std::max<int64_t>(0, position + m + 1 - a.window) : 0; };
  const int64_t begin = first_seen(0), seen = position + count - begin, padded = round_up(d, 16);
  const float scale = 1.f / std::sqrt(float(d));

  std::vector<float> queries(size_t(count * padded));
  for (int m = 0; m < count; m++)
    for (int64_t i = 0; i < d; i++) queries[size_t(m * padded + i)] = q[m * q_step + i] * scale;
  const auto* keys = reinterpret_cast<const uint8_t*>(within(of, a.keys) + begin * row + kv);
  const int64_t row_bytes = row * int64_t(sizeof(float));
  int64_t s = 0;
  for (; s + isa.rows <= seen; s += isa.rows)
    isa.many_rows[2][count](keys + s * row_bytes, row_bytes, d, queries.data(), padded, scores + s, seen);
  for (; s < seen; s++)
    isa.one_row[2][count](keys + s * row_bytes, row_bytes, d, queries.data(), padded, scores + s, seen);

  float total[kMaxTokens];
  for (int m = 0; m < count; m++) {
    float* of_query = scores + m * seen;
    const int64_t from = first_seen(m) - begin, to = position + m + 1 - begin;
    std::fill(of_query, of_query + from, 0.f);
    std::fill(of_query + to, of_query + seen, 0.f);
    total[m] = isa.exp_shifted(of_query + from, to - from);
  }
  isa.mix_rows[count](scores, seen, within(of, a.values) + begin * row + kv, row, seen, d, y, y_step);
  for (int m = 0; m < count; m++)
    for (int64_t i = 0; i < d; i++) y[m * y_step + i] /= total[m];
}

}  // namespace

void fm_rms_norm(fm_context* c, const float* x, const float* weight, int64_t tokens, int64_t hidden, float eps,
                 float* h) {
  Busy busy(c);
  run_if_large(c, tokens, 2 * hidden,
               [&](int64_t t) { rms_norm(c->isa, x + t * hidden, weight, hidden, eps, h + t * hidden); });
}

void fm_attend(fm_context* c, const fm_attention* a, const float* cos, const float* sin, const fm_sequence* sequences,
               int64_t n, float* x) {
  const int64_t d = a->head_dim, hidden = a->hidden, queries = a->heads * d, keys = a->kv_heads * d;
  const int64_t qkv_step = queries + 2 * keys;
  // Queries are taken in blocks, none of two sequences.
  struct QueryBlock {
    const fm_sequence* sequence;
    int64_t first, position;  // its row of x, its place in the sequence
    int count;
  };
  std::vector<QueryBlock> blocks;
  int64_t tokens = 0, most_work = 0;
  for (const fm_sequence* s = sequences; s < sequences + n; tokens += s->tokens, s++)
    for (int64_t t = 0; t < s->tokens; t += c->isa.row_tokens) {
      const int count = int(std::min<int64_t>(c->isa.row_tokens, s->tokens - t));
      blocks.push_back({s, tokens + t, s->position + t, count});
      most_work = std::max(most_work, count * (s->position + t + count) * d);
    }
  float* qkv = c->attention.fit<float>(tokens * (qkv_step + queries));
  float* y = qkv + tokens * qkv_step;
  float* normed = c->normed.fit<float>(tokens * hidden);
  fm_rms_norm(c, x, a->input_norm, tokens, hidden, a->eps, normed);
  fm_linear(c, &a->qkv, a->qkv_bias, normed, tokens, a->exact, qkv, qkv_step);
  {
    Busy busy(c);
    const int64_t most_tokens = std::min<int64_t>(tokens, c->isa.row_tokens);
    run_if_large(c, int64_t(blocks.size()), 8 * qkv_step * most_tokens, [&](int64_t i) {
      const QueryBlock& block = blocks[size_t(i)];
      for (int64_t t = block.first, at = block.position; t < block.first + block.count; t++, at++) {
        float *q = qkv + t * qkv_step, *k = q + queries, *v = k + keys;
        prepare_heads(c->isa, *a, q, a->heads, a->q_norm, cos + at * d, sin + at * d);
        prepare_heads(c->isa, *a, k, a->kv_heads, a->k_norm, cos + at * d, sin + at * d);
        for (int64_t j = 0; a->clip > 0.f && j < keys; j++)
          v[j] = v[j] > a->clip ? a->clip : v[j] < -a->clip ? -a->clip : v[j];
        std::memcpy(within(*block.sequence, a->keys) + at * keys, k, sizeof(float) * keys);
        std::memcpy(within(*block.sequence, a->values) + at * keys, v, sizeof(float) * keys);
      }
    });
    run_if_large(c, a->heads * int64_t(blocks.size()), most_work, [&](int64_t item) {
      const int64_t head = item % a->heads;
      const QueryBlock& block = blocks[size_t(item / a->heads)];
      std::vector<float> scores(size_t(block.count * (block.position + block.count)));
      attend_block(c->isa, *a, *block.sequence, head, block.position, block.count,
                   qkv + block.first * qkv_step + head * d, qkv_step, scores.data(),
                   y + block.first * queries + head * d, queries);
    });
  }
  fm_linear(c, &a->o, a->o_bias, y, tokens, a->exact, normed, hidden);
  Busy busy(c);
  run_if_large(c, tokens, hidden, [&](int64_t t) {
    c->isa.add_scaled(1.f, normed + t * hidden, hidden, x + t * hidden);
  });
}

void fm_route(fm_context* c, const fm_router* r, const float* x, int64_t tokens, float* h, float* probabilities,
              int32_t* ids, float* weights) {
  fm_rms_norm(c, x, r->norm, tokens, r->hidden, r->eps, h);
  const fm_matrix matrix{r->weight, FM_F32, r->experts, r->hidden};
  fm_linear(c, &matrix, nullptr, h, tokens, 1, probabilities, r->experts);
  Busy busy(c);
  const int64_t experts = r->experts, top_k = r->top_k;
  run_if_large(c, tokens, 32 * experts, [&](int64_t t) {
    float *p = probabilities + t * experts, *w = weights + t * top_k;
    int32_t* chosen = ids + t * top_k;
    const float total = c->isa.exp_shifted(p, experts);
    for (int64_t e = 0; e < experts; e++) p[e] /= total;
    const auto likelier = [p](int32_t a, int32_t b) { return p[a] != p[b] ? p[a] > p[b] : a < b; };
    std::vector<int32_t> order(size_t(experts), 0);
    bool finite = true;  // NaN has no order; whoever reads the logits reports it
    for (int64_t e = 0; e < experts; e++) order[size_t(e)] = int32_t(e), finite = finite && p[e] == p[e];
    if (finite) std::partial_sort(order.begin(), order.begin() + top_k, order.end(), likelier);
    float sum = 0;
    for (int64_t k = 0; k < top_k; k++) {
      chosen[k] = order[size_t(k)];
      w[k] = p[chosen[k]];
      sum += w[k];
    }
    for (int64_t k = 0; r->renormalise != 0 && k < top_k; k++) w[k] /= sum;
  });
}
