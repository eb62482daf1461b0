// Pictures resized on the CPU with Pillow's bits: first along rows, then across them; what is computed is in
// dndetr/ops/resize.py.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "common/floats.h"
#include "common/ops.h"

namespace dndetr {
namespace {

constexpr int kBits = 22;  // of a weight, so that 255 of them and half a unit fit in 32
constexpr std::int32_t kHalf = 1 << (kBits - 1);
constexpr int kPiece = 1024;
constexpr int kWidest = 16;  // lanes of a register

// Where each of `count` new places looks, and with which weights: [taps, padded] each, zero weights beyond its own.
struct Filter {
  int taps, count, padded, low, high;  // low, high: the old places that count, from and to below
  std::vector<std::int32_t> places, weights;

  // A triangle as wide as the wider of an old and a new pixel. Written in the order in which Pillow computes it.
  Filter(int size, float start, float end, int new_size, bool mirrored) : count(new_size), low(size), high(0) {
    padded = (count + kWidest - 1) / kWidest * kWidest;
    const double scale = static_cast<double>(end - start) / count, support = std::max(scale, 1.0), per = 1.0 / support;
    taps = static_cast<int>(std::ceil(support)) * 2 + 1;
    places.assign(std::size_t(taps) * padded, 0);
    weights.assign(std::size_t(taps) * padded, 0);
    std::vector<double> own(taps);
    int most = 1;
    for (int n = 0; n < count; ++n) {
      const double centre = start + (n + 0.5) * scale;
      const int first = std::max(static_cast<int>(centre - support + 0.5), 0);
      const int reach = std::min(static_cast<int>(centre + support + 0.5), size) - first;
      double all = 0;
      for (int tap = 0; tap < reach; ++tap) {
        const double away = std::abs((tap + first - centre + 0.5) * per);
        all += own[tap] = away < 1 ? 1 - away : 0;
      }
      const int at = mirrored ? count - 1 - n : n;
      for (int tap = 0; tap < taps; ++tap) {
        places[std::size_t(tap) * padded + at] = std::min(first + tap, size - 1);
        if (tap >= reach || own[tap] == 0) continue;
        const double share = all != 0 ? own[tap] / all : own[tap];
        weights[std::size_t(tap) * padded + at] = static_cast<std::int32_t>(0.5 + share * (1 << kBits));
        most = std::max(most, tap + 1), low = std::min(low, first + tap), high = std::max(high, first + tap + 1);
      }
    }
    taps = most;  // all further weights are zero
  }
};

#define DNDETR_KERNELS "resize/kernel.h"
#include "common/instruction_sets.h"

}  // namespace

void resize(const Resize& p, const std::uint8_t* pixels, std::uint8_t* out, Simd simd) {
  simd = std::min(simd, best_simd());
  const auto along = DNDETR_FOR(simd, resize_along);
  const auto across = DNDETR_FOR(simd, resize_across);
  const Filter columns(p.width, p.box[0], p.box[2], p.new_width, p.hflip);
  const Filter rows(p.height, p.box[1], p.box[3], p.new_height, p.vflip);
  const std::int64_t width = std::int64_t(columns.padded) * 3 + 4;
  std::vector<std::uint8_t> row(std::size_t(p.width) * 3 + 1), resized(std::size_t(std::max(rows.high - rows.low, 0)) * width);
  for (int y = rows.low; y < rows.high; ++y) {
    std::memcpy(row.data(), pixels + std::int64_t(y) * p.width * 3, std::size_t(p.width) * 3);
    along(row.data(), columns, resized.data() + (y - rows.low) * width);
  }
  std::vector<const std::uint8_t*> seen(rows.taps);
  std::vector<std::int32_t> weights(rows.taps);
  for (int y = 0; y < p.new_height; ++y) {
    int taps = 0;
    for (int tap = 0; tap < rows.taps; ++tap) {
      const std::size_t n = std::size_t(tap) * rows.padded + y;
      if (rows.weights[n] == 0) continue;
      weights[taps] = rows.weights[n];
      seen[taps++] = resized.data() + (rows.places[n] - rows.low) * width;
    }
    across(seen.data(), weights.data(), taps, p.new_width * 3, out + std::int64_t(y) * p.new_width * 3);
  }
}

}  // namespace dndetr
