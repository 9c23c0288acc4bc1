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
constexpr float kHeatKept = 0.97857206f;  // half after 32 events, as in cache_policies/lfu_aged.py

}  // namespace

Trees::Trees(const std::vector<int32_t>& roots, const std::vector<Node>& nodes, const std::vector<float>& leaves) {
  const int32_t first_leaf = int32_t(nodes.size());
  const auto place = [&](int32_t child) { return child >= 0 ? child : first_leaf + ~child; };
  for (const Node& node : nodes)
    steps_.push_back({node.threshold, node.feature, node.unknown_left, {place(node.right), place(node.left)}, 0});
  for (size_t i = 0; i < leaves.size(); i++) {
    const int32_t self = first_leaf + int32_t(i);
    steps_.push_back({0, 0, 0, {self, self}, leaves[i]});
  }
  // A child lies behind its parent, so the depths below are known when a node's turn comes.
  std::vector<int> depth(steps_.size(), 0);
  for (int32_t i = first_leaf - 1; i >= 0; i--)
    depth[i] = 1 + std::max(depth[steps_[i].child[0]], depth[steps_[i].child[1]]);
  for (int32_t root : roots) trees_.push_back({place(root), depth[place(root)]});
}

void Trees::predict(const float* rows, int n, float* out) const {
  constexpr int kLanes = 8;
  for (int begin = 0; begin < n; begin += kLanes) {
    const int lanes = std::min(kLanes, n - begin);
    const float* row[kLanes];
    float sum[kLanes] = {};
    for (int i = 0; i < kLanes; i++) row[i] = rows + size_t(begin + std::min(i, lanes - 1)) * kFeatures;
    for (const Tree& tree : trees_) {
      int32_t at[kLanes];
      for (int i = 0; i < kLanes; i++) at[i] = tree.root;
      for (int d = 0; d < tree.depth; d++) {
        for (int i = 0; i < kLanes; i++) {
          const Step& step = steps_[at[i]];
          const float x = row[i][step.feature];
          at[i] = step.child[int(x <= step.threshold) | (int(x != x) & step.unknown)];
        }
      }
      for (int i = 0; i < kLanes; i++) sum[i] += steps_[at[i]].leaf;
    }
    std::copy_n(sum, lanes, out + begin);
  }
}

ShadowCache::ShadowCache(Shape shape, Cache cache)
    : shape_(shape),
      capacity_(cache.capacity),
      per_layer_(cache.per_layer),
      pools_(cache.per_layer ? shape.layers : 1),
      resident_(size_t(shape.layers) * shape.experts, 0) {}

template <class Prepare, class Badness>
int ShadowCache::serve(int layer, const int* routed, int n, Prepare&& prepare, Badness&& badness) {
  std::vector<int>& pool = pools_[per_layer_ ? layer : 0];
  int misses = 0;
  for (int j = 0; j < n; j++) misses += !resident_[size_t(layer) * shape_.experts + routed[j]];
  int surplus = int(pool.size()) + misses - capacity_;
  if (surplus > 0) {
    prepare(pool);
    for (int j = 0; j < n; j++) resident_[size_t(layer) * shape_.experts + routed[j]] |= 2;  // may not go
    while (surplus-- > 0) {
      int victim = -1;
      float most = 0;
      for (int i = 0; i < int(pool.size()); i++) {
        if (resident_[pool[i]] & 2) continue;
        const float bad = badness(pool[i]);
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
      layer_of_(size_t(shape.layers) * shape.experts),
      distance_(size_t(shape.layers) * shape.experts, 0),
      scored_(size_t(shape.layers) * shape.experts, -1),
      heat_(size_t(shape.layers) * shape.experts, 0),
      ahead_(shape.layers, 0),
      position_(size_t(shape.layers) * shape.experts, -1),
      learned_shadow_(shape, cache),
      simple_shadow_(shape, cache) {
  for (size_t expert = 0; expert < layer_of_.size(); expert++) layer_of_[expert] = int(expert) / shape.experts;
}

void LearnedCore::step(int layer, const int* routed, int n, const float* weights, const float* scores, int token) {
  history_.step(layer, routed, n, weights, scores, token);
  matched_ = false;
  const Shape shape = history_.shape();
  for (int l = 0; l < shape.layers; l++) ahead_[l] = l > layer ? l - layer : l - layer + shape.layers;
  float* heat = &heat_[size_t(layer) * shape.experts];
  for (int e = 0; e < shape.experts; e++) heat[e] *= kHeatKept;
  for (int j = 0; j < n; j++) heat[routed[j]] += 1;
  // Inside a prefill chunk the same layer comes again and again, and no cache is filled token by token.
  const bool in_chunk = layer == last_layer_ && shape.layers > 1;
  last_layer_ = layer;
  if (!in_chunk && history_.at_newest_token(layer)) compare_shadows(layer, routed, n);
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
  if (!stepped_back_) predict(residents_);
  keyed_.clear();
  for (int expert : residents_) keyed_.emplace_back(-badness(expert), expert);
  const size_t n = count < 0 ? keyed_.size() : std::min(keyed_.size(), size_t(count));
  std::partial_sort(keyed_.begin(), keyed_.begin() + n, keyed_.end());
  std::vector<int> ranked;
  for (size_t i = 0; i < n; i++) ranked.push_back(keyed_[i].second);
  return ranked;
}

void LearnedCore::rank(std::vector<int>& experts) {
  if (!stepped_back_) predict(experts);
  keyed_.clear();
  for (int expert : experts) keyed_.emplace_back(-badness(expert), expert);
  std::sort(keyed_.begin(), keyed_.end());
  for (size_t i = 0; i < keyed_.size(); i++) experts[i] = keyed_[i].second;
}

void LearnedCore::features(int layer, int expert, float* out) {
  if (!matched_) {
    history_.find_matches();
    matched_ = true;
  }
  history_.features(layer, expert, slots_, out);
}

// The prediction is in events of the expert's own layer. Where layers share the slots it is turned into events of
// all layers, and layers ahead in this pass through the model come sooner than those behind.
float LearnedCore::learned_badness(int expert) const {
  return cache_.per_layer ? distance_[expert] : distance_[expert] + ahead_[layer_of_[expert]];
}

void LearnedCore::predict(const std::vector<int>& experts) {
  stale_.clear();
  for (int expert : experts)
    if (scored_[expert] != history_.events(layer_of_[expert])) stale_.push_back(expert);
  if (stale_.empty()) return;
  const Shape shape = history_.shape();
  rows_.resize(stale_.size() * kFeatures);
  predicted_.resize(stale_.size());
  for (size_t i = 0; i < stale_.size(); i++) {
    const int layer = layer_of_[stale_[i]];
    features(layer, stale_[i] - layer * shape.experts, &rows_[i * kFeatures]);
  }
  trees_.predict(rows_.data(), int(stale_.size()), predicted_.data());
  for (size_t i = 0; i < stale_.size(); i++) {
    const float events = std::exp2(predicted_[i]);
    distance_[stale_[i]] = cache_.per_layer ? events : (events - 1) * shape.layers;
    scored_[stale_[i]] = history_.events(layer_of_[stale_[i]]);
  }
}

void LearnedCore::compare_shadows(int layer, const int* routed, int n) {
  const auto prepare = [this](const std::vector<int>& pool) { predict(pool); };
  const int learned =
      learned_shadow_.serve(layer, routed, n, prepare, [this](int e) { return learned_badness(e); });
  const int simple = simple_shadow_.serve(layer, routed, n, [](const std::vector<int>&) {},
                                          [this](int e) { return simple_badness(e); });
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
