// The learned policy's inner part: predicted distances to the next use, the choice of victims, and the shadow of
// a simple policy that takes over while it misses less.
#pragma once

#include <cstdint>
#include <vector>

#include "routing_history.h"

namespace flashmoe {

// A boosted ensemble of binary trees. A child below 0 is the leaf ~child.
struct Trees {
  struct Node {
    float threshold;
    int32_t left, right;
    int16_t feature;
    bool unknown_left;  // where a NaN goes
  };
  std::vector<int32_t> roots;
  std::vector<Node> nodes;
  std::vector<float> leaves;

  float predict(const float* features) const;
};

struct Cache {
  int capacity;
  bool per_layer;
};

// A cache in ids alone that some rule of eviction would have filled, to count its misses.
class ShadowCache {
 public:
  ShadowCache(Shape shape, Cache cache);
  // Serve an event; `worst(candidates)` -> position of the one to evict. Returns the misses.
  template <class Worst>
  int serve(int layer, const int* routed, int n, Worst&& worst);
  const std::vector<int>& residents(int layer) const { return pools_[per_layer_ ? layer : 0]; }

 private:
  Shape shape_;
  int capacity_;
  bool per_layer_;
  std::vector<std::vector<int>> pools_;  // of layer * experts + expert
  std::vector<uint8_t> resident_;
  std::vector<int> candidates_;
};

class LearnedCore {
 public:
  LearnedCore(Shape shape, Cache cache, Trees trees);

  void step(int layer, const int* routed, int n, const float* weights, const float* scores, int token);
  void inserted(int expert);  // layer * experts + expert
  void left(int expert);
  // Residents, or the given ones, worst first; ties in order of their number. All of them, if count is below 0.
  std::vector<int> worst(int count);
  void rank(std::vector<int>& experts);
  // [kFeatures] of one expert as of now.
  void features(int layer, int expert, float* out);
  void set_trees(Trees trees);

  bool stepped_back() const { return stepped_back_; }
  int64_t step_backs() const { return step_backs_; }
  int64_t tokens_stepped_back() const { return tokens_stepped_back_; }
  int64_t learned_misses() const { return learned_misses_; }
  int64_t simple_misses() const { return simple_misses_; }
  const RoutingHistory& history() const { return history_; }

 private:
  float badness(int expert);         // the larger, the sooner it goes
  float simple_badness(int expert) const;
  float learned_badness(int expert);
  void compare_shadows(int layer, const int* routed, int n);

  RoutingHistory history_;
  Cache cache_;
  float slots_;
  Trees trees_;
  std::vector<float> distance_;    // predicted log2 of own-layer events to the next use, as of `scored_`
  std::vector<int> scored_;        // the layer's event number that it was predicted at
  std::vector<int> residents_;
  std::vector<int> position_;      // in residents_, -1: not resident
  std::vector<float> row_;
  int layer_ = 0;
  bool matched_ = false;
  ShadowCache learned_shadow_, simple_shadow_;
  float learned_recent_ = 0, simple_recent_ = 0;  // misses, decayed
  int64_t tokens_ = 0, learned_misses_ = 0, simple_misses_ = 0, step_backs_ = 0, tokens_stepped_back_ = 0;
  bool stepped_back_ = false;
};

}  // namespace flashmoe
