// The learned policy's inner part: predicted distances to the next use, the choice of victims, and the shadow of
// a simple policy that takes over while it misses less.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "routing_history.h"

namespace flashmoe {

// A boosted ensemble of binary trees. A child below 0 is the leaf ~child.
class Trees {
 public:
  struct Node {
    float threshold;
    int32_t left, right;
    int16_t feature;
    bool unknown_left;  // where a NaN goes
  };
  Trees(const std::vector<int32_t>& roots, const std::vector<Node>& nodes, const std::vector<float>& leaves);

  // rows [n, kFeatures] -> out [n]. Several rows go down a tree side by side and without branches: their steps
  // overlap, where one row alone waits for memory and mispredicted branches at each.
  void predict(const float* rows, int n, float* out) const;

 private:
  // `child[1]` is taken where the comparison holds. A leaf is its own child and asks nothing.
  struct Step {
    float threshold;
    int16_t feature;
    int16_t unknown;  // the comparison's outcome for a NaN
    int32_t child[2];
    float leaf;
  };
  struct Tree {
    int32_t root;
    int depth;
  };
  std::vector<Step> steps_;
  std::vector<Tree> trees_;
};

struct Cache {
  int capacity;
  bool per_layer;
};

// A cache in ids alone that some rule of eviction would have filled, to count its misses.
class ShadowCache {
 public:
  ShadowCache(Shape shape, Cache cache);
  // Serve an event -> its misses. `prepare(residents)` comes before `badness(expert)` is asked; the worst one goes,
  // the lowest number among equals.
  template <class Prepare, class Badness>
  int serve(int layer, const int* routed, int n, Prepare&& prepare, Badness&& badness);

 private:
  Shape shape_;
  int capacity_;
  bool per_layer_;
  std::vector<std::vector<int>> pools_;  // of layer * experts + expert
  std::vector<uint8_t> resident_;
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

  bool stepped_back() const { return stepped_back_; }
  int64_t step_backs() const { return step_backs_; }
  int64_t tokens_stepped_back() const { return tokens_stepped_back_; }
  int64_t learned_misses() const { return learned_misses_; }
  int64_t simple_misses() const { return simple_misses_; }
  const RoutingHistory& history() const { return history_; }

 private:
  // The larger, the sooner it goes.
  float badness(int expert) { return stepped_back_ ? simple_badness(expert) : learned_badness(expert); }
  float simple_badness(int expert) const { return -heat_[expert]; }
  float learned_badness(int expert) const;
  void predict(const std::vector<int>& experts);  // those of them whose layer has had an event since
  void compare_shadows(int layer, const int* routed, int n);

  RoutingHistory history_;
  Cache cache_;
  float slots_;
  Trees trees_;
  std::vector<int> layer_of_;      // [L * E]
  std::vector<float> distance_;    // predicted events to the next use, of all layers where they share the slots
  std::vector<int> scored_;        // the layer's event number that it was predicted at
  std::vector<float> heat_;        // use counts that decay with every event of the layer: LFU with ageing
  std::vector<int> ahead_;         // [L]: layers from the present one to that, round and round
  std::vector<int> residents_;
  std::vector<int> position_;      // in residents_, -1: not resident
  std::vector<int> stale_;
  std::vector<float> rows_, predicted_;
  std::vector<std::pair<float, int>> keyed_;
  bool matched_ = false;
  int last_layer_ = -1;
  ShadowCache learned_shadow_, simple_shadow_;
  float learned_recent_ = 0, simple_recent_ = 0;  // misses, decayed
  int64_t tokens_ = 0, learned_misses_ = 0, simple_misses_ = 0, step_backs_ = 0, tokens_stepped_back_ = 0;
  bool stepped_back_ = false;
};

}  // namespace flashmoe
