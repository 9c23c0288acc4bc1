// What a run's routing says about when each expert will be needed again: counts, gaps, transitions, and the
// tokens of the past whose routing was like the present one's. Shapes: L layers, E experts, K chosen per token.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace flashmoe {

struct Shape {
  int layers, experts, top_k;
};

// Half-lives of the decayed use counts, in events of the expert's own layer.
constexpr int kHalfLives[] = {2, 6, 16, 32, 128, 640};
constexpr int kRates = 6;
constexpr int kSlow = 3;  // the half-life of the slow weight
constexpr int kHistory = 2048;  // tokens remembered
constexpr int kMatches = 24;    // past tokens that vote
constexpr int kAhead = 16;      // how far behind a match its votes reach, in tokens

// The names of the features, in the order of `RoutingHistory::features`. A trained model is bound to them.
extern const char* const kFeatureNames[];
extern const int kFeatures;

class RoutingHistory {
 public:
  explicit RoutingHistory(Shape shape);

  // One event. `weights` [n] and `scores` [E] may be null; token -1 is not known.
  void step(int layer, const int* routed, int n, const float* weights, const float* scores, int token);

  // Find the past tokens most like the present one, seen from `layer`. Call before `features`.
  void find_matches();
  // [kFeatures] of one expert; NaN stands for "not known". `slots`: those of a layer, on average.
  void features(int layer, int expert, float slots, float* out);

  Shape shape() const { return shape_; }
  int events(int layer) const { return events_[layer]; }
  // Whether the layer's last event was the newest token's: not so inside a prefill chunk, which goes layer by layer.
  bool at_newest_token(int layer) const { return events_[layer] == tokens_; }
  static int64_t bytes(Shape shape);

 private:
  struct Expert {
    int last = 0, gap = -1, gap_before = -1, uses = 0;  // `last`: the layer's event that used it last, from 1
    float rates[kRates] = {};                           // as of `last`
    float weight_fast = 0, weight_slow = 0, last_weight = 0;
    float score, score_fast, score_slow;
  };
  struct Match {
    int place;
    float weight;
  };
  // The votes of all matches on one expert: used within 1, 2, 4, 16 tokens behind them, and how far on average.
  struct Votes {
    float within[4], distance;
  };

  size_t index(int layer, int expert) const { return size_t(layer) * shape_.experts + expert; }
  float decay(int half_life, int age) const { return decays_[half_life][age < kDecays ? age : kDecays - 1]; }
  float rate(const Expert& e, int layer, int half_life) const;
  void begin_token(int token);
  void count_transitions(int layer, const int* routed, int n);
  void compare(int layer);
  void count_votes(int layer);

  static constexpr int kDecays = 4096;
  Shape shape_;
  int words_;  // 64-bit words of a routed set
  std::vector<Expert> experts_;               // [L, E]
  std::vector<int> events_;                   // [L]
  std::vector<float> decays_[kRates];         // [kDecays]
  std::vector<std::vector<int>> routed_;      // [L]: the last event's set
  std::vector<uint16_t> transitions_;         // [L, E, E]: uses of the second one event after the first
  std::vector<uint16_t> transitions_from_;    // [L, E]
  int last_layer_ = 0;
  // The past, a ring of kHistory tokens.
  int tokens_ = 0;  // seen so far; a token's place is its number modulo kHistory
  std::vector<uint64_t> sets_;                    // [L, kHistory, words]
  std::vector<int> token_ids_;                    // [kHistory]
  std::vector<float> alike_, alike_recent_, context_;  // [kHistory], see compare()
  std::vector<float> likeness_;  // [kHistory]
  std::vector<std::pair<float, int>> ranked_;
  std::vector<Match> matches_;
  std::vector<Votes> on_;  // [E], of the layer `voted_`
  int voted_ = -1;
  float best_alike_ = 0, votes_ = 0;
};

}  // namespace flashmoe
