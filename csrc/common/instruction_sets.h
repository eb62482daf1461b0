// Includes the header DNDETR_KERNELS once per instruction set that this build has code for, each time in a namespace of its
// own; DNDETR_FOR(simd, function) is one of their functions. Include it where those namespaces shall be.
//
// DNDETR_TARGET are the attributes of a function, DNDETR_VECTOR the bytes of a register.

#define DNDETR_TARGET
#define DNDETR_VECTOR 16
namespace plain {
#include DNDETR_KERNELS
}
#undef DNDETR_INLINE
#undef DNDETR_KERNEL
#undef DNDETR_TARGET
#undef DNDETR_VECTOR

#if defined(__x86_64__)
#define DNDETR_TARGET __attribute__((target("avx2,fma")))
#define DNDETR_VECTOR 32
namespace avx2 {
#include DNDETR_KERNELS
}
#undef DNDETR_INLINE
#undef DNDETR_KERNEL
#undef DNDETR_TARGET
#undef DNDETR_VECTOR

#define DNDETR_TARGET __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,fma")))
#define DNDETR_VECTOR 64
namespace avx512 {
#include DNDETR_KERNELS
}
#undef DNDETR_INLINE
#undef DNDETR_KERNEL
#undef DNDETR_TARGET
#undef DNDETR_VECTOR

#define DNDETR_FOR(simd, ...) \
  (simd == Simd::avx512 ? avx512::__VA_ARGS__ : simd == Simd::avx2 ? avx2::__VA_ARGS__ : plain::__VA_ARGS__)
#else
#define DNDETR_FOR(simd, ...) (plain::__VA_ARGS__)
#endif
