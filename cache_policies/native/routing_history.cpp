#include "routing_history.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace flashmoe {

namespace {

constexpr float kUnknown = std::numeric_limits<float>::quiet_NaN();
constexpr float kOut = -1e9f;
// Measured on gpt-oss-20b (docs/log.md): of a similarity, what the token before counts, and what the layer before.
constexpr float kTokenBefore = 0.2f, kLayerBefore = 0.85f;
constexpr float kSameToken = 4.f;  // the same token id counts as much as four common experts
constexpr float kSharpness = 0.4f;
constexpr int kTransitionsMax = 512;

// As a trace stores it, rounded to half precision: a run and its replay must see the same numbers. For 0 <= x < 2^15.
float as_half(float x) {
  if (!(x >= 6.103515625e-5f)) return std::nearbyint(x * 16777216.f) / 16777216.f;  // subnormal there
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  bits = (bits + 0x0fff + (bits >> 13 & 1)) & ~uint32_t(0x1fff);
  std::memcpy(&x, &bits, sizeof(bits));
  return x;
}

// Compiled for several instruction sets, the best one chosen when the module loads.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__)
#define FLASHMOE_CLONES \
  __attribute__((target_clones("arch=icelake-server", "arch=haswell", "default")))
#else
#define FLASHMOE_CLONES
#endif

// How many experts each of n past sets [n, words] has in common with `now`, added to `alike` and `recent`.
FLASHMOE_CLONES
void add_common(const uint64_t* sets, const uint64_t* now, int words, int n, float* alike, float* recent) {
  if (words == 1) {
    const uint64_t present = now[0];
    for (int p = 0; p < n; p++) {
      const float common = float(__builtin_popcountll(sets[p] & present));
      alike[p] += common;
      recent[p] = kLayerBefore * recent[p] + common;
    }
    return;
  }
  for (int p = 0; p < n; p++) {
    int bits = 0;
    for (int w = 0; w < words; w++) bits += __builtin_popcountll(sets[size_t(p) * words + w] & now[w]);
    alike[p] += float(bits);
    recent[p] = kLayerBefore * recent[p] + float(bits);
  }
}

}  // namespace

const char* const kFeatureNames[] = {
    "age", "lfru", "gap", "gap_before", "popularity", "uses",
    "rate_2", "rate_6", "rate_16", "rate_32", "rate_128", "rate_640",
    "weight_6", "weight_32", "last_weight", "score", "score_fast", "score_slow",
    "transition", "transition_max",
    "match_1", "match_2", "match_4", "match_16", "match_distance", "match_likeness", "match_votes",
    "layer", "share", "slots_per_k", "sparsity", "events",
};
const int kFeatures = sizeof(kFeatureNames) / sizeof(kFeatureNames[0]);

RoutingHistory::RoutingHistory(Shape shape)
    : shape_(shape),
      words_((shape.experts + 63) / 64),
      experts_(size_t(shape.layers) * shape.experts),
      events_(shape.layers, 0),
      routed_(shape.layers),
      transitions_(size_t(shape.layers) * shape.experts * shape.experts, 0),
      transitions_from_(size_t(shape.layers) * shape.experts, 0),
      sets_(size_t(shape.layers) * kHistory * words_, 0),
      token_ids_(kHistory, -1),
      alike_(kHistory, 0),
      alike_recent_(kHistory, 0),
      context_(kHistory, 0),
      likeness_(kHistory, 0),
      on_(shape.experts) {
  for (int h = 0; h < kRates; h++) {
    decays_[h].resize(kDecays);
    for (int age = 0; age < kDecays; age++) decays_[h][age] = std::exp2(-float(age) / kHalfLives[h]);
  }
  for (Expert& e : experts_) e.score = e.score_fast = e.score_slow = kUnknown;
  ranked_.reserve(kMatches);
  matches_.reserve(kMatches);
}

int64_t RoutingHistory::bytes(Shape s) {
  const int64_t experts = int64_t(s.layers) * s.experts, words = (s.experts + 63) / 64;
  return experts * int64_t(sizeof(Expert)) + experts * s.experts * 2 + experts * 2 +
         int64_t(s.layers) * kHistory * words * 8 + kHistory * 24 + kRates * kDecays * 4;
}

