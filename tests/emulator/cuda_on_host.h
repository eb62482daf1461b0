// CUDA kernels as ordinary C++: each warp's 32 threads are fibres that take turns, and meet at shuffles and barriers.
//
// Enough of CUDA for kernels without block-wide barriers. It reports what a GPU would not: a warp whose threads do not
// all come to a shuffle, and a read outside the memory that was declared readable. Threads may take turns in either
// order: results that differ betray a missing barrier.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct float4 {
  float x, y, z, w;
};
struct uint2 {
  unsigned x, y;
};
struct uint4 {
  unsigned x, y, z, w;
};
struct Index {
  unsigned x = 0;
};
inline Index threadIdx, blockIdx, blockDim;

namespace emulator {

constexpr int kWarpSize = 32;

struct Warp {
  ucontext_t scheduler, fibre[kWarpSize];
  std::vector<char> stacks = std::vector<char>(kWarpSize * kStack);
  static constexpr std::size_t kStack = 64 * 1024;
  bool done[kWarpSize];
  int meetings[kWarpSize];
  float exchange[2][kWarpSize];  // by turns, so that a thread ahead does not overwrite what others still read
  int running = 0;
  std::function<void()> body;
};
inline Warp warp;
inline std::vector<std::pair<std::uintptr_t, std::uintptr_t>> readable;
inline bool descending = false;

inline void enter() {
  warp.body();
  warp.done[warp.running] = true;
}

inline void meet() {
  ++warp.meetings[warp.running];
  swapcontext(&warp.fibre[warp.running], &warp.scheduler);
}

inline void run_warp(unsigned first_thread) {
  for (int i = 0; i < kWarpSize; ++i) {
    warp.done[i] = false;
    warp.meetings[i] = 0;
    getcontext(&warp.fibre[i]);
    warp.fibre[i].uc_stack.ss_sp = warp.stacks.data() + i * Warp::kStack;
    warp.fibre[i].uc_stack.ss_size = Warp::kStack;
    warp.fibre[i].uc_link = &warp.scheduler;
    makecontext(&warp.fibre[i], enter, 0);
  }
  for (bool more = true; more;) {
    for (int turn = 0; turn < kWarpSize; ++turn) {
      const int i = descending ? kWarpSize - 1 - turn : turn;
      warp.running = i;
      threadIdx.x = first_thread + i;
      swapcontext(&warp.scheduler, &warp.fibre[i]);
    }
    for (int i = 0; i < kWarpSize; ++i) {
      if (warp.done[i] != warp.done[0] || warp.meetings[i] != warp.meetings[0]) {
        throw std::runtime_error("threads of a warp went apart at a shuffle or barrier");
      }
    }
    more = !warp.done[0];
  }
}

template <class Body>
void launch(unsigned blocks, unsigned threads, const Body& body) {
  blockDim.x = threads;
  warp.body = body;
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
    for (unsigned first = 0; first < threads; first += kWarpSize) run_warp(first);
  }
}

inline bool reads_outside = false;

}  // namespace emulator

inline float __shfl_xor_sync(unsigned, float x, int step) {
  using emulator::warp;
  const int lane = warp.running, turn = warp.meetings[lane] % 2;
  warp.exchange[turn][lane] = x;
  emulator::meet();
  return warp.exchange[turn][lane ^ step];
}
inline void __syncwarp() { emulator::meet(); }

template <class T>
T __ldg(const T* from) {
  const auto first = reinterpret_cast<std::uintptr_t>(from);
  bool found = first % sizeof(T) == 0;  // aligned, as a GPU requires
  if (found) {
    found = false;
    for (const auto& [low, high] : emulator::readable) found = found || (first >= low && first + sizeof(T) <= high);
  }
  if (!found) {
    emulator::reads_outside = true;
    return T{};
  }
  T x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

template <class T>
void atomicAdd(T* to, T x) {
  *to += x;
}
inline long long __float2ll_rn(float x) { return std::llrint(x); }
