// The Python module: lists of small integers in, small integers out; an expert is layer * experts + expert.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cmath>
#include <stdexcept>
#include <string>

#include "learned_core.h"

namespace nb = nanobind;
using namespace nb::literals;
using flashmoe::Cache;
using flashmoe::LearnedCore;
using flashmoe::RoutingHistory;
using flashmoe::Shape;
using flashmoe::Trees;

namespace {

// Everything a file may have got wrong is refused here: an index out of range, a node that leads back up.
Trees make_trees(const std::vector<int>& roots, const std::vector<int>& feature, const std::vector<float>& threshold,
                 const std::vector<int>& left, const std::vector<int>& right, const std::vector<bool>& unknown_left,
                 const std::vector<float>& leaves) {
  const int n = int(feature.size());
  if (threshold.size() != size_t(n) || left.size() != size_t(n) || right.size() != size_t(n) ||
      unknown_left.size() != size_t(n))
    throw std::invalid_argument("the trees' arrays differ in length");
  for (int root : roots)
    if (root < -int(leaves.size()) || root >= n) throw std::invalid_argument("a tree's root is not there");
  // Finite as double is not enough: infinities of both signs add up to NaN, which cannot be sorted.
  for (float leaf : leaves)
    if (!std::isfinite(leaf)) throw std::invalid_argument("a tree's leaf is too large");
  std::vector<Trees::Node> nodes;
  for (int i = 0; i < n; i++) {
    if (feature[i] < 0 || feature[i] >= flashmoe::kFeatures)
      throw std::invalid_argument("a tree asks for feature " + std::to_string(feature[i]));
    for (int child : {left[i], right[i]})
      if (child < -int(leaves.size()) || child >= n || (child >= 0 && child <= i))
        throw std::invalid_argument("a tree's node has a child that is not below it");
    nodes.push_back({threshold[i], left[i], right[i], int16_t(feature[i]), bool(unknown_left[i])});
  }
  return Trees(roots, nodes, leaves);
}

class Policy {
 public:
  Policy(int layers, int experts, int top_k, int capacity, bool per_layer, Trees trees)
      : experts_(experts), core_({layers, experts, top_k}, {capacity, per_layer}, std::move(trees)) {}

  void step(int layer, const std::vector<int>& routed, nb::object weights, uintptr_t scores, int token) {
    const Shape shape = core_.history().shape();
    if (layer < 0 || layer >= shape.layers) throw std::out_of_range("no layer " + std::to_string(layer));
    for (int e : routed)
      if (e < 0 || e >= shape.experts) throw std::out_of_range("no expert " + std::to_string(e));
    weights_.clear();
    if (!weights.is_none()) weights_ = nb::cast<std::vector<float>>(weights);
    if (!weights_.empty() && weights_.size() != routed.size())
      throw std::invalid_argument("as many weights as experts, please");
    core_.step(layer, routed.data(), int(routed.size()), weights_.empty() ? nullptr : weights_.data(),
               reinterpret_cast<const float*>(scores), token);
  }

  void inserted(int layer, int expert) { core_.inserted(number(layer, expert)); }
  void left(int layer, int expert) { core_.left(number(layer, expert)); }

  nb::list worst(int count) { return pairs(core_.worst(count)); }

  // Candidates: an iterable of (layer, expert).
  nb::list rank(nb::iterable candidates) {
    std::vector<int> experts;
    for (nb::handle key : candidates)
      experts.push_back(number(nb::cast<int>(key[nb::int_(0)]), nb::cast<int>(key[nb::int_(1)])));
    core_.rank(experts);
    return pairs(experts);
  }

  std::vector<float> features(int layer, int expert) {
    number(layer, expert);
    std::vector<float> row(flashmoe::kFeatures);
    core_.features(layer, expert, row.data());
    return row;
  }

  LearnedCore& core() { return core_; }

 private:
  int number(int layer, int expert) const {
    const Shape shape = core_.history().shape();
    if (layer < 0 || layer >= shape.layers || expert < 0 || expert >= shape.experts)
      throw std::out_of_range("no expert " + std::to_string(expert) + " in layer " + std::to_string(layer));
    return layer * experts_ + expert;
  }

  nb::list pairs(const std::vector<int>& experts) const {
    nb::list out;
    for (int e : experts) out.append(nb::make_tuple(e / experts_, e % experts_));
    return out;
  }

  int experts_;
  LearnedCore core_;
  std::vector<float> weights_;
};

}  // namespace

NB_MODULE(_learned, m) {
  m.doc() = "The learned policy's inner part; see learned_core.h.";
  nb::list names;
  for (int i = 0; i < flashmoe::kFeatures; i++) names.append(nb::str(flashmoe::kFeatureNames[i]));
  m.attr("FEATURE_NAMES") = nb::tuple(names);
  m.def("history_bytes", [](int layers, int experts, int top_k) {
    return RoutingHistory::bytes({layers, experts, top_k});
  }, "layers"_a, "experts"_a, "top_k"_a);

  nb::class_<Trees>(m, "Trees")
      .def("__init__",
           [](Trees* self, const std::vector<int>& roots, const std::vector<int>& feature,
              const std::vector<float>& threshold, const std::vector<int>& left, const std::vector<int>& right,
              const std::vector<bool>& unknown_left, const std::vector<float>& leaves) {
             new (self) Trees(make_trees(roots, feature, threshold, left, right, unknown_left, leaves));
           },
           "roots"_a, "feature"_a, "threshold"_a, "left"_a, "right"_a, "unknown_left"_a, "leaves"_a)
      .def("predict", [](const Trees& trees, const std::vector<float>& features) {
        if (features.size() != size_t(flashmoe::kFeatures)) throw std::invalid_argument("wrong number of features");
        float out = 0;
        trees.predict(features.data(), 1, &out);
        return out;
      }, "features"_a);

  nb::class_<Policy>(m, "Policy")
      .def(nb::init<int, int, int, int, bool, Trees>(), "layers"_a, "experts"_a, "top_k"_a, "capacity"_a,
           "per_layer"_a, "trees"_a)
      .def("step", &Policy::step, "layer"_a, "routed"_a, "weights"_a.none(), "scores"_a, "token"_a)
      .def("inserted", &Policy::inserted, "layer"_a, "expert"_a)
      .def("left", &Policy::left, "layer"_a, "expert"_a)
      .def("worst", &Policy::worst, "count"_a)
      .def("rank", &Policy::rank, "candidates"_a)
      .def("features", &Policy::features, "layer"_a, "expert"_a)
      .def_prop_ro("stepped_back", [](Policy& p) { return p.core().stepped_back(); })
      .def_prop_ro("step_backs", [](Policy& p) { return p.core().step_backs(); })
      .def_prop_ro("tokens_stepped_back", [](Policy& p) { return p.core().tokens_stepped_back(); })
      .def_prop_ro("learned_misses", [](Policy& p) { return p.core().learned_misses(); })
      .def_prop_ro("simple_misses", [](Policy& p) { return p.core().simple_misses(); });
}
