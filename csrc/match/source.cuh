// Where a problem's costs come from on a GPU, by its number: a tensor, or predictions and targets.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/floats.h"
#include "common/ops.h"

#define DNDETR_INLINE __device__ __forceinline__

namespace dndetr::matching {

DNDETR_INLINE float exp_of(float x) { return expf(x); }
DNDETR_INLINE double exp_of(double x) { return exp(x); }
DNDETR_INLINE float log_of(float x) { return logf(x); }
DNDETR_INLINE double log_of(double x) { return log(x); }
DNDETR_INLINE float root_of(float x) { return sqrtf(x); }
DNDETR_INLINE double root_of(double x) { return sqrt(x); }

#include "cost.h"

template <class CostType>
struct GivenCosts {
  using Cost = CostType;
  AssignProblems a;
  const Cost* from = nullptr;
  int targets = 0;

  DNDETR_INLINE int queries() const { return a.queries; }
  DNDETR_INLINE int slots() const { return a.targets; }

  DNDETR_INLINE void open(int problem) {
    from = static_cast<const Cost*>(a.cost) + problem * a.problem_stride;
    targets = min(max(a.counts[problem], 0), a.targets);
  }

  DNDETR_INLINE const Cost* target(int t) const { return from + t * a.target_stride; }

  template <class Use>
  DNDETR_INLINE void with_costs(const Use& use) const {
    use([step = a.query_stride](const Cost* target, int q) { return __ldg(target + q * step); });
  }
};

// Numbers through the read-only cache: the compiler may then load many before it stores one.
template <class Element>
DNDETR_INLINE Element fetch(const Element* from) {
  if constexpr (sizeof(Element) == 2) {
    return Element{__ldg(reinterpret_cast<const std::uint16_t*>(from))};
  } else {
    return __ldg(from);
  }
}

// Boxes are of the type of the costs.
template <class CostType>
struct ComputedCosts {
  using Cost = CostType;
  struct Target {
    std::int64_t label;
    Corners<Cost> box;
  };

  MatchInputs m;
  int sets;
  CostWeights<Cost> weights;
  std::int64_t first_slot = 0, first_logit = 0, first_box = 0;
  int targets = 0;

  DNDETR_INLINE int queries() const { return m.queries / sets; }
  DNDETR_INLINE int slots() const { return m.slots; }

  DNDETR_INLINE void open(int problem) {
    const int set = problem % sets, image = problem / sets % m.batch, layer = problem / sets / m.batch;
    const std::int64_t query = std::int64_t(set) * queries();
    first_slot = std::int64_t(image) * m.slots;
    first_logit = layer * m.logits_strides.layer + image * m.logits_strides.image + query * m.logits_strides.query;
    first_box = layer * m.boxes_strides.layer + image * m.boxes_strides.image + query * m.boxes_strides.query;
    targets = min(max(m.counts[image], 0), m.slots);
  }

  DNDETR_INLINE Corners<Cost> box(Array boxes, std::int64_t first) const {
    const Cost* const from = static_cast<const Cost*>(boxes.data) + first;
    return corners(fetch(from), fetch(from + 1), fetch(from + 2), fetch(from + 3));
  }

  DNDETR_INLINE Target target(int t) const {
    const std::int64_t slot = first_slot + t;
    return {m.labels[slot], box(m.target_boxes, 4 * slot)};
  }

  // A label that does not exist has no logits: its costs are not finite.
  template <class Logit, class Fit>
  DNDETR_INLINE Cost cost(const Logit* logits, const Target& target, int q, const Fit& fit) const {
    if (target.label < 0 || target.label >= m.classes) return static_cast<Cost>(NAN);
    const Cost logit = widen(fetch(logits + first_logit + q * m.logits_strides.query + target.label));
    return pair_cost(logit, box(m.boxes, first_box + q * m.boxes_strides.query), target.box, weights, fit);
  }

  // use(cost of a target and a query), for the type of the logits.
  template <class Use>
  DNDETR_INLINE void with_costs(const Use& use) const {
    with_fit(weights.position, [&](const auto& fit) { with_costs(fit, use); });
  }

 private:
  template <class Fit, class Use>
  DNDETR_INLINE void with_costs(const Fit& fit, const Use& use) const {
    const auto with = [&](auto logits) { use([=](const Target& t, int q) { return cost(logits, t, q, fit); }); };
    if constexpr (sizeof(Cost) == 8) {
      with(static_cast<const double*>(m.logits.data));
    } else if (m.logits.dtype == Dtype::float32) {
      with(static_cast<const float*>(m.logits.data));
    } else if (m.logits.dtype == Dtype::bfloat16) {
      with(static_cast<const BFloat16*>(m.logits.data));
    } else {
      with(static_cast<const Float16*>(m.logits.data));
    }
  }
};

}  // namespace dndetr::matching
