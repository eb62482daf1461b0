// Products of small matrices by the tensor cores, spread over a warp's lanes as mma.m16n8 has them. Lane l is
// (row l / 4, place l % 4); sum [16, 8], floats: columns 2 * place and one more of the rows `row` and `row + 8`.
//
// Of floats, of which 11 digits are multiplied (TF32), among them every number of half precision: a [16, 8]: at[0] row,
// at[1] row + 8, column `place`; at[2] and at[3] the same rows four columns on; b [8, 8]: rows `place` and place + 4,
// column `row`.
//
// Of half precision: a [16, 16]: words of two columns, 2 * place and one more, at[0] of row, at[1] of row + 8; at[2] and
// at[3] the same rows eight columns on; b [16, 8]: words of two rows, 2 * place and one more, and those eight on, of
// column `row`.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "floats.h"

namespace dndetr {

// Rounded to the digits that are multiplied: of others, the tensor cores would leave out the rest.
DNDETR_CONVERT float round_to_tf32(float value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  std::uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return __uint_as_float(bits);
#else
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if ((bits & 0x7f800000u) != 0x7f800000u) bits = (bits + 0x1000u) & ~0x1fffu;
  std::memcpy(&value, &bits, sizeof(bits));
  return value;
#endif
}

#ifdef __CUDACC__
// sum += a b
__device__ __forceinline__ void multiply_add(float (&sum)[4], const float (&a)[4], float b0, float b1) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])), "r"(__float_as_uint(a[3])),
        "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
#endif
}

template <class Element>
__device__ __forceinline__ void multiply_add(float (&sum)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                                             std::uint32_t b1) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
#define DNDETR_MMA(type)                                                                                       \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, " \
      "{%0, %1, %2, %3};"                                                                                      \
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])                                                 \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
  if constexpr (std::is_same_v<Element, BFloat16>) {
    DNDETR_MMA("bf16");
  } else {
    static_assert(std::is_same_v<Element, Float16>);
    DNDETR_MMA("f16");
  }
#undef DNDETR_MMA
#endif
}
#endif

}  // namespace dndetr
