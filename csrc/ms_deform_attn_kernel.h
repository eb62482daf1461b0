// Multi-scale deformable attention of one image and head, on one instruction set.
//
// Included once per instruction set, as vectors.h says. A head's pixels are first copied to cells, the points are prepared
// for a block of queries at a time; then each query gathers whole registers of channels. The backward pass adds to cells of
// its own in the order of the queries, so its sums do not depend on threads.

#include "vectors.h"

static_assert(kBlock % Registers<float>::lanes == 0);

#include "ms_deform_attn_cells.h"
#include "ms_deform_attn_points.h"

// N registers of channels of one query: the weighted sum of all corners of all samples.
template <int N, class Real>
DNDETR_KERNEL void gather(const DeformAttn& p, const Workspace<Real>& s, int q, int channel) {
  constexpr int kLanes = Registers<Real>::lanes;
  Reals<Real> above[N] = {}, below[N] = {};
  int k = 0;
  for (int l = 0; l < p.levels; ++l) {
    const std::int64_t next_row = s.levels[l].row * s.stride;
    for (const int end = k + p.points; k < end; ++k) {
      const Real* high = s.cells + std::int64_t(s.cell[k * kBlock + q]) * s.stride + channel;
      const Real* low = high + next_row;
      const Real* weight = s.corner + k * 4 * kBlock + q;
      for (int n = 0; n < N; ++n) {
        above[n] += weight[0] * at(high + n * kLanes);
        below[n] += weight[2 * kBlock] * at(low + n * kLanes);
      }
      for (int n = 0; n < N; ++n) {
        above[n] += weight[kBlock] * at(high + s.stride + n * kLanes);
        below[n] += weight[3 * kBlock] * at(low + s.stride + n * kLanes);
      }
    }
  }
  for (int n = 0; n < N; ++n) at(s.row + channel + n * kLanes) = above[n] + below[n];
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
template <int N, class Real>
DNDETR_KERNEL void scatter(const DeformAttn& p, const Workspace<Real>& s, int q, int channel) {
  constexpr int kLanes = Registers<Real>::lanes, kPart = kLanes < 4 ? kLanes : 4;
  const Real *const cells = s.cells + channel, *const corner = s.corner + q;
  Real *const grads = s.grads + channel, *const partial = s.partial;
  Reals<Real> grad[N];
  for (int n = 0; n < N; ++n) grad[n] = at(s.row + channel + n * kLanes);
  int k = 0;
  for (int l = 0; l < p.levels; ++l) {
    const std::int64_t next_row = s.levels[l].row * s.stride;
    const std::int64_t corners[4] = {0, s.stride, next_row, next_row + s.stride};
    for (const int end = k + p.points; k < end; ++k) {
      const std::int64_t cell = std::int64_t(s.cell[k * kBlock + q]) * s.stride;
      for (int c = 0; c < 4; ++c) {
        const std::int64_t place = cell + corners[c];
        const Real weight = corner[(k * 4 + c) * kBlock];
        Reals<Real> dot{};
        for (int n = 0; n < N; ++n) {
          dot += grad[n] * at(cells + place + n * kLanes);
          at(grads + place + n * kLanes) += weight * grad[n];
        }
        Folded<Real, kLanes>::store(dot, partial + (k * 4 + c) * kPart);
      }
    }
  }
  Real* const dots = s.dot + q;
  for (int i = 0; i < k * 4; ++i) {
    Real sum = channel > 0 ? dots[i * kBlock] : 0;
    for (int part = 0; part < kPart; ++part) sum += partial[i * kPart + part];
    dots[i * kBlock] = sum;
  }
}

// All channels, several registers at a time.
#define DNDETR_ALL_CHANNELS(STEP)                                            \
  for (int channel = 0; channel < s.stride;) {                              \
    const int left = (s.stride - channel) / Registers<Real>::lanes;         \
    if (left >= 4) {                                                        \
      STEP<4>(p, s, q, channel), channel += 4 * Registers<Real>::lanes;     \
    } else if (left >= 2) {                                                 \
      STEP<2>(p, s, q, channel), channel += 2 * Registers<Real>::lanes;     \
    } else {                                                                \
      STEP<1>(p, s, q, channel), channel += Registers<Real>::lanes;         \
    }                                                                       \
  }

template <class Real>
DNDETR_TARGET void forward(const DeformAttn& p, Array out, int b, int head, const Workspace<Real>& s) {
  DNDETR_WITH_ELEMENT(p.value.dtype, pack<Element>(p, b, head, s))
  for (int first = 0; first < p.queries; first += kBlock) {
    const int rows = std::min(kBlock, p.queries - first);
    prepare(p, b, head, first, rows, s);
    for (int q = 0; q < rows; ++q) {
      DNDETR_ALL_CHANNELS(gather)
      const std::int64_t place = ((std::int64_t(b) * p.queries + first + q) * p.heads + head) * p.width;
      DNDETR_WITH_ELEMENT(out.dtype, store_row(s.row, p.width, static_cast<Element*>(out.data) + place))
    }
  }
}

template <class Real>
DNDETR_TARGET void backward(const DeformAttn& p, Array grad_out, const DeformAttnGrads& grads, int b, int head,
                            const Workspace<Real>& s) {
  const int samples = p.levels * p.points, columns = p.levels * p.reference_width;
  DNDETR_WITH_ELEMENT(p.value.dtype, pack<Element>(p, b, head, s))
  std::fill_n(s.grads, s.levels[p.levels].first * s.stride, Real(0));
  for (int first = 0; first < p.queries; first += kBlock) {
    const int rows = std::min(kBlock, p.queries - first);
    const std::int64_t row = (std::int64_t(b) * p.queries + first) * p.heads + head;
    prepare(p, b, head, first, rows, s);
    for (int q = 0; q < rows; ++q) {
      const std::int64_t place = (row + std::int64_t(q) * p.heads) * p.width;
      DNDETR_WITH_ELEMENT(grad_out.dtype, load_row(static_cast<const Element*>(grad_out.data) + place, p.width, s.row))
      DNDETR_ALL_CHANNELS(scatter)
    }
    differentiate(p, s);
    DNDETR_WITH_ELEMENT(grads.offsets.dtype,
                        store_columns(s.offset, std::int64_t(p.heads) * samples * 2, rows, samples * 2,
                                      static_cast<Element*>(grads.offsets.data) + row * samples * 2))
    DNDETR_WITH_ELEMENT(grads.logits.dtype, store_columns(s.weight, std::int64_t(p.heads) * samples, rows, samples,
                                                          static_cast<Element*>(grads.logits.data) + row * samples))
    if (grads.reference.data) {
      const std::int64_t start = ((std::int64_t(b) * p.heads + head) * p.queries + first) * columns;
      store_columns(s.reference, columns, rows, columns, static_cast<Real*>(grads.reference.data) + start);
    }
  }
  DNDETR_WITH_ELEMENT(grads.value.dtype, unpack(p, b, head, s, static_cast<Element*>(grads.value.data)))
}

#undef DNDETR_ALL_CHANNELS
#undef DNDETR_KERNEL
