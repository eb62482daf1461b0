// What attention is made of: products whose sums stay in registers, copies of rows. Included once per instruction set.

constexpr int kRows = DNDETR_VECTOR == 64 ? 12 : 6;  // two registers for each of them fill most of 32, or of 16
constexpr int kDepth = DNDETR_VECTOR == 64 ? 8 : 4;  // channels of a key's gradient that are summed together

template <class Real>
constexpr int kLanes = Registers<Real>::lanes;
template <class Real>
constexpr int kPanel = 2 * kLanes<Real>;  // keys
template <class Real>
constexpr int kTile = (kRows + kLanes<Real> - 1) / kLanes<Real> * kLanes<Real>;  // from one column of a tile to the next

// c[r][n] += sum over k < depth of a[r * Row + k * Step] * b[k * stride + lanes of n].
template <int Row, int Step, int R, int N, class Real>
DNDETR_KERNEL void multiply(const Real* a, const Real* b, int stride, int depth, Reals<Real> (&c)[R][N]) {
  for (int k = 0; k < depth; ++k, a += Step, b += stride) {
    Reals<Real> x[N];
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) x[n] = at(b + n * kLanes<Real>);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n) c[r][n] += a[r * Row] * x[n];
    }
  }
}

template <int R, int N, class Real>
DNDETR_KERNEL void load(const Real* from, int stride, Reals<Real> (&c)[R][N]) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) c[r][n] = from ? at(from + r * stride + n * kLanes<Real>) : Reals<Real>{};
  }
}
template <int R, int N, class Real>
DNDETR_KERNEL void store(const Reals<Real> (&c)[R][N], Real* to, int stride) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) at(to + r * stride + n * kLanes<Real>) = c[r][n];
  }
}

// Functions of their own, so that nothing but sums competes for registers.
#define DNDETR_PRODUCT __attribute__((noinline)) DNDETR_TARGET

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

#undef DNDETR_PRODUCT

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

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define DNDETR_SHUFFLES
#endif
#endif

#ifdef DNDETR_SHUFFLES
// Swaps the upper lanes of each 2 Step of one register with the lower ones of the other.
template <int Step, class Vector, int... Lane>
DNDETR_KERNEL void swap_lanes(Vector& a, Vector& b, std::integer_sequence<int, Lane...>) {
  constexpr int kCount = sizeof...(Lane);
  const Vector low = __builtin_shufflevector(a, b, (Lane & Step ? kCount + (Lane ^ Step) : Lane)...);
  b = __builtin_shufflevector(a, b, (Lane & Step ? kCount + Lane : Lane ^ Step)...);
  a = low;
}
template <int Step, int N, class Vector>
DNDETR_KERNEL void transpose(Vector (&x)[N]) {
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i) {
    if (!(i & Step)) swap_lanes<Step>(x[i], x[i + Step], std::make_integer_sequence<int, N>());
  }
  if constexpr (Step > 1) transpose<Step / 2>(x);
}
#endif

// from [rows, stride] -> to [columns, height], zeros where there are no rows up to whole registers, and in rows of `to`
// from `filled` on. Strides are whole registers.
template <class Real>
DNDETR_TARGET void transpose(const Real* from, int stride, int rows, int filled, int columns, Real* to, int height) {
  constexpr int kCount = kLanes<Real>;
  for (int r = 0; r < rows; r += kCount) {
    for (int d = 0; d < columns; d += kCount) {
      Reals<Real> x[kCount];
#ifdef DNDETR_SHUFFLES
#pragma GCC unroll 16
      for (int i = 0; i < kCount; ++i) x[i] = r + i < rows ? at(from + (r + i) * stride + d) : Reals<Real>{};
      transpose<kCount / 2>(x);
#else
      for (int i = 0; i < kCount; ++i) {
        for (int l = 0; l < kCount; ++l) x[i][l] = r + l < rows ? from[(r + l) * stride + d + i] : Real(0);
      }
#endif
#pragma GCC unroll 16
      for (int i = 0; i < kCount; ++i) {
        if (d + i < columns) at(to + (d + i) * height + r) = d + i < filled ? x[i] : Reals<Real>{};
      }
    }
  }
}

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