void RoutingHistory::step(int layer, const int* routed, int n, const float* weights, const float* scores,
                          int token) {
  // A pass that was cut short, by Ctrl-C say, has left the later layers behind. From the next pass on all count the
  // same tokens again; otherwise they would lag, and be compared with nothing, for good.
  if (layer < last_layer_) std::fill(events_.begin(), events_.end(), tokens_);
  last_layer_ = layer;
  const int now = ++events_[layer];
  if (now > tokens_) begin_token(token);
  count_transitions(layer, routed, n);
  uint64_t* set = &sets_[(size_t(layer) * kHistory + (now - 1) % kHistory) * words_];
  for (int j = 0; j < n; j++) {
    set[routed[j] >> 6] |= uint64_t(1) << (routed[j] & 63);
    Expert& e = experts_[index(layer, routed[j])];
    const int age = now - e.last;
    for (int h = 0; h < kRates; h++) e.rates[h] = e.rates[h] * decay(h, age) + 1;
    const float weight = weights ? as_half(weights[j]) * n : 1.f;
    e.weight_fast = e.weight_fast * decay(1, age) + weight;
    e.weight_slow = e.weight_slow * decay(kSlow, age) + weight;
    e.last_weight = weights ? weight : kUnknown;
    e.gap_before = e.gap;
    e.gap = e.uses ? age : -1;
    e.last = now;
    e.uses++;
  }
  if (scores) {
    for (int i = 0; i < shape_.experts; i++) {
      Expert& e = experts_[index(layer, i)];
      const bool first = std::isnan(e.score_fast);
      e.score = as_half(scores[i]);
      e.score_fast = first ? e.score : e.score_fast + 0.2f * (e.score - e.score_fast);
      e.score_slow = first ? e.score : e.score_slow + 0.03f * (e.score - e.score_slow);
    }
  }
  if (at_newest_token(layer)) compare(layer);
}

// Transitions between a layer's consecutive sets; a row is halved before it overflows, which ages it.
void RoutingHistory::count_transitions(int layer, const int* routed, int n) {
  std::vector<int>& before = routed_[layer];
  for (int from : before) {
    uint16_t* row = &transitions_[index(layer, from) * shape_.experts];
    uint16_t& total = transitions_from_[index(layer, from)];
    for (int j = 0; j < n; j++) row[routed[j]]++;
    if (++total > kTransitionsMax) {
      total /= 2;
      for (int e = 0; e < shape_.experts; e++) row[e] /= 2;
    }
  }
  before.assign(routed, routed + n);
}

// A new token takes the oldest place of the ring. `context_` is what the tokens before contribute: the likeness
// that the previous token had to the token before each place.
void RoutingHistory::begin_token(int token) {
  const int place = tokens_ % kHistory;
  const float last = alike_[kHistory - 1];
  for (int p = kHistory - 1; p > 0; p--) context_[p] = kTokenBefore * alike_[p - 1];
  context_[0] = kTokenBefore * last;
  if (token >= 0) {
    for (int p = 0; p < kHistory; p++) context_[p] += token_ids_[p] == token ? kSameToken : 0.f;
  }
  token_ids_[place] = token;
  for (int l = 0; l < shape_.layers; l++) {
    std::fill_n(&sets_[(size_t(l) * kHistory + place) * words_], words_, 0);
  }
  // Likeness below any that counts is zero, not ever smaller: denormal numbers are slow.
  for (float& c : context_) c = c < 1e-3f ? 0.f : c;
  alike_ = context_;
  std::fill(alike_recent_.begin(), alike_recent_.end(), 0.f);
  alike_[place] = 0;
  tokens_++;
}

// How alike each token of the past is to the present one, from the experts both used in the layers so far:
// `alike_` counts all layers alike, `alike_recent_` the last ones more.
void RoutingHistory::compare(int layer) {
  const int present = (tokens_ + kHistory - 1) % kHistory;
  const uint64_t* sets = &sets_[size_t(layer) * kHistory * words_];
  const uint64_t* now = sets + size_t(present) * words_;
  add_common(sets, now, words_, std::min(tokens_, kHistory), alike_.data(), alike_recent_.data());
  alike_[present] = alike_recent_[present] = 0;
}

