// Gradients of a linear layer's weights: panels, and tiles where two of them meet. Included once per instruction set.

#include "common/vectors.h"

#include "common/matrix_products.h"

// `count` rows of `columns` numbers -> panels [panels, rows, kPanel] from `to` on, zeros where there are no columns.
DNDETR_TARGET void copy_to_panels(const float* from, int columns, int count, std::int64_t rows, float* to) {
  constexpr int kWide = kPanel<float>;
  const int whole = columns / kWide * kWide;
  for (int r = 0; r < count; ++r, from += columns, to += kWide) {
    float* panel = to;
    for (int c = 0; c < whole; c += kWide, panel += rows * kWide) std::memcpy(panel, from + c, kWide * sizeof(float));
    if (columns > whole) {
      std::memset(panel, 0, kWide * sizeof(float));
      std::memcpy(panel, from + whole, (columns - whole) * sizeof(float));
    }
  }
}

// sums [kPanel] of a panel's rows; several sums at once are sooner done, and have smaller rounding errors.
DNDETR_TARGET void sum_rows(const float* panel, int rows, float* sums) {
  Reals<float> sum[kSumRows][2] = {};
  for (int r = 0; r < rows; ++r, panel += kPanel<float>) {
    for (int n = 0; n < 2; ++n) sum[r % kSumRows][n] += at(panel + n * kLanes<float>);
  }
  for (int n = 0; n < 2; ++n) {
    for (int r = 1; r < kSumRows; ++r) sum[0][n] += sum[r][n];
    at(sums + n * kLanes<float>) = sum[0][n];
  }
}

// tile [kPanel, kPanel] = transposed results [rows, kPanel] x values [rows, kPanel].
DNDETR_TARGET void multiply_panels(const float* results, const float* values, int rows, float* tile) {
  std::memset(tile, 0, kPanel<float> * kPanel<float> * sizeof(float));
  for (int r = 0; r < rows; r += kDepth) {
    const int first = r * kPanel<float>;
    column_products(results + first, values + first, std::min(kDepth, rows - r), tile);
  }
}
