// Colours of images from bytes on the CPU, a row at a time; the formula is in dndetr/ops/normalise.py.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "common/blocks.h"
#include "common/floats.h"
#include "common/ops.h"

namespace dndetr {
namespace {

constexpr int kTaps = 5;
constexpr int kPeriod = 48;           // numbers after which colours meet registers as at first, whatever their width
constexpr int kPiece = 16 * kPeriod;  // numbers of a row that stay in the first cache
constexpr int kMargin = 64 / sizeof(float);

template <class Element>
using Computing = std::conditional_t<std::is_same_v<Element, double>, double, float>;

#define DNDETR_KERNELS "normalise/kernel.h"
#include "common/instruction_sets.h"

// What numbers n of a period are made of: [images, kTaps + 1, kPeriod], the last what is added.
template <class Real>
std::vector<Real> taps_of(const Normalise& p) {
  std::vector<Real> taps(std::size_t(p.batch) * (kTaps + 1) * kPeriod, Real(0));
  for (int image = 0; image < p.batch; ++image) {
    const double* map = p.colours + image * 12;
    Real* own = taps.data() + std::size_t(image) * (kTaps + 1) * kPeriod;
    for (int n = 0; n < kPeriod; ++n) {
      const double* row = map + n % 3 * 4;
      for (int colour = 0; colour < 3; ++colour) {
        own[(colour - n % 3 + kTaps / 2) * kPeriod + n] = static_cast<Real>(row[colour]);
      }
      own[kTaps * kPeriod + n] = static_cast<Real>(row[3]);
    }
  }
  return taps;
}

template <class Element>
void run(const Normalise& p, Element* out, int threads, Simd simd) {
  constexpr double kPixelsPerTeam = 1e5;  // waking a team takes longer than a small batch
  constexpr int kRows = 16;
  const auto normalise_one = DNDETR_FOR(simd, normalise_row<Element>);
  const auto taps = taps_of<Computing<Element>>(p);
  const std::int64_t width = std::int64_t(p.width) * 3;
  const int rows = p.batch * p.height;
  const int team = double(rows) * p.width > kPixelsPerTeam ? threads : 1;
  for_all((rows + kRows - 1) / kRows, team, [&](int step) {
    for (int row = step * kRows; row < std::min(rows, (step + 1) * kRows); ++row) {
      const int image = row / p.height;
      const auto valid = [&](int axis, int most) {
        return static_cast<int>(std::clamp<std::int64_t>(p.sizes[image * 2 + axis], 0, most));
      };
      const int count = row % p.height < valid(0, p.height) ? valid(1, p.width) : 0;
      Element* to = out + row * width;
      normalise_one(p.pixels + row * width, count, taps.data() + std::size_t(image) * (kTaps + 1) * kPeriod, to);
      std::memset(static_cast<void*>(to + count * 3), 0, sizeof(Element) * (width - count * 3));
    }
  });
}

}  // namespace

void normalise(const Normalise& p, Array out, int threads, Simd simd) {
  simd = std::min(simd, best_simd());
  DNDETR_WITH_ELEMENT(out.dtype, run(p, static_cast<Element*>(out.data), threads, simd))
}

}  // namespace dndetr
