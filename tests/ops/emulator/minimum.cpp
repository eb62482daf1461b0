// The smallest number of a warp (csrc/common/lanes.cuh), run on the host.
#include "cuda_on_host.h"

#include "common/lanes.cuh"

extern "C" void minima(const unsigned* words, unsigned* found) {
  emulator::launch(1, emulator::kWarpSize, [=] { found[threadIdx.x] = dndetr::min_of_warp(words[threadIdx.x]); });
}
