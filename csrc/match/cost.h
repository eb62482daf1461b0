// The matching cost of one pair, for scalars and for vectors alike (`Value`): dndetr/ops/match_cost.py has the formula, and
// its order of operations is kept, so that rounding agrees.
//
// Included once per instruction set, after DNDETR_INLINE, exp_of, log_of and root_of were defined.

// A box and its corners.
template <class Value>
struct Corners {
  Value x, y, w, h, left, top, right, bottom, area;
};

template <class Value>
DNDETR_INLINE Corners<Value> corners(Value x, Value y, Value w, Value h) {
  const Value half_w = w * 0.5f, half_h = h * 0.5f;
  const Value left = x - half_w, top = y - half_h, right = x + half_w, bottom = y + half_h;
  return {x, y, w, h, left, top, right, bottom, (right - left) * (bottom - top)};
}

template <class Value>
DNDETR_INLINE Value smaller(Value a, Value b) {
  return a < b ? a : b;
}
template <class Value>
DNDETR_INLINE Value larger(Value a, Value b) {
  return a > b ? a : b;
}

// What a score is multiplied by for a box of this GIoU, ((GIoU + 1) / 2)^position: a type for position 0 and one for others,
// so that loops choose before they begin.
struct AnyFit {
  template <class Value>
  DNDETR_INLINE Value operator()(Value) const {
    return Value{} + 1.0f;
  }
};

template <class Weight>
struct PowerOfFit {
  Weight position;

  template <class Value>
  DNDETR_INLINE Value operator()(Value overlap) const {
    const Value none{}, fit = smaller(larger(overlap * 0.5f + 0.5f, none), none + 1.0f);
    if (position == Weight(0.5)) return root_of(fit);
    return fit > none ? exp_of(position * log_of(fit)) : none;  // log_of may take normal numbers only
  }
};

template <class Weight, class Use>
DNDETR_INLINE auto with_fit(Weight position, const Use& use) {
  if (position == Weight(0)) return use(AnyFit{});
  return use(PowerOfFit<Weight>{position});
}

// Not a number where the logit is not finite: its cost would be finite, and hide that.
template <class Value, class Weight>
DNDETR_INLINE Value label_cost(Value logit, Value fit, Weight alpha) {
  const Weight tiny = Weight(1e-8);
  const Value p = Weight(1) / (Weight(1) + exp_of(-logit)) * fit, rest = Weight(1) - p;
  const Value positive = alpha * (rest * rest) * -log_of(p + tiny);
  const Value negative = (Weight(1) - alpha) * (p * p) * -log_of(rest + tiny);
  return positive - negative + (logit - logit);
}

template <class Value>
DNDETR_INLINE Value l1_distance(const Corners<Value>& a, const Corners<Value>& b) {
  const Value dx = a.x - b.x, dy = a.y - b.y, dw = a.w - b.w, dh = a.h - b.h;
  return larger(dx, -dx) + larger(dy, -dy) + larger(dw, -dw) + larger(dh, -dh);
}

template <class Value, class Weight>
DNDETR_INLINE Value generalized_iou(const Corners<Value>& a, const Corners<Value>& b, Weight tiny) {
  const Value none = a.x - a.x;
  const Value shared_w = smaller(a.right, b.right) - larger(a.left, b.left);
  const Value shared_h = smaller(a.bottom, b.bottom) - larger(a.top, b.top);
  const Value shared = larger(shared_w, none) * larger(shared_h, none), total = a.area + b.area - shared;
  const Value hull_w = larger(a.right, b.right) - smaller(a.left, b.left);
  const Value hull_h = larger(a.bottom, b.bottom) - smaller(a.top, b.top);
  const Value hull = larger(hull_w, none) * larger(hull_h, none);
  return shared / (total + tiny) - (hull - total) / (hull + tiny);
}

template <class Value, class Weight, class Fit>
DNDETR_INLINE Value pair_cost(Value logit, const Corners<Value>& a, const Corners<Value>& b,
                              const CostWeights<Weight>& w, const Fit& fit) {
  const Value overlap = generalized_iou(a, b, Weight(1e-6));
  return w.label * label_cost(logit, fit(overlap), w.alpha) + w.l1 * l1_distance(a, b) - w.giou * overlap;
}
