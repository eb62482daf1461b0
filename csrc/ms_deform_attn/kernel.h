// Multi-scale deformable attention of one image and head, on one instruction set.
//
// Included once per instruction set, as vectors.h says. Points are prepared for a block of queries at a time; then each query
// gathers whole registers of channels, from value as it is or from a copy of the head's pixels. The backward pass adds up in
// the order of the queries, so its sums do not depend on threads.

#include "common/vectors.h"

#include "common/vector_math.h"

static_assert(kBlock % Registers<float>::lanes == 0);

#include "pixels.h"
#include "points.h"

// N registers of channels of one query: the weighted sum of all corners of all samples.
template <int N, class Rows, class Real>
DNDETR_KERNEL void gather(const Rows& rows, const Workspace<Real>& s, int q, int channel) {
  constexpr int kLanes = Registers<Real>::lanes;
  Reals<Real> even[N] = {}, odd[N] = {};
  const Index<Real>* const pixel = s.pixel + q;
  const Real* const weight = s.corner + q;
  for (int k = 0; k < s.samples * 4 * kBlock; k += 2 * kBlock) {
    const auto *left = rows.at(pixel[k]) + channel, *right = rows.at(pixel[k + kBlock]) + channel;
    for (int n = 0; n < N; ++n) even[n] += weight[k] * load<Real>(left + n * kLanes);
    for (int n = 0; n < N; ++n) odd[n] += weight[k + kBlock] * load<Real>(right + n * kLanes);
  }
  for (int n = 0; n < N; ++n) at(s.row + channel + n * kLanes) = even[n] + odd[n];
}

// Adds upper halves of a register to lower ones until a quad of lanes is left (or what the register has).
template <class Real, int Lanes>
struct Folded {
  typedef Real Lower __attribute__((vector_size(Lanes / 2 * sizeof(Real)), may_alias));
  template <class Whole>
  static DNDETR_KERNEL void store(const Whole& x, Real* to) {
    Lower low, high;
    std::memcpy(&low, &x, sizeof low);
    std::memcpy(&high, reinterpret_cast<const char*>(&x) + sizeof low, sizeof high);
    Folded<Real, Lanes / 2>::store(low + high, to);
  }
};
template <class Real>
struct Folded<Real, 4> {
  template <class Whole>
  static DNDETR_KERNEL void store(const Whole& x, Real* to) { std::memcpy(to, &x, sizeof x); }
};
template <class Real>
struct Folded<Real, 2> : Folded<Real, 4> {};

// N registers of channels of one query's gradient, backwards: spread to the corners, and dotted with each of them.
template <int N, class Rows, class Sums, class Real>
DNDETR_KERNEL void scatter(const Rows& rows, const Sums& sums, const Workspace<Real>& s, int q, int channel) {
  constexpr int kLanes = Registers<Real>::lanes, kPart = kLanes < 4 ? kLanes : 4;
  Reals<Real> grad[N];
  for (int n = 0; n < N; ++n) grad[n] = at(s.row + channel + n * kLanes);
  const Index<Real>* const pixel = s.pixel + q;
  const Real* const weight = s.corner + q;
  for (int k = 0; k < s.samples * 4; ++k) {
    const auto* const from = rows.at(pixel[k * kBlock]) + channel;
    Real* const to = sums.at(pixel[k * kBlock]) + channel;
    Reals<Real> dot{};
    for (int n = 0; n < N; ++n) {
      dot += grad[n] * load<Real>(from + n * kLanes);
      add(to + n * kLanes, weight[k * kBlock] * grad[n]);
    }
    Folded<Real, kLanes>::store(dot, s.partial + k * kPart);
  }
  Real* const dots = s.dot + q;
  for (int k = 0; k < s.samples * 4; ++k) {
    Real sum = channel > 0 ? dots[k * kBlock] : 0;
    for (int part = 0; part < kPart; ++part) sum += s.partial[k * kPart + part];
    dots[k * kBlock] = sum;
  }
}

// All channels, several registers at a time.
#define DNDETR_ALL_CHANNELS(STEP, ...)                        \
  for (int channel = 0, taken; channel < s.stride;) {         \
    const int left = (s.stride - channel) / Registers<Real>::lanes; \
    taken = left >= 4 ? 4 : left >= 2 ? 2 : 1;                \
    if (taken == 4) STEP<4>(__VA_ARGS__, s, q, channel);      \
    if (taken == 2) STEP<2>(__VA_ARGS__, s, q, channel);      \
    if (taken == 1) STEP<1>(__VA_ARGS__, s, q, channel);      \
    channel += taken * Registers<Real>::lanes;                \
  }

