// Rows of pixels resampled along and across, on one instruction set; included as vectors.h says.

#include "common/vectors.h"

// A row of pixels -> one as wide as the filter says, `out` with room for a byte more. Of a pixel four bytes are read, and
// four written: the next one's, or the margin's, lies under the last.
DNDETR_TARGET void resize_along(const std::uint8_t* row, const Filter& filter, std::uint8_t* out) {
  constexpr int kLanes = Registers<float>::lanes;
  for (int x = 0; x < filter.padded; x += kLanes) {
    Indices<float> red{}, green{}, blue{};
    red += kHalf, green += kHalf, blue += kHalf;
    for (int tap = 0; tap < filter.taps; ++tap) {
      const std::int32_t* place = filter.places.data() + std::int64_t(tap) * filter.padded + x;
      Indices<float> pixel, weight;
      for (int l = 0; l < kLanes; ++l) {
        std::int32_t bytes;
        std::memcpy(&bytes, row + 3 * place[l], sizeof bytes);
        pixel[l] = bytes;
      }
      std::memcpy(&weight, filter.weights.data() + std::int64_t(tap) * filter.padded + x, sizeof weight);
      red += (pixel & 255) * weight;
      green += ((pixel >> 8) & 255) * weight;
      blue += ((pixel >> 16) & 255) * weight;
    }
    const Indices<float> bytes = (red >> kBits) | (green >> kBits) << 8 | (blue >> kBits) << 16;
    for (int l = 0; l < kLanes; ++l) {
      const std::int32_t own = bytes[l];
      std::memcpy(out + 3 * (x + l), &own, sizeof own);
    }
  }
}

template <int Taps>
DNDETR_KERNEL void sum_rows(const std::uint8_t* const* rows, const std::int32_t* weights, int count, std::uint8_t* out) {
  for (int n = 0; n < count; ++n) {
    std::int32_t sum = kHalf;
    for (int tap = 0; tap < Taps; ++tap) sum += rows[tap][n] * weights[tap];
    out[n] = static_cast<std::uint8_t>(sum >> kBits);
  }
}

// Weighted sums of rows of `count` numbers.
DNDETR_TARGET void resize_across(const std::uint8_t* const* rows, const std::int32_t* weights, int taps, int count,
                                 std::uint8_t* __restrict out) {
  if (taps == 2) return sum_rows<2>(rows, weights, count, out);
  if (taps == 3) return sum_rows<3>(rows, weights, count, out);
  std::int32_t sums[kPiece];
  for (int first = 0; first < count; first += kPiece) {
    const int piece = std::min(kPiece, count - first);
    for (int n = 0; n < piece; ++n) sums[n] = kHalf;
    for (int tap = 0; tap < taps; ++tap) {
      for (int n = 0; n < piece; ++n) sums[n] += rows[tap][first + n] * weights[tap];
    }
    for (int n = 0; n < piece; ++n) out[first + n] = static_cast<std::uint8_t>(sums[n] >> kBits);
  }
}
