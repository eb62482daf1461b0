// CUDA kernels as ordinary C++: a block's threads are fibres that take turns, and meet at shuffles and barriers.
//
// It reports what a GPU would not: threads that do not all come to a shuffle or a barrier, and a read outside the memory
// that was declared readable. Threads may take turns in either order: results that differ betray a missing barrier.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <type_traits>
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
struct float2 {
  float x, y;
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

using std::max;
using std::min;

namespace emulator {

constexpr unsigned kWarpSize = 32;
constexpr std::size_t kStack = 64 * 1024;

enum class Stop { warp, block, end };

// A fibre is entered once by its context, which asks the system, and then by jumps, which do not.
struct Fibre {
  ucontext_t context;
  jmp_buf place;
  bool entered;
  std::vector<char> stack = std::vector<char>(kStack);
  Stop stop;
  int meetings;
  std::uint64_t exchange[2];  // by turns, so that a thread ahead does not overwrite what others still read
};

inline jmp_buf scheduler;
inline std::vector<Fibre> fibres;
inline unsigned running = 0;
inline bool any_thread[2];
inline int barriers = 0;
inline std::function<void()> body;
inline std::vector<std::pair<std::uintptr_t, std::uintptr_t>> readable;
inline bool descending = false, reads_outside = false;
inline std::int64_t sums = 0;  // numbers added to global memory, of which there are whole ones of 64 bits, and floats

inline void enter() {
  body();
  fibres[running].stop = Stop::end;
  _longjmp(scheduler, 1);
}

inline void meet(Stop stop) {
  Fibre& fibre = fibres[running];
  fibre.stop = stop;
  ++fibre.meetings;
  if (_setjmp(fibre.place) == 0) _longjmp(scheduler, 1);
}

// Lets the running thread go on to its next meeting.
inline void go_on() {
  Fibre& fibre = fibres[running];
  if (_setjmp(scheduler) != 0) return;
  if (fibre.entered) _longjmp(fibre.place, 1);
  fibre.entered = true;
  setcontext(&fibre.context);
}

// Lets a warp's threads run to their next meeting -> where that is.
inline Stop run_warp(unsigned first) {
  for (unsigned turn = 0; turn < kWarpSize; ++turn) {
    running = first + (descending ? kWarpSize - 1 - turn : turn);
    threadIdx.x = running;
    go_on();
  }
  for (unsigned i = first; i < first + kWarpSize; ++i) {
    if (fibres[i].stop != fibres[first].stop || fibres[i].meetings != fibres[first].meetings) {
      throw std::runtime_error("threads of a warp went apart at a shuffle or barrier");
    }
  }
  return fibres[first].stop;
}

inline void run_block(unsigned threads) {
  if (fibres.size() < threads) fibres.resize(threads);
  any_thread[0] = any_thread[1] = false;
  barriers = 0;
  for (unsigned i = 0; i < threads; ++i) {
    Fibre& fibre = fibres[i];
    fibre.meetings = 0;
    fibre.entered = false;
    getcontext(&fibre.context);
    fibre.context.uc_stack.ss_sp = fibre.stack.data();
    fibre.context.uc_stack.ss_size = kStack;
    fibre.context.uc_link = nullptr;
    makecontext(&fibre.context, enter, 0);
  }
  const unsigned warps = threads / kWarpSize;
  for (bool more = true; more; ++barriers) {
    unsigned ended = 0;
    for (unsigned turn = 0; turn < warps; ++turn) {
      const unsigned first = (descending ? warps - 1 - turn : turn) * kWarpSize;
      Stop stop;
      do stop = run_warp(first);
      while (stop == Stop::warp);
      ended += stop == Stop::end;
    }
    if (ended != 0 && ended != warps) throw std::runtime_error("a warp ended while others wait at a barrier");
    more = ended == 0;
    any_thread[(barriers + 1) % 2] = false;
  }
}

template <class Body>
void launch(unsigned blocks, unsigned threads, const Body& kernel) {
  blockDim.x = threads;
  body = kernel;
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) run_block(threads);
}

// Every lane's word, given to read(array of the warp's fibres, turn) once all have come.
template <class Read>
auto exchange(std::uint64_t word, const Read& read) {
  const unsigned self = running;
  const int turn = fibres[self].meetings % 2;
  fibres[self].exchange[turn] = word;
  meet(Stop::warp);
  return read(fibres.data() + self / kWarpSize * kWarpSize, self % kWarpSize, turn);
}

}  // namespace emulator

