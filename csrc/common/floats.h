// Element types of tensors, and their conversion: bfloat16 and float16 are bits in memory, float or double in registers.
#pragma once

#include <cstdint>
#include <cstring>

#include "ops.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define DNDETR_CONVERT __host__ __device__ inline __attribute__((always_inline))
#else
#define DNDETR_CONVERT inline __attribute__((always_inline))
#endif

namespace dndetr {

struct BFloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};

template <class To, class From>
DNDETR_CONVERT To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

DNDETR_CONVERT float widen(float x) { return x; }
DNDETR_CONVERT double widen(double x) { return x; }
DNDETR_CONVERT float widen(BFloat16 x) { return bit_cast<float>(std::uint32_t(x.bits) << 16); }
DNDETR_CONVERT float widen(Float16 x) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(x.bits));
#else
  const std::uint32_t sign = std::uint32_t(x.bits & 0x8000u) << 16, rest = std::uint32_t(x.bits & 0x7fffu) << 13;
  // The exponent is rebiased by a multiplication, which also normalises subnormals; all ones stays all ones.
  const std::uint32_t finite = bit_cast<std::uint32_t>(bit_cast<float>(rest) * 0x1p112f);
  return bit_cast<float>(sign | (rest < 0x0f800000u ? finite : rest | 0x7f800000u));
#endif
}

// Rounded to nearest, ties to even.
template <class To, class Real>
DNDETR_CONVERT To narrow(Real x) {
  return static_cast<To>(x);
}
template <>
DNDETR_CONVERT BFloat16 narrow<BFloat16, float>(float x) {
#ifdef __CUDA_ARCH__
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
#else
  const std::uint32_t bits = bit_cast<std::uint32_t>(x);
  const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool number = (bits & 0x7fffffffu) <= 0x7f800000u;
  return {static_cast<std::uint16_t>(number ? rounded : 0x7fc0u)};
#endif
}
template <>
DNDETR_CONVERT Float16 narrow<Float16, float>(float x) {
#ifdef __CUDA_ARCH__
  return {__half_as_ushort(__float2half_rn(x))};
#else
  const std::uint32_t bits = bit_cast<std::uint32_t>(x), sign = (bits >> 16) & 0x8000u, rest = bits & 0x7fffffffu;
  // Subnormal: adding 0.5 leaves the value, rounded, in the lowest bits.
  const std::uint32_t small = bit_cast<std::uint32_t>(bit_cast<float>(rest) + 0.5f) - 0x3f000000u;
  const std::uint32_t normal = (rest - 0x38000000u + 0xfffu + ((rest >> 13) & 1u)) >> 13;
  const std::uint32_t large = rest > 0x7f800000u ? 0x7e00u : 0x7c00u;
  return {static_cast<std::uint16_t>(sign | (rest < 0x38800000u ? small : rest < 0x477ff000u ? normal : large))};
#endif
}
template <>
DNDETR_CONVERT BFloat16 narrow<BFloat16, double>(double x) {
  return narrow<BFloat16>(static_cast<float>(x));
}
template <>
DNDETR_CONVERT Float16 narrow<Float16, double>(double x) {
  return narrow<Float16>(static_cast<float>(x));
}

}  // namespace dndetr

// Runs the statement with ``Element`` as the C++ type of a dtype.
#define DNDETR_WITH_ELEMENT(dtype, ...)                              \
  switch (dtype) {                                                   \
    case Dtype::float32: { using Element = float; __VA_ARGS__; } break;   \
    case Dtype::float64: { using Element = double; __VA_ARGS__; } break;  \
    case Dtype::bfloat16: { using Element = BFloat16; __VA_ARGS__; } break; \
    case Dtype::float16: { using Element = Float16; __VA_ARGS__; } break; \
  }
