// The tensor cores' products of small matrices (csrc/common/mma.cuh), from what the lanes of a warp hold.
#pragma once

#include <array>

#include "common/mma.cuh"
#include "cuda_on_host.h"

namespace dndetr {

namespace emulator_mma {

using Lanes = std::array<std::uint64_t, emulator::kWarpSize>;

// Two words of every lane.
inline Lanes of_all(std::uint32_t low, std::uint32_t high) {
  return emulator::exchange(low | std::uint64_t(high) << 32, [](const emulator::Fibre* warp, unsigned, int turn) {
    Lanes words;
    for (unsigned i = 0; i < emulator::kWarpSize; ++i) words[i] = warp[i].exchange[turn];
    return words;
  });
}
inline std::uint32_t word(std::uint64_t two, unsigned which) { return std::uint32_t(two >> (32 * which)); }

// sum += a b, where elements(lane of a, lane of b, i / 2, k) has an element of each.
template <int Depth, class Elements>
void add_products(float (&sum)[4], const Elements& elements) {
  const unsigned lane = emulator::running % emulator::kWarpSize, line = lane / 4, place = lane % 4;
  for (unsigned i = 0; i < 4; ++i) {
    for (unsigned k = 0; k < Depth; ++k) {
      const auto [a, b] = elements(line * 4, (2 * place + i % 2) * 4, i / 2, k);
      sum[i] += a * b;
    }
  }
}

}  // namespace emulator_mma

inline void multiply_add(float (&sum)[4], const float (&a)[4], float b0, float b1) {
  using namespace emulator_mma;
  const auto bits = [](float x) { return bit_cast<std::uint32_t>(x); };
  const Lanes near = of_all(bits(a[0]), bits(a[1])), next = of_all(bits(a[2]), bits(a[3])), right = of_all(bits(b0), bits(b1));
  // As the hardware takes them: what lies beyond eleven digits is left out.
  const auto cut = [](std::uint32_t x) { return bit_cast<float>(x & ~0x1fffu); };
  add_products<8>(sum, [&](unsigned from_a, unsigned from_b, unsigned half, unsigned k) {
    return std::pair(cut(word((k < 4 ? near : next)[from_a + k % 4], half)), cut(word(right[from_b + k % 4], k / 4)));
  });
}

template <class Element>
void multiply_add(float (&sum)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
  using namespace emulator_mma;
  const Lanes near = of_all(a[0], a[1]), next = of_all(a[2], a[3]), right = of_all(b0, b1);
  const auto half_of = [](std::uint32_t x, unsigned k) { return widen(Element{std::uint16_t(x >> (16 * (k % 2)))}); };
  add_products<16>(sum, [&](unsigned from_a, unsigned from_b, unsigned half, unsigned k) {
    const unsigned lane = k % 8 / 2;
    return std::pair(half_of(word((k < 8 ? near : next)[from_a + lane], half), k),
                     half_of(word(right[from_b + lane], k / 8), k));
  });
}

}  // namespace dndetr
