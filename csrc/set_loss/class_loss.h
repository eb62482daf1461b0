// The class loss of one logit at its target's class, where that depends on the overlap with the target's box; formulas are
// in dndetr/ops/class_loss.py.

// A query with a target: its number, its target's class, and the IoU of its box and its target's.
template <class Real>
struct Pair {
  int query, label;
  Real overlap;
};

template <class Real>
struct LossAndSlope {
  Real loss, slope;
};

// Whether alpha weighs classes against each other: 1 - alpha beside the target's, alpha at it.
inline bool weighted(ClassLoss kind) { return kind == ClassLoss::focal || kind == ClassLoss::position; }

// What position's squared overlaps are multiplied by; not a number where an overlap is none.
template <class Real>
Real stretch(const std::vector<Pair<Real>>& pairs) {
  Real most = 0;
  for (const Pair<Real>& pair : pairs) {
    const Real square = pair.overlap * pair.overlap;
    if (square > most || std::isnan(square)) most = square;
  }
  const Real inverse = 1 / (most + Real(1e-8));
  return inverse < 1 ? Real(1) : inverse;
}

// What the score should be; -log_p is softplus(-logit). Powers of the score by its logarithm, which does not underflow.
template <class Real>
Real aim(ClassLoss kind, Real log_p, Real overlap, Real alpha, Real stretched) {
  switch (kind) {
    case ClassLoss::iou: {
      const Real t = std::exp(alpha * log_p) * std::pow(overlap, 1 - alpha);
      return t < Real(0.01) ? Real(0.01) : t;
    }
    case ClassLoss::mal: return overlap * std::sqrt(overlap);
    default: return overlap * overlap * stretched;
  }
}

// BCE(t) = softplus(x) - t x and its slope p - t from exp(-|x|), by the side of 0 that x is on: no digits are lost.
template <class Real>
LossAndSlope<Real> loss_at_target(ClassLoss kind, Real x, Real overlap, Real alpha, Real stretched) {
  const Real e = std::exp(-std::abs(x)), tail = std::log1p(e), high = 1 / (1 + e), low = e * high;
  const bool below = x < 0;
  const Real t = aim(kind, below ? x - tail : -tail, overlap, alpha, stretched);
  const Real bce = tail + (below ? -t * x : (1 - t) * x);
  const Real apart = below ? low - t : (1 - t) - low;
  if (kind != ClassLoss::position) return {bce, apart};
  return {alpha * apart * apart * bce, alpha * apart * (2 * low * high * bce + apart * apart)};
}
