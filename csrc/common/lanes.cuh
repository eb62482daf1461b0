// What lanes of a warp do together: vector loads, sums over a team of lanes, vector reductions to global memory.
#pragma once

#include <cstdint>

#include "floats.h"

namespace dndetr {

constexpr unsigned kWarp = 0xffffffffu;

// N channels of one type, read and written in one go (16 bytes or fewer).
template <class Element, int N>
struct alignas(sizeof(Element) * N) Vector {
  Element at[N];
};

// A pointer that the compiler keeps as it is. What it knows to be alike in all of a block's threads it would add again with
// each of a lane's indices, four instructions where one is enough.
template <class T>
__device__ __forceinline__ T* kept_whole(T* pointer) {
#ifdef __CUDA_ARCH__
  asm("" : "+l"(pointer));
#endif
  return pointer;
}

// A vector through the read-only path of the cache.
template <class Element, int N>
__device__ __forceinline__ Vector<Element, N> load_vector(const Vector<Element, N>* from) {
  static_assert(sizeof(*from) == 16 || sizeof(*from) == 8);
  if constexpr (sizeof(*from) == 16) {
    return bit_cast<Vector<Element, N>>(__ldg(reinterpret_cast<const uint4*>(from)));
  } else {
    return bit_cast<Vector<Element, N>>(__ldg(reinterpret_cast<const uint2*>(from)));
  }
}

// A vector's channels as floats. Two of bfloat16 are one word, of which each needs a single instruction.
template <class Element, int N>
__device__ __forceinline__ void widen_to(const Vector<Element, N>& from, float (&to)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) to[i] = widen(from.at[i]);
}
template <int N>
__device__ __forceinline__ void widen_to(const Vector<BFloat16, N>& from, float (&to)[N]) {
  struct Words {
    std::uint32_t at[N / 2];
  };
  const Words words = bit_cast<Words>(from);
#pragma unroll
  for (int i = 0; i < N / 2; ++i) {
    to[2 * i] = bit_cast<float>(words.at[i] << 16);
    to[2 * i + 1] = bit_cast<float>(words.at[i] & 0xffff0000u);
  }
}

// Team: lanes (a power of two, aligned) that each end up with the result.
template <int Team>
__device__ __forceinline__ float sum_over(float x) {
#pragma unroll
  for (int step = Team / 2; step > 0; step /= 2) x += __shfl_xor_sync(kWarp, x, step);
  return x;
}
template <int Team>
__device__ __forceinline__ float max_over(float x) {
#pragma unroll
  for (int step = Team / 2; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(kWarp, x, step));
  return x;
}
template <int Team>
__device__ __forceinline__ unsigned max_over(unsigned x) {
#pragma unroll
  for (int step = Team / 2; step > 0; step /= 2) x = max(x, __shfl_xor_sync(kWarp, x, step));
  return x;
}

// Two to the x; zero where that is no normal number.
__device__ __forceinline__ float exp2_of(float x) {
#ifdef __CUDA_ARCH__
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  const float result = exp2f(x);
  return result < 0x1p-126f ? 0.0f : result;  // a NaN stays
#endif
}

// The smallest number of a warp, on every lane: one instruction from sm_80 on (REDUX), five shuffles before.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#define WITHOUT_REDUX
#endif
__device__ __forceinline__ unsigned min_of_warp(unsigned x) {
#ifdef WITHOUT_REDUX
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x = min(x, __shfl_xor_sync(kWarp, x, step));
  return x;
#else
  return __reduce_min_sync(kWarp, x);
#endif
}

// Sums of N values over a team, scattered: afterwards x[0..] of lane i are the sums numbered i * N / Team and up. Half
// of what a lane holds changes hands at each step, so N - 1 shuffles do what N butterflies would.
template <int Team, int N>
__device__ __forceinline__ void scatter_sums(float (&x)[N], int lane) {
  int held = N;
#pragma unroll
  for (int step = Team / 2; step > 0; step /= 2) {
    if (held == 1) {
      x[0] += __shfl_xor_sync(kWarp, x[0], step);
      continue;
    }
    held /= 2;
    const bool upper = (lane & step) != 0;
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      if (i < held) {
        const float given = upper ? x[i] : x[i + held], kept = upper ? x[i + held] : x[i];
        x[i] = kept + __shfl_xor_sync(kWarp, given, step);
      }
    }
  }
}

// Adds four floats to global memory that this kernel never reads, without waiting; `to` is aligned to 16 bytes.
__device__ __forceinline__ void add_quad(float* to, float a, float b, float c, float d) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  // One instruction. No clobber of memory: loads of the next samples may pass it.
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "f"(a), "f"(b),
               "f"(c), "f"(d));
#else
  atomicAdd(to, a), atomicAdd(to + 1, b), atomicAdd(to + 2, c), atomicAdd(to + 3, d);
#endif
}

}  // namespace dndetr
