// A head's pixels as rows of channels: what samples read, and what their gradients are added to. Included once per
// instruction set.
//
// Pixel -1 is none: a row of zeros to read, and a row to add to that nobody reads. Kernels go there, without a branch,
// for corners off the image and in the padding.

// Copies one after the other, in the computing type, of whole registers; row -1 precedes them.
template <class Real>
struct Copied {
  Real* first;
  std::int64_t step;

  DNDETR_KERNEL Real* at(std::int64_t pixel) const { return first + pixel * step; }
};

// The tensor itself.
template <class Element>
struct InPlace {
  Element* first;
  std::int64_t step;
  Element* none;

  DNDETR_KERNEL Element* at(std::int64_t pixel) const { return pixel < 0 ? none : first + pixel * step; }
};

// One register of channels of a row, anywhere in memory.
template <class Real, class Element>
DNDETR_KERNEL Reals<Real> load(const Element* from) {
  constexpr int kLanes = Registers<Real>::lanes;
  Reals<Real> x;
  if constexpr (std::is_same_v<Element, Real>) {
    std::memcpy(&x, from, sizeof x);
  } else {
    alignas(sizeof x) Real lanes[kLanes];
    for (int l = 0; l < kLanes; ++l) lanes[l] = widen(from[l]);
    x = at(lanes);
  }
  return x;
}
template <class Real>
DNDETR_KERNEL void add(Real* to, Reals<Real> x) {
  x += load<Real>(to);
  std::memcpy(to, &x, sizeof x);
}

template <class Element, class Real>
DNDETR_KERNEL InPlace<const Element> value_rows(const DeformAttn& p, int b, int head, const Workspace<Real>& s) {
  const Element* const value = static_cast<const Element*>(p.value.data) + b * p.batch_stride + head * p.head_stride;
  return {value, p.pixel_stride, reinterpret_cast<const Element*>(s.zeros)};
}
// Of grad_value, which is contiguous.
template <class Element, class Real>
DNDETR_KERNEL InPlace<Element> grad_rows(const DeformAttn& p, Array grad, int b, int head, const Workspace<Real>& s) {
  const std::int64_t step = std::int64_t(p.heads) * p.width;
  Element* const first = static_cast<Element*>(grad.data) + b * s.pixels * step + head * p.width;
  return {first, step, reinterpret_cast<Element*>(s.nobody)};
}

// Row -1 of the copies, and channels past the last, were zeroed when the workspace was made.
template <class Element, class Real>
DNDETR_KERNEL Copied<Real> copied(const DeformAttn& p, InPlace<Element> value, const Workspace<Real>& s) {
  const Copied<Real> copies{s.copies + s.stride, s.stride};
  for (std::int64_t i = 0; i < s.pixels; ++i) load_row(value.at(i), p.width, copies.at(i));
  return copies;
}
template <class Real>
DNDETR_KERNEL Copied<Real> zeroed_sums(const Workspace<Real>& s) {
  std::fill_n(s.sums, (s.pixels + 1) * s.stride, Real(0));
  return {s.sums + s.stride, s.stride};
}
