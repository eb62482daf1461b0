// A row of pixels through the map of its image's colours, on one instruction set; included as vectors.h says.

#include "common/vectors.h"

// The register's worth of numbers that begins anywhere.
template <class Real>
DNDETR_KERNEL Reals<Real> read(const Real* from) {
  Reals<Real> x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

// pixels [count, 3] -> out [count, 3]; taps as of one image.
//
// Numbers lie as they do in memory, colours side by side. So red, green and blue of a number's pixel are at three of five
// places, from two before it to two after it; the taps of the other two are zero.
template <class Element>
DNDETR_TARGET void normalise_row(const std::uint8_t* pixels, int count, const Computing<Element>* taps, Element* out) {
  using Real = Computing<Element>;
  constexpr int kLanes = Registers<Real>::lanes;
  static_assert(kPeriod % kLanes == 0);
  alignas(64) Real colours[kMargin + kPiece + kMargin] = {};
  alignas(64) Real results[kPiece];
  for (std::int64_t first = 0, end = std::int64_t(count) * 3; first < end; first += kPiece) {
    const int numbers = static_cast<int>(std::min<std::int64_t>(kPiece, end - first));
    for (int n = 0; n < numbers; ++n) colours[kMargin + n] = pixels[first + n];
    for (int group = 0; group < numbers; group += kPeriod) {
      for (int n = 0; n < kPeriod; n += kLanes) {
        Reals<Real> sum{};
        for (int tap = 0; tap < kTaps; ++tap) {
          sum += read(taps + tap * kPeriod + n) * read(colours + kMargin + group + n + tap - kTaps / 2);
        }
        at(results + group + n) = sum + read(taps + kTaps * kPeriod + n);
      }
    }
    store_row(results, numbers, out + first);
  }
}
