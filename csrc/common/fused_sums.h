// Products and sums may fuse in what follows: results need not be the same on every instruction set, and are more precise.
// For kernels that make no such promise; included after the standard headers and before what is to be fused.
#pragma once

#if defined(__clang__)
#pragma clang fp contract(fast)
#else
#pragma GCC optimize("fp-contract=fast")
#endif
