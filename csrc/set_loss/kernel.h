// Class losses beside the target's class and their slopes, whole registers at a time, on one instruction set; included as
// vectors.h says. Focal's are those at the target's class too, of the logit with its sign changed.

#include "common/vectors.h"

#include "common/vector_math.h"

// ln(1 + e) for e in [0, 1], by the series of 2 artanh(e / (2 + e)).
DNDETR_KERNEL Reals<float> log_of_one_plus(Reals<float> e) {
  const Reals<float> t = e / (e + 2.0f), s = t * t;
  Reals<float> y = s * (1.0f / 15) + 1.0f / 13;
  y = y * s + 1.0f / 11;
  y = y * s + 1.0f / 9;
  y = y * s + 1.0f / 7;
  y = y * s + 1.0f / 5;
  y = y * s + 1.0f / 3;
  return 2.0f * t * (y * s + 1.0f);
}
DNDETR_KERNEL Reals<double> log_of_one_plus(Reals<double> e) {
  for (int l = 0; l < Registers<double>::lanes; ++l) e[l] = std::log1p(e[l]);
  return e;
}

// sigmoid(z), 1 - sigmoid(z) and softplus(z): what all of these losses and slopes are made of.
template <class Real>
struct Logistic {
  Reals<Real> p, rest, softplus;

  DNDETR_KERNEL explicit Logistic(Reals<Real> z) {
    const Reals<Real> zero{}, one = zero + 1;
    const auto below = z < zero;
    const Reals<Real> e = exp_of(below ? z : -z), high = one / (one + e), low = e * high;
    p = below ? low : high;
    rest = below ? high : low;
    softplus = log_of_one_plus(e) + (below ? zero : z);
  }
};

// values[i], whole lines of them: z -> p^2 softplus, or p^1.5 softplus where p^1.5 is but a weight; returns their sum.
template <class Real, bool kWeight>
DNDETR_TARGET Real losses(Real* values, int count) {
  Reals<Real> sum{};
  for (int i = 0; i < count; i += Registers<Real>::lanes) {
    const Logistic<Real> l(at(values + i));
    sum += at(values + i) = l.p * (kWeight ? root_of(l.p) : l.p) * l.softplus;
  }
  Real all = 0;
  for (int lane = 0; lane < Registers<Real>::lanes; ++lane) all += sum[lane];
  return all;
}

// values[i]: z -> derivative of the above.
template <class Real, bool kWeight>
DNDETR_TARGET void slopes(Real* values, int count) {
  for (int i = 0; i < count; i += Registers<Real>::lanes) {
    const Logistic<Real> l(at(values + i));
    if constexpr (kWeight) {
      at(values + i) = l.p * root_of(l.p) * l.p;
    } else {
      at(values + i) = l.p * l.p * (2 * l.rest * l.softplus + l.p);
    }
  }
}
