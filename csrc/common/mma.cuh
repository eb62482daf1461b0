// Products of small matrices of half precision by the tensor cores, spread over a warp's lanes as mma.m16n8k16 has them.
//
// Lane l is (row l / 4, place l % 4). a [16, 16]: at[0] row, at[1] row + 8, at[2] and at[3] the same rows eight columns on,
// two columns from 2 * place each; b [16, 8]: rows 2 * place and one more, eight rows on in the second word, column `row`;
// sum [16, 8]: columns 2 * place and one more of the rows `row` and `row + 8`.
#pragma once

#include <cstdint>
#include <type_traits>

#include "floats.h"

namespace dndetr {

// Two elements in a word, the first one in its lower half.
template <class Element>
DNDETR_CONVERT std::uint32_t pair(Element first, Element second) {
  return std::uint32_t(first.bits) | std::uint32_t(second.bits) << 16;
}
template <class Element>
DNDETR_CONVERT std::uint32_t narrow_pair(float first, float second) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  std::uint32_t word;
  if constexpr (std::is_same_v<Element, BFloat16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  }
  return word;
#else
  return pair(narrow<Element>(first), narrow<Element>(second));
#endif
}

// Two floats as a pair, rounded, and what rounding left of them as another: together twice as many digits, as far as the
// type's smallest numbers let them be.
struct SplitPair {
  std::uint32_t high, low;
};
template <class Element>
DNDETR_CONVERT SplitPair split(float first, float second) {
  const std::uint32_t high = narrow_pair<Element>(first, second);
  const float rest = first - widen(Element{static_cast<std::uint16_t>(high)});
  return {high, narrow_pair<Element>(rest, second - widen(Element{static_cast<std::uint16_t>(high >> 16)}))};
}

#ifdef __CUDACC__
// sum += a b
__device__ __forceinline__ void multiply_add(float (&sum)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                                             std::uint32_t b1, BFloat16) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}
__device__ __forceinline__ void multiply_add(float (&sum)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                                             std::uint32_t b1, Float16) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}
#endif

}  // namespace dndetr
