// The tensor cores' product of small matrices (csrc/common/mma.cuh), from what the lanes of a warp hold.
#pragma once

#include <array>

#include "common/mma.cuh"
#include "cuda_on_host.h"

namespace dndetr {

inline void multiply_add(float (&sum)[4], const float (&a)[4], float b0, float b1) {
  using Lanes = std::array<std::uint64_t, emulator::kWarpSize>;
  const auto of_all = [](float low, float high) {
    std::uint32_t halves[2];
    std::memcpy(halves, &low, 4), std::memcpy(halves + 1, &high, 4);
    return emulator::exchange(halves[0] | std::uint64_t(halves[1]) << 32,
                              [](const emulator::Fibre* warp, unsigned, int turn) {
                                Lanes words;
                                for (unsigned i = 0; i < emulator::kWarpSize; ++i) words[i] = warp[i].exchange[turn];
                                return words;
                              });
  };
  const Lanes near = of_all(a[0], a[1]), next = of_all(a[2], a[3]), right = of_all(b0, b1);
  // As the hardware takes them: what lies beyond eleven digits is left out.
  const auto element = [](std::uint64_t word, int half) {
    const std::uint32_t bits = std::uint32_t(word >> (32 * half)) & ~0x1fffu;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  };
  const unsigned lane = emulator::running % emulator::kWarpSize, line = lane / 4, place = lane % 4;
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned column = 2 * place + i % 2;
    for (unsigned k = 0; k < 8; ++k) {
      sum[i] += element((k < 4 ? near : next)[line * 4 + k % 4], int(i / 2)) * element(right[column * 4 + k % 4], int(k / 4));
    }
  }
}

}  // namespace dndetr
