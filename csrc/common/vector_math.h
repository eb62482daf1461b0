// Exponential and logarithm of vectors, to about one unit in the last place, the same on every instruction set where products
// and sums are not fused; and the square root, correctly rounded.
//
// Included once per instruction set, after vectors.h.

template <class Real>
struct Format;
template <>
struct Format<float> {
  static constexpr int kMantissa = 23, kBias = 127, kExpDegree = 7, kLogTerms = 5;
  static constexpr float kRound = 0x1.8p23f, kRange = 88;                   // adding kRound leaves the integer in the low bits
  static constexpr float kLn2High = 0x1.62ep-1f, kLn2Low = 0x1.0bfbe8p-15f;  // the first times an exponent is exact
  static constexpr std::int32_t kRootHalf = 0x3f3504f3;
};
template <>
struct Format<double> {
  static constexpr int kMantissa = 52, kBias = 1023, kExpDegree = 13, kLogTerms = 11;
  static constexpr double kRound = 0x1.8p52, kRange = 708;
  static constexpr double kLn2High = 0x1.62e42feep-1, kLn2Low = 0x1.a39ef35793c76p-33;
  static constexpr std::int64_t kRootHalf = 0x3fe6a09e667f3bcd;
};

template <class To, class From>
DNDETR_KERNEL To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// 1 / k!
template <class Real>
constexpr Real kInverseFactorials[] = {Real(1),
                                       Real(1),
                                       Real(1.0 / 2),
                                       Real(1.0 / 6),
                                       Real(1.0 / 24),
                                       Real(1.0 / 120),
                                       Real(1.0 / 720),
                                       Real(1.0 / 5040),
                                       Real(1.0 / 40320),
                                       Real(1.0 / 362880),
                                       Real(1.0 / 3628800),
                                       Real(1.0 / 39916800),
                                       Real(1.0 / 479001600),
                                       Real(1.0 / 6227020800)};

// The Taylor series of exp, after taking out a power of two; x is clamped to where that power is a normal number or 0.
template <class Real>
DNDETR_KERNEL Reals<Real> exp_of_real(Reals<Real> x) {
  using F = Format<Real>;
  const Reals<Real> most = Reals<Real>{} + F::kRange;
  x = x > most ? most : x;
  x = x < -most ? -most : x;
  const Reals<Real> shifted = x * Real(1.4426950408889634) + F::kRound, n = shifted - F::kRound;
  const Reals<Real> r = (x - n * F::kLn2High) - n * F::kLn2Low;
  Reals<Real> y{};
  for (int k = F::kExpDegree; k >= 0; --k) y = y * r + kInverseFactorials<Real>[k];
  return y * same_bits<Reals<Real>>((same_bits<Indices<Real>>(shifted) + F::kBias) << F::kMantissa);
}

// log of a normal number: 2 artanh((m - 1) / (m + 1)) for the mantissa m in [sqrt 1/2, sqrt 2), plus its power of two.
template <class Real>
DNDETR_KERNEL Reals<Real> log_of_real(Reals<Real> x) {
  using F = Format<Real>;
  const Indices<Real> bits = same_bits<Indices<Real>>(x), power = (bits - F::kRootHalf) >> F::kMantissa;
  const Reals<Real> m = same_bits<Reals<Real>>(bits - (power << F::kMantissa));
  const Reals<Real> e = same_bits<Reals<Real>>(same_bits<Indices<Real>>(Reals<Real>{} + F::kRound) + power) - F::kRound;
  const Reals<Real> f = m - 1, s = f / (f + 2), z = s * s;
  Reals<Real> series = Reals<Real>{} + Real(1) / (2 * F::kLogTerms + 1);
  for (int k = F::kLogTerms - 1; k > 0; --k) series = series * z + Real(1) / (2 * k + 1);
  // f - s * (f - 2 z series) is 2 s + 2 s z series without the rounding of s, which counts where e = 0.
  return e * F::kLn2High + (f - (s * (f - 2 * (z * series)) - e * F::kLn2Low));
}

DNDETR_KERNEL Reals<float> exp_of(Reals<float> x) { return exp_of_real<float>(x); }
DNDETR_KERNEL Reals<double> exp_of(Reals<double> x) { return exp_of_real<double>(x); }
DNDETR_KERNEL Reals<float> log_of(Reals<float> x) { return log_of_real<float>(x); }
DNDETR_KERNEL Reals<double> log_of(Reals<double> x) { return log_of_real<double>(x); }

// With -fno-math-errno one instruction for all lanes.
DNDETR_KERNEL Reals<float> root_of(Reals<float> x) {
  for (int l = 0; l < Registers<float>::lanes; ++l) x[l] = __builtin_sqrtf(x[l]);
  return x;
}
DNDETR_KERNEL Reals<double> root_of(Reals<double> x) {
  for (int l = 0; l < Registers<double>::lanes; ++l) x[l] = __builtin_sqrt(x[l]);
  return x;
}
