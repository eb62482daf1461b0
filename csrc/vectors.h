// Whole registers of one instruction set, and functions of them.
//
// Included by kernels that are included once per instruction set themselves, inside a namespace of its own, after
// DNDETR_TARGET (function attributes) and DNDETR_VECTOR (bytes of a register) were defined: each function must carry the
// target itself, or its vectors would be taken apart before it is inlined.

#define DNDETR_KERNEL inline __attribute__((always_inline)) DNDETR_TARGET

template <class Real>
struct Registers {
  typedef Real Reals __attribute__((vector_size(DNDETR_VECTOR), may_alias));
  typedef std::conditional_t<sizeof(Real) == 4, std::int32_t, std::int64_t> Index;
  typedef Index Indices __attribute__((vector_size(DNDETR_VECTOR), may_alias));
  static constexpr int lanes = DNDETR_VECTOR / sizeof(Real);
};
template <class Real>
using Reals = typename Registers<Real>::Reals;
template <class Real>
using Indices = typename Registers<Real>::Indices;

template <class Real>
DNDETR_KERNEL Reals<Real>& at(Real* p) {
  return *reinterpret_cast<Reals<Real>*>(p);
}
template <class Real>
DNDETR_KERNEL const Reals<Real>& at(const Real* p) {
  return *reinterpret_cast<const Reals<Real>*>(p);
}

// exp(x) for x <= 0, to about one unit in the last place; 0 below float's normal numbers.
DNDETR_KERNEL Reals<float> exp_of_negative(Reals<float> x) {
  constexpr float kRound = 0x1.8p23f;  // adding and subtracting it rounds to an integer
  const Reals<float> n = (x * 0x1.715476p+0f + kRound) - kRound;
  const Reals<float> r = (x - n * 0x1.62ep-1f) - n * 0x1.0bfbe8p-15f;  // ln 2 in two parts, the first times n exact
  Reals<float> y = r * (1.0f / 5040) + 1.0f / 720;
  y = y * r + 1.0f / 120;
  y = y * r + 1.0f / 24;
  y = y * r + 1.0f / 6;
  y = y * r + 0.5f;
  y = y * r + 1.0f;
  y = y * r + 1.0f;
  const auto vanishes = x < -87.0f;
  const Indices<float> power = (__builtin_convertvector(vanishes ? x - x : n, Indices<float>) + 127) << 23;
  y *= reinterpret_cast<const Reals<float>&>(power);
  return vanishes ? Reals<float>{} : y;
}
DNDETR_KERNEL Reals<double> exp_of_negative(Reals<double> x) {
  for (int l = 0; l < Registers<double>::lanes; ++l) x[l] = std::exp(x[l]);
  return x;
}
