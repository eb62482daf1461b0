// Products whose sums stay in registers, and transposed copies. Included once per instruction set, after vectors.h.

constexpr int kRows = DNDETR_VECTOR == 64 ? 12 : 6;  // two registers for each of them fill most of 32, or of 16

template <class Real>
constexpr int kLanes = Registers<Real>::lanes;
template <class Real>
constexpr int kPanel = 2 * kLanes<Real>;  // columns that are summed together

// Functions of their own, so that nothing but sums competes for registers.
#define DNDETR_PRODUCT __attribute__((noinline)) DNDETR_TARGET

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