// All queries, from the rows of their head's pixels.
template <class Rows, class Real>
DNDETR_TARGET void gather_all(const DeformAttn& p, Array out, int b, int head, const Workspace<Real>& s, Rows rows) {
  for (int first = 0; first < p.queries; first += kBlock) {
    const int count = std::min(kBlock, p.queries - first);
    prepare(p, b, head, first, count, s);
    for (int q = 0; q < count; ++q) {
      DNDETR_ALL_CHANNELS(gather, rows)
      const std::int64_t place = ((std::int64_t(b) * p.queries + first + q) * p.heads + head) * p.width;
      DNDETR_WITH_ELEMENT(out.dtype, store_row(s.row, p.width, static_cast<Element*>(out.data) + place))
    }
  }
}

// The same backwards, adding to zeroed rows.
template <class Rows, class Sums, class Real>
DNDETR_TARGET void scatter_all(const DeformAttn& p, Array grad_out, const DeformAttnGrads& grads, int b, int head,
                               const Workspace<Real>& s, Rows rows, Sums sums) {
  const int samples = s.samples, columns = p.levels * p.reference_width;
  for (int first = 0; first < p.queries; first += kBlock) {
    const int count = std::min(kBlock, p.queries - first);
    const std::int64_t query = std::int64_t(b) * p.queries + first, row = query * p.heads + head;
    prepare(p, b, head, first, count, s);
    for (int q = 0; q < count; ++q) {
      const std::int64_t place = (row + std::int64_t(q) * p.heads) * p.width;
      DNDETR_WITH_ELEMENT(grad_out.dtype, load_row(static_cast<const Element*>(grad_out.data) + place, p.width, s.row))
      DNDETR_ALL_CHANNELS(scatter, rows, sums)
    }
    differentiate(p, s);
    const std::int64_t offset = query * grads.offsets_stride + head * samples * 2;
    const std::int64_t logit = query * grads.logits_stride + head * samples;
    DNDETR_WITH_ELEMENT(grads.offsets.dtype, store_columns(s.offset, grads.offsets_stride, count, samples * 2,
                                                           static_cast<Element*>(grads.offsets.data) + offset))
    DNDETR_WITH_ELEMENT(grads.logits.dtype, store_columns(s.weight, grads.logits_stride, count, samples,
                                                          static_cast<Element*>(grads.logits.data) + logit))
    if (grads.reference.data) {
      const std::int64_t start = ((std::int64_t(b) * p.heads + head) * p.queries + first) * columns;
      store_columns(s.reference, columns, count, columns, static_cast<Real*>(grads.reference.data) + start);
    }
  }
}

#undef DNDETR_ALL_CHANNELS

// Runs the statements with ``Element`` as the type of value's elements, among those computed in Real.
#define DNDETR_WITH_VALUE(...) \
  DNDETR_WITH_ELEMENT(p.value.dtype, if constexpr ((sizeof(Element) == 8) == (sizeof(Real) == 8)) { __VA_ARGS__ })

template <class Real>
DNDETR_TARGET void forward(const DeformAttn& p, Array out, int b, int head, const Workspace<Real>& s) {
  DNDETR_WITH_VALUE({
    const auto value = value_rows<Element>(p, b, head, s);
    if (s.copies) {
      gather_all(p, out, b, head, s, copied(p, value, s));
    } else {
      gather_all(p, out, b, head, s, value);
    }
  })
}

template <class Real>
DNDETR_TARGET void backward(const DeformAttn& p, Array grad_out, const DeformAttnGrads& grads, int b, int head,
                            const Workspace<Real>& s) {
  DNDETR_WITH_VALUE({
    const auto value = value_rows<Element>(p, b, head, s);
    const auto grad_value = grad_rows<Element>(p, grads.value, b, head, s);
    if constexpr (std::is_same_v<Element, Real>) {
      if (!s.sums) return scatter_all(p, grad_out, grads, b, head, s, value, grad_value);
    }
    const auto sums = zeroed_sums(s);
    if (s.copies) {
      scatter_all(p, grad_out, grads, b, head, s, copied(p, value, s), sums);
    } else {
      scatter_all(p, grad_out, grads, b, head, s, value, sums);
    }
    for (std::int64_t i = 0; i < s.pixels; ++i) store_row(sums.at(i), p.width, grad_value.at(i));
  })
}

#undef DNDETR_WITH_VALUE
