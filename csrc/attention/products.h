// What attention is made of: products of tiles and panels, joined registers, copies of rows. Included once per instruction set.

#include "common/products.h"

constexpr int kDepth = DNDETR_VECTOR == 64 ? 8 : 4;  // channels of a key's gradient that are summed together

template <class Real>
constexpr int kTile = (kRows + kLanes<Real> - 1) / kLanes<Real> * kLanes<Real>;  // from one column of a tile to the next

// to [R, kPanel] = query columns [width, kTile] x key columns [width, kPanel], N registers of keys.
template <int R, int N, class Real>
DNDETR_PRODUCT void score(const Real* query, const Real* keys, int width, Real* to) {
  Reals<Real> sum[R][N];
  load<R, N, Real>(nullptr, 0, sum);
  multiply<1, kTile<Real>>(query, keys, kPanel<Real>, width, sum);
  store<R, N, Real>(sum, to, kPanel<Real>);
}

// to [R, stride] += weights [R, kPanel] x rows [count, stride], N registers of channels.
template <int R, int N, class Real>
DNDETR_PRODUCT void mix(const Real* weights, const Real* rows, int stride, int count, Real* to) {
  Reals<Real> sum[R][N];
  load<R, N, Real>(to, stride, sum);
  multiply<kPanel<Real>, 1>(weights, rows, stride, count, sum);
  store<R, N, Real>(sum, to, stride);
}

// to [width, kPanel] += columns [width, kTile] x slopes [R, kPanel], N registers of keys.
template <int R, int N, class Real>
DNDETR_PRODUCT void spread(const Real* columns, int width, const Real* slopes, Real* to) {
  for (int d = 0; d < width; d += kDepth, columns += kDepth * kTile<Real>, to += kDepth * kPanel<Real>) {
    Reals<Real> sum[kDepth][N];
    load<kDepth, N, Real>(to, kPanel<Real>, sum);
    multiply<kTile<Real>, 1>(columns, slopes, kPanel<Real>, R, sum);
    store<kDepth, N, Real>(sum, to, kPanel<Real>);
  }
}

// Joins the halves of a register, until one number is left.
template <class Join, class Real, class Vector>
DNDETR_KERNEL Real fold(const Vector& x) {
  if constexpr (sizeof(Vector) == 2 * sizeof(Real)) {
    return Join::of(x[0], x[1]);
  } else {
    typedef Real Half __attribute__((vector_size(sizeof(Vector) / 2)));
    Half half[2];
    std::memcpy(half, &x, sizeof x);
    return fold<Join, Real>(Join::of(half[0], half[1]));
  }
}
struct Sum {
  template <class Value>
  static DNDETR_KERNEL Value of(Value a, Value b) {
    return a + b;
  }
};
struct Highest {
  template <class Value>
  static DNDETR_KERNEL Value of(Value a, Value b) {
    return a > b ? a : b;
  }
};

DNDETR_KERNEL int whole(int count, int unit) { return (count + unit - 1) / unit * unit; }

// One row of an array, from and to the computing type.
template <class Real>
DNDETR_TARGET void load_row(const Heads& x, int b, int head, int index, int width, Real* to) {
  const std::int64_t place = b * x.image + head * x.head + index * x.row;
  DNDETR_WITH_ELEMENT(x.array.dtype, load_row(static_cast<const Element*>(x.array.data) + place, width, to))
}
template <class Real>
DNDETR_TARGET void store_row(const Real* from, int width, const Heads& x, int b, int head, int index) {
  const std::int64_t place = b * x.image + head * x.head + index * x.row;
  DNDETR_WITH_ELEMENT(x.array.dtype, store_row(from, width, static_cast<Element*>(x.array.data) + place))
}

// The same of an array in two parts.
template <class Real>
DNDETR_KERNEL void load_row(const Heads (&x)[2], int b, int head, int index, const int (&widths)[2], Real* to) {
  load_row(x[0], b, head, index, widths[0], to);
  if (widths[1]) load_row(x[1], b, head, index, widths[1], to + widths[0]);
}
template <class Real>
DNDETR_KERNEL void store_row(const Real* from, const int (&widths)[2], const Heads (&x)[2], int b, int head, int index) {
  store_row(from, widths[0], x[0], b, head, index);
  if (widths[1]) store_row(from + widths[0], widths[1], x[1], b, head, index);
}
