// What the bindings call: launchers that take raw pointers, sizes and strides (in elements), and never see torch.
#pragma once

#include <cstdint>

namespace dndetr {

enum class Simd { plain = 0, avx2 = 1, avx512 = 2 };

// The widest instruction set of this machine that the build has code for.
Simd best_simd();

// cost[m * problem_stride + q * query_stride + t * target_stride], float or double; counts[problems];
// query_of[problems * targets], contiguous.
struct AssignProblems {
  const void* cost;
  bool is_double;
  int problems, queries, targets;
  std::int64_t problem_stride, query_stride, target_stride;
  const std::int32_t* counts;
  std::int32_t* query_of;
};

void assign(const AssignProblems& problems, int threads, Simd simd);

}  // namespace dndetr
