// What surrounds the matrices when one token is decoded: norms, rotary embedding, attention over the KV cache, the
// router. Prefill does these with torch (flashmoe/layers.py), in the same order of operations but not the same bits.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "context.h"

using namespace flashmoe;

namespace {

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

void norm_heads(const Isa& isa, float* x, int64_t heads, int64_t d, const float* weight, int32_t kind, float eps) {
  if (kind == 2) return rms_norm(isa, x, weight, heads * d, eps, x);
  for (int64_t h = 0; h < heads; h++) rms_norm(isa, x + h * d, weight, d, eps, x + h * d);
}

}  // namespace

void fm_rms_norm(fm_context* c, const float* x, const float* weight, int64_t hidden, float eps, float* h) {
  Busy busy(c);
  rms_norm(c->isa, x, weight, hidden, eps, h);
}

void fm_attend(fm_context* c, const fm_attention* a, const float* cos, const float* sin, int64_t position, float* x) {
  const int64_t d = a->head_dim, queries = a->heads * d, keys = a->kv_heads * d;
  float* qkv = c->attention.fit<float>(queries + 2 * keys + queries);
  float *q = qkv, *k = q + queries, *v = k + keys, *y = v + keys;
  float* normed = c->normed.fit<float>(a->hidden);
  fm_rms_norm(c, x, a->input_norm, a->hidden, a->eps, normed);
  fm_linear(c, &a->qkv, a->qkv_bias, normed, 1, a->exact, qkv, queries + 2 * keys);
  {
    Busy busy(c);
    if (a->qk_norm == 2) {
      norm_heads(c->isa, q, a->heads, d, a->q_norm, 2, a->eps);
      norm_heads(c->isa, k, a->kv_heads, d, a->k_norm, 2, a->eps);
    }
    if (a->clip > 0.f)
      for (int64_t i = 0; i < queries + 2 * keys; i++)
        qkv[i] = qkv[i] > a->clip ? a->clip : qkv[i] < -a->clip ? -a->clip : qkv[i];
    if (a->qk_norm == 1) {
      norm_heads(c->isa, q, a->heads, d, a->q_norm, 1, a->eps);
      norm_heads(c->isa, k, a->kv_heads, d, a->k_norm, 1, a->eps);
    }
    for (int64_t h = 0; h < a->heads; h++) rotate(q + h * d, cos, sin, d);
    for (int64_t h = 0; h < a->kv_heads; h++) rotate(k + h * d, cos, sin, d);
    std::memcpy(a->keys + position * keys, k, sizeof(float) * keys);
    std::memcpy(a->values + position * keys, v, sizeof(float) * keys);

    const int64_t first = a->window > 0 ? std::max<int64_t>(0, position + 1 - a->window) : 0;
    const int64_t seen = position + 1 - first;
    const float scale = 1.f / std::sqrt(float(d));
    float* all_scores = c->scores.fit<float>(a->heads * seen);
    const auto head = [&](int64_t h) {
      const int64_t kv = h / (a->heads / a->kv_heads) * d;
      float *scores = all_scores + h * seen, *out = y + h * d;
      for (int64_t s = 0; s < seen; s++)
        scores[s] = scale * c->isa.dot(q + h * d, a->keys + (first + s) * keys + kv, d);
      const float total = c->isa.exp_shifted(scores, seen);
      std::memset(out, 0, sizeof(float) * d);
      for (int64_t s = 0; s < seen; s++) c->isa.add_scaled(scores[s], a->values + (first + s) * keys + kv, d, out);
      for (int64_t i = 0; i < d; i++) out[i] /= total;
    };
    if (seen < 64)  // some microseconds in all
      for (int64_t h = 0; h < a->heads; h++) head(h);
    else
      c->pool.run(a->heads, head);
  }
  fm_linear(c, &a->o, a->o_bias, y, 1, a->exact, normed, a->hidden);
  for (int64_t i = 0; i < a->hidden; i++) x[i] += normed[i];
}

void fm_route(fm_context* c, const fm_router* r, const float* x, float* h, float* probabilities, int32_t* ids,
              float* weights) {
  fm_rms_norm(c, x, r->norm, r->hidden, r->eps, h);
  const fm_matrix matrix{r->weight, FM_F32, r->experts, r->hidden};
  fm_linear(c, &matrix, nullptr, h, 1, 1, probabilities, r->experts);
  Busy busy(c);
  const float total = c->isa.exp_shifted(probabilities, r->experts);
  for (int32_t e = 0; e < r->experts; e++) probabilities[e] /= total;
  std::vector<int32_t> order(size_t(r->experts));
  for (int32_t e = 0; e < r->experts; e++) order[size_t(e)] = e;
  const auto likelier = [&](int32_t a, int32_t b) {
    return probabilities[a] != probabilities[b] ? probabilities[a] > probabilities[b] : a < b;
  };
  bool finite = true;  // NaN has no order; whoever reads the logits reports it
  for (int32_t e = 0; e < r->experts; e++) finite = finite && probabilities[e] == probabilities[e];
  if (finite) std::partial_sort(order.begin(), order.begin() + r->top_k, order.end(), likelier);
  float sum = 0;
  for (int32_t k = 0; k < r->top_k; k++) {
    ids[k] = order[size_t(k)];
    weights[k] = probabilities[ids[k]];
    sum += weights[k];
  }
  for (int32_t k = 0; r->renormalise != 0 && k < r->top_k; k++) weights[k] /= sum;
}
