#include "learned_core.h"

#include <algorithm>
#include <cmath>

namespace flashmoe {

namespace {

// The learned rule steps back when over the last few hundred tokens it missed 2 % more than the simple one, and
// comes back when it would have missed less.
constexpr float kForget = 0.9946f;  // a token's misses count half after 128 tokens
constexpr int kFirstVerdict = 64;   // tokens
constexpr float kWorse = 1.02f;

}  // namespace

float Trees::predict(const float* features) const {
  float sum = 0;
  for (int32_t at : roots) {
    while (at >= 0) {
      const Node& node = nodes[at];
      const float x = features[node.feature];
      at = (std::isnan(x) ? node.unknown_left : x <= node.threshold) ? node.left : node.right;
    }
    sum += leaves[~at];
  }
  return sum;
}

ShadowCache::ShadowCache(Shape shape, Cache cache)
    : shape_(shape),
      capacity_(cache.capacity),
      per_layer_(cache.per_layer),
      pools_(cache.per_layer ? shape.layers : 1),
      resident_(size_t(shape.layers) * shape.experts, 0) {}

template <class Worst>
int ShadowCache::serve(int layer, const int* routed, int n, Worst&& worst) {
  std::vector<int>& pool = pools_[per_layer_ ? layer : 0];
  int misses = 0;
  for (int j = 0; j < n; j++) misses += !resident_[size_t(layer) * shape_.experts + routed[j]];
  int surplus = int(pool.size()) + misses - capacity_;
  if (surplus > 0) {
    for (int j = 0; j < n; j++) resident_[size_t(layer) * shape_.experts + routed[j]] |= 2;  // may not go
    while (surplus-- > 0) {
      int victim = -1;
      float most = 0;
      for (int i = 0; i < int(pool.size()); i++) {
        if (resident_[pool[i]] & 2) continue;
        const float bad = worst(pool[i]);
        if (victim < 0 || bad > most || (bad == most && pool[i] < pool[victim])) victim = i, most = bad;
      }
      if (victim < 0) break;
      resident_[pool[victim]] = 0;
      pool[victim] = pool.back();
      pool.pop_back();
    }
    for (int j = 0; j < n; j++) resident_[size_t(layer) * shape_.experts + routed[j]] &= 1;
  }
  for (int j = 0; j < n; j++) {
    const int expert = layer * shape_.experts + routed[j];
    if (!resident_[expert]) {
      resident_[expert] = 1;
      pool.push_back(expert);
    }
  }
  return misses;
}

LearnedCore::LearnedCore(Shape shape, Cache cache, Trees trees)
    : history_(shape),
      cache_(cache),
      slots_(cache.per_layer ? float(cache.capacity) : float(cache.capacity) / shape.layers),
      trees_(std::move(trees)),
      distance_(size_t(shape.layers) * shape.experts, 0),
      scored_(size_t(shape.layers) * shape.experts, -1),
      position_(size_t(shape.layers) * shape.experts, -1),
      row_(kFeatures),
      learned_shadow_(shape, cache),
      simple_shadow_(shape, cache) {}

void LearnedCore::step(int layer, const int* routed, int n, const float* weights, const float* scores, int token) {
  history_.step(layer, routed, n, weights, scores, token);
  layer_ = layer;
  matched_ = false;
  if (history_.at_newest_token(layer)) compare_shadows(layer, routed, n);
}

void LearnedCore::inserted(int expert) {
  if (position_[expert] >= 0) return;
  position_[expert] = int(residents_.size());
  residents_.push_back(expert);
}

void LearnedCore::left(int expert) {
  const int at = position_[expert];
  if (at < 0) return;
  residents_[at] = residents_.back();
  position_[residents_[at]] = at;
  residents_.pop_back();
  position_[expert] = -1;
}

std::vector<int> LearnedCore::worst(int count) {
  std::vector<int> ranked = residents_;
  rank(ranked);
  if (count >= 0 && count < int(ranked.size())) ranked.resize(count);
  return ranked;
}

void LearnedCore::rank(std::vector<int>& experts) {
  std::vector<std::pair<float, int>> keyed;
  keyed.reserve(experts.size());
  for (int expert : experts) keyed.emplace_back(-badness(expert), expert);
  std::sort(keyed.begin(), keyed.end());
  for (size_t i = 0; i < keyed.size(); i++) experts[i] = keyed[i].second;
}

void LearnedCore::features(int layer, int expert, float* out) {
  if (!matched_) {
    history_.find_matches();
    matched_ = true;
  }
  history_.features(layer, expert, slots_, out);
}

void LearnedCore::set_trees(Trees trees) {
  trees_ = std::move(trees);
  std::fill(scored_.begin(), scored_.end(), -1);
}

float LearnedCore::badness(int expert) { return stepped_back_ ? simple_badness(expert) : learned_badness(expert); }

// LFU with ageing (cache_policies/lfu_aged.py).
float LearnedCore::simple_badness(int expert) const {
  const int experts = history_.shape().experts;
  return -history_.aged_count(expert / experts, expert % experts);
}

// Events of all layers until the next use: the prediction is in events of the expert's own layer, and layers ahead
// in this pass through the model come sooner than those behind.
float LearnedCore::learned_badness(int expert) {
  const Shape shape = history_.shape();
  const int layer = expert / shape.experts;
  if (scored_[expert] != history_.events(layer)) {
    features(layer, expert % shape.experts, row_.data());
    distance_[expert] = std::exp2(trees_.predict(row_.data()));
    scored_[expert] = history_.events(layer);
  }
  if (cache_.per_layer) return distance_[expert];
  const int ahead = layer > layer_ ? layer - layer_ : layer - layer_ + shape.layers;
  return (distance_[expert] - 1) * shape.layers + ahead;
}

void LearnedCore::compare_shadows(int layer, const int* routed, int n) {
  const int learned = learned_shadow_.serve(layer, routed, n, [this](int e) { return learned_badness(e); });
  const int simple = simple_shadow_.serve(layer, routed, n, [this](int e) { return simple_badness(e); });
  learned_misses_ += learned;
  simple_misses_ += simple;
  learned_recent_ += float(learned);
  simple_recent_ += float(simple);
  if (layer != history_.shape().layers - 1) return;
  tokens_++;
  tokens_stepped_back_ += stepped_back_;
  if (tokens_ >= kFirstVerdict) {
    if (!stepped_back_ && learned_recent_ > kWorse * simple_recent_) {
      stepped_back_ = true;
      step_backs_++;
    } else if (stepped_back_ && learned_recent_ < simple_recent_) {
      stepped_back_ = false;
    }
  }
  learned_recent_ *= kForget;
  simple_recent_ *= kForget;
}

}  // namespace flashmoe
