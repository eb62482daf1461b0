// Whole registers of one instruction set, and functions of them.
//
// Included by kernels that are included once per instruction set themselves, inside a namespace of its own, after
// DNDETR_TARGET (function attributes) and DNDETR_VECTOR (bytes of a register) were defined: each function must carry the
// target itself, or its vectors would be taken apart before it is inlined.

#define DNDETR_KERNEL inline __attribute__((always_inline)) DNDETR_TARGET

template <class Real>
struct Registers {
  typedef Real Reals __attribute__((vector_size(DNDETR_VECTOR)));
  typedef std::conditional_t<sizeof(Real) == 4, std::int32_t, std::int64_t> Index;
  typedef Index Indices __attribute__((vector_size(DNDETR_VECTOR)));
  static constexpr int lanes = DNDETR_VECTOR / sizeof(Real);
};
template <class Real>
using Reals = typename Registers<Real>::Reals;
template <class Real>
using Indices = typename Registers<Real>::Indices;

// The register, or another vector, that begins at an address.
template <class Vector, class Element>
DNDETR_KERNEL auto& vector_at(Element* p) {
  typedef Vector Aliasing __attribute__((may_alias));
  return *reinterpret_cast<std::conditional_t<std::is_const_v<Element>, const Aliasing, Aliasing>*>(p);
}
template <class Real>
DNDETR_KERNEL auto& at(Real* p) {
  return vector_at<Reals<std::remove_const_t<Real>>>(p);
}

template <class Real>
DNDETR_KERNEL Indices<Real> lane_numbers() {
  Indices<Real> numbers{};
  for (int l = 0; l < Registers<Real>::lanes; ++l) numbers[l] = l;
  return numbers;
}

// One row, from and to the computing type.
template <class Element, class Real>
DNDETR_KERNEL void load_row(const Element* from, int width, Real* to) {
  for (int d = 0; d < width; ++d) to[d] = static_cast<Real>(widen(from[d]));
}
template <class Element, class Real>
DNDETR_KERNEL void store_row(const Real* from, int width, Element* to) {
  for (int d = 0; d < width; ++d) to[d] = narrow<Element>(from[d]);
}
