// The tensor cores' product of small matrices (csrc/common/mma.cuh), from what the lanes of a warp hold.
#pragma once

#include <array>

#include "common/mma.cuh"
#include "cuda_on_host.h"

namespace dndetr {

template <class Element>
void multiply_add(float (&sum)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1, Element) {
  using Lanes = std::array<std::uint64_t, emulator::kWarpSize>;
  const auto of_all = [](std::uint64_t word) {
    return emulator::exchange(word, [](const emulator::Fibre* warp, unsigned, int turn) {
      Lanes words;
      for (unsigned i = 0; i < emulator::kWarpSize; ++i) words[i] = warp[i].exchange[turn];
      return words;
    });
  };
  const auto words = [](std::uint32_t low, std::uint32_t high) { return low | std::uint64_t(high) << 32; };
  const Lanes near = of_all(words(a[0], a[1])), next = of_all(words(a[2], a[3])), right = of_all(words(b0, b1));
  const auto element = [](std::uint64_t word, int half, int place) {
    return widen(Element{static_cast<std::uint16_t>(word >> (32 * half + 16 * place))});
  };
  const unsigned lane = emulator::running % emulator::kWarpSize, line = lane / 4, place = lane % 4;
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned column = 2 * place + i % 2;
    for (unsigned k = 0; k < 16; ++k) {
      const unsigned left = line * 4 + k % 8 / 2, above = column * 4 + k % 8 / 2;
      sum[i] += element((k < 8 ? near : next)[left], int(i / 2), int(k % 2)) * element(right[above], int(k / 8), int(k % 2));
    }
  }
}

}  // namespace dndetr
