// Matrices times matrices, in panels of two registers. Included once per instruction set, after vectors.h.

#include "products.h"

constexpr int kRowUnit = kRows / 3;  // heights of blocks are multiples of it
constexpr BlockShape kShape = {kRowUnit, kPanel<float>};

// Sums over columns: to [R, kPanel] = a [R, panels of columns] x b [columns, kPanel]. a is [panels, rows, kPanel], its panels
// `from_panel` apart. Rounding errors grow with the length of a sum, so 128 columns are summed by themselves.
template <int R>
DNDETR_PRODUCT void product(const float* a, std::int64_t from_panel, const float* b, int panels, float* to) {
  constexpr int kWide = kPanel<float>, kTogether = 128 / kWide;
  for (int first = 0; first < panels; first += kTogether) {
    Reals<float> sum[R][2] = {};
    for (int p = first; p < std::min(first + kTogether, panels); ++p, a += from_panel, b += kWide * kWide) {
      multiply<kWide, 1>(a, b, kWide, kWide, sum);
    }
    if (first) {
      for (int r = 0; r < R; ++r) {
        for (int n = 0; n < 2; ++n) sum[r][n] += at(to + r * kWide + n * kLanes<float>);
      }
    }
    store<R, 2, float>(sum, to, kWide);
  }
}

// The same of `height` rows, a multiple of kRowUnit.
DNDETR_TARGET void row_products(const float* a, std::int64_t from_panel, const float* b, int panels, int height, float* to) {
  for (int r = 0; r < height;) {
    // Two middle heights take less time than a full and a low one.
    const int left = height - r, rows = left >= kRows && left != kRows + kRowUnit ? kRows : std::min(left, 2 * kRowUnit);
    const auto run = rows == kRows ? product<kRows> : rows == kRowUnit ? product<kRowUnit> : product<2 * kRowUnit>;
    run(a + r * kPanel<float>, from_panel, b, panels, to + r * kPanel<float>);
    r += rows;
  }
}

// Sums over rows: sums [kPanel, kPanel] += transposed a [rows, kPanel] x b [rows, kPanel]. These rows are summed by
// themselves first: so many at a time make for smaller rounding errors.
constexpr int kSumRows = 8;
DNDETR_PRODUCT void sum_product(const float* a, const float* b, int rows, float* sums) {
  constexpr int kWide = kPanel<float>;
  Reals<float> sum[kSumRows][2] = {};
  multiply<1, kWide>(a, b, kWide, rows, sum);
  for (int r = 0; r < kSumRows; ++r) {
    for (int n = 0; n < 2; ++n) sum[r][n] += at(sums + r * kWide + n * kLanes<float>);
  }
  store<kSumRows, 2, float>(sum, sums, kWide);
}
DNDETR_TARGET void column_products(const float* a, const float* b, int rows, float* sums) {
  for (int r = 0; r < kPanel<float>; r += kSumRows) sum_product(a + r, b, rows, sums + r * kPanel<float>);
}

#undef DNDETR_PRODUCT