template <class Word>
Word __shfl_xor_sync(unsigned, Word x, int step) {
  std::uint32_t bits;
  static_assert(sizeof bits == sizeof x);
  std::memcpy(&bits, &x, sizeof x);
  bits = emulator::exchange(bits, [=](const emulator::Fibre* warp, unsigned lane, int turn) {
    return static_cast<std::uint32_t>(warp[lane ^ step].exchange[turn]);
  });
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
template <class Word>
Word __shfl_sync(unsigned, Word x, int from) {
  std::uint32_t bits;
  static_assert(sizeof bits == sizeof x);
  std::memcpy(&bits, &x, sizeof x);
  bits = emulator::exchange(bits, [=](const emulator::Fibre* warp, unsigned, int turn) {
    return static_cast<std::uint32_t>(warp[from].exchange[turn]);
  });
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline unsigned __ballot_sync(unsigned, bool x) {
  return emulator::exchange(x, [](const emulator::Fibre* warp, unsigned, int turn) {
    unsigned bits = 0;
    for (unsigned i = 0; i < emulator::kWarpSize; ++i) bits |= unsigned(warp[i].exchange[turn] != 0) << i;
    return bits;
  });
}
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned chosen) {
  const std::uint64_t bytes = low | std::uint64_t(high) << 32;
  unsigned found = 0;
  for (int i = 0; i < 4; ++i) found |= unsigned(bytes >> (8 * (chosen >> (4 * i) & 7)) & 0xff) << (8 * i);
  return found;
}
inline int __ffs(int x) { return __builtin_ffs(x); }
template <class Word>
Word __reduce_add_sync(unsigned, Word x) {
  return emulator::exchange(std::uint32_t(x), [](const emulator::Fibre* warp, unsigned, int turn) {
    std::uint32_t sum = 0;
    for (unsigned i = 0; i < emulator::kWarpSize; ++i) sum += std::uint32_t(warp[i].exchange[turn]);
    return Word(sum);
  });
}
inline unsigned __reduce_or_sync(unsigned, unsigned x) {
  return emulator::exchange(x, [](const emulator::Fibre* warp, unsigned, int turn) {
    std::uint64_t bits = 0;
    for (unsigned i = 0; i < emulator::kWarpSize; ++i) bits |= warp[i].exchange[turn];
    return static_cast<unsigned>(bits);
  });
}
inline unsigned __reduce_min_sync(unsigned, unsigned x) {
  return emulator::exchange(x, [](const emulator::Fibre* warp, unsigned, int turn) {
    auto low = warp[0].exchange[turn];
    for (unsigned i = 1; i < emulator::kWarpSize; ++i) low = std::min(low, warp[i].exchange[turn]);
    return static_cast<unsigned>(low);
  });
}
inline void __syncwarp() { emulator::meet(emulator::Stop::warp); }
inline void __syncthreads() { emulator::meet(emulator::Stop::block); }
inline int __syncthreads_or(int x) {
  const int turn = emulator::barriers % 2;
  if (x) emulator::any_thread[turn] = true;
  emulator::meet(emulator::Stop::block);
  return emulator::any_thread[turn];
}

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
  emulator::sums += sizeof(T) == 8 || !std::is_integral_v<T>;
  *to += x;
}
template <class T>
void atomicOr(T* to, T x) {
  *to |= x;
}
template <class T>
void atomicMin(T* to, T x) {
  *to = std::min(*to, x);
}
inline long long __float2ll_rn(float x) { return std::llrint(x); }