void RoutingHistory::find_matches() {
  const int n = std::min(tokens_, kHistory), present = (tokens_ + kHistory - 1) % kHistory;
  matches_.clear();
  voted_ = -1;
  best_alike_ = votes_ = 0;
  constexpr int kLanes = 16;  // so many running maxima, for a single one waits for itself
  float best_of[kLanes] = {};
  for (int p = 0; p < kHistory; p++) likeness_[p] = alike_recent_[p] + context_[p];
  likeness_[present] = kOut;
  for (int p = 0; p < kHistory; p += kLanes)
    for (int i = 0; i < kLanes; i++) best_of[i] = best_of[i] < likeness_[p + i] ? likeness_[p + i] : best_of[i];
  const float best = *std::max_element(best_of, best_of + kLanes);
  if (best <= 0) return;
  const float least = std::max(1e-3f, best - 5 / kSharpness);
  ranked_.clear();  // a heap of the best so far, the least of them in front
  for (int p = 0; p < n; p++) {
    if (likeness_[p] < least) continue;
    const std::pair<float, int> match(-likeness_[p], p);
    if (ranked_.size() == kMatches) {
      if (match > ranked_.front()) continue;
      std::pop_heap(ranked_.begin(), ranked_.end());
      ranked_.pop_back();
    }
    ranked_.push_back(match);
    std::push_heap(ranked_.begin(), ranked_.end());
  }
  std::sort_heap(ranked_.begin(), ranked_.end());
  for (const auto& [negative, place] : ranked_) {
    const float weight = std::exp(kSharpness * (-negative - best));
    matches_.push_back({place, weight});
    votes_ += weight;
  }
  best_alike_ = best;
}

float RoutingHistory::rate(const Expert& e, int layer, int half_life) const {
  return e.rates[half_life] * decay(half_life, events_[layer] - e.last);
}

// How soon behind each match its experts were used; what lies beyond the present is not known and counts as late.
void RoutingHistory::count_votes(int layer) {
  voted_ = layer;
  on_.assign(on_.size(), {{0, 0, 0, 0}, votes_ * (kAhead + 1)});
  const int present = (tokens_ + kHistory - 1) % kHistory;
  const uint64_t* sets = &sets_[size_t(layer) * kHistory * words_];
  for (int w = 0; w < words_; w++) {
    for (const Match& match : matches_) {
      uint64_t seen = 0;
      int place = match.place;
      for (int ahead = 1; ahead <= kAhead && place != present; ahead++) {
        place = place + 1 == kHistory ? 0 : place + 1;
        uint64_t fresh = sets[size_t(place) * words_ + w] & ~seen;
        seen |= fresh;
        for (; fresh; fresh &= fresh - 1) {
          Votes& on = on_[w * 64 + __builtin_ctzll(fresh)];
          if (ahead <= 1) on.within[0] += match.weight;
          if (ahead <= 2) on.within[1] += match.weight;
          if (ahead <= 4) on.within[2] += match.weight;
          on.within[3] += match.weight;
          on.distance -= match.weight * (kAhead + 1 - ahead);
        }
      }
    }
  }
}

// Everything is scaled by how often an average expert is used (K / E), so that a model trained on one
// architecture means something on another.
void RoutingHistory::features(int layer, int expert, float slots, float* out) {
  const Expert& e = experts_[index(layer, expert)];
  const int now = events_[layer];
  const float period = float(shape_.experts) / shape_.top_k;  // events between two uses of an average expert
  const float age = float(now - e.last);
  float* f = out;
  *f++ = std::log2(1 + 4 * age / period);
  *f++ = age / (1 + e.uses);
  *f++ = e.gap >= 0 ? e.gap / period : kUnknown;
  *f++ = e.gap_before >= 0 ? e.gap_before / period : kUnknown;
  *f++ = now ? float(e.uses) / now * period : kUnknown;
  *f++ = std::log2(1.f + e.uses);
  for (int h = 0; h < kRates; h++) {
    const float norm = (1 - decay(h, now)) / (1 - decay(h, 1));
    *f++ = now ? rate(e, layer, h) / norm * period : kUnknown;
  }
  *f++ = e.weight_fast * decay(1, now - e.last);
  *f++ = e.weight_slow * decay(kSlow, now - e.last);
  *f++ = e.uses ? e.last_weight : kUnknown;
  for (float score : {e.score, e.score_fast, e.score_slow}) *f++ = std::log2(score * shape_.experts + 1e-4f);

  float sum = 0, most = 0;
  for (int from : routed_[layer]) {
    const float p = transitions_[index(layer, from) * shape_.experts + expert] /
                    (transitions_from_[index(layer, from)] + 2.f);
    sum += p;
    most = std::max(most, p);
  }
  *f++ = sum / shape_.top_k * period;
  *f++ = most * period;

  if (voted_ != layer) count_votes(layer);
  for (float w : on_[expert].within) *f++ = votes_ > 0 ? w / votes_ : kUnknown;
  *f++ = votes_ > 0 ? on_[expert].distance / votes_ : kUnknown;
  *f++ = best_alike_ / shape_.top_k;
  *f++ = votes_;

  *f++ = float(layer) / shape_.layers;
  *f++ = slots / shape_.experts;
  *f++ = slots / shape_.top_k;
  *f++ = 1 / period;
  *f++ = std::log2(float(std::min(now, 64)) + 1);
}

}  // namespace flashmoe
