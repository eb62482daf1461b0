// Multi-scale deformable attention on the CPU: instruction sets, memory of a thread, threads over images and heads.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>

// Products and sums may fuse here: results need not be the same on every instruction set, and are more precise.
#if defined(__clang__)
#pragma clang fp contract(fast)
#else
#pragma GCC optimize("fp-contract=fast")
#endif

#include "floats.h"
#include "ops.h"

namespace dndetr {
namespace {

constexpr int kBlock = 16;      // queries prepared together
constexpr int kAlignment = 64;  // bytes, the widest register

struct Level {
  int height, width, row;      // row: cells from one line of pixels to the next
  std::int64_t first, pixel;   // its first cell and pixel
};

// Memory of one thread, laid out once per call.
template <class Real>
struct Workspace {
  using Index = std::conditional_t<sizeof(Real) == 4, std::int32_t, std::int64_t>;

  std::vector<Level> levels;  // and one more, where the last one ends
  int stride;                 // channels of a cell
  Real *cells, *grads;
  Real *offset, *weight, *reference;         // [column, query of the block]
  Real *right, *down, *seen, *corner, *dot;  // [sample (, corner), query of the block]
  Index* cell;                               // upper left corner
  Real *row, *partial;                       // one query's channels, and its dots, not yet summed
  std::unique_ptr<void, decltype(&std::free)> memory{nullptr, &std::free};

  Workspace(const DeformAttn& p, bool backward) {
    std::int64_t first = 0, pixel = 0;
    for (int l = 0; l < p.levels; ++l) {
      const int h = p.shapes[2 * l], w = p.shapes[2 * l + 1];
      levels.push_back({h, w, w + 1, first, pixel});
      first += std::int64_t(h + 2) * (w + 1) + 1;
      pixel += std::int64_t(h) * w;
    }
    levels.push_back({0, 0, 0, first, pixel});
    constexpr int kLanes = kAlignment / sizeof(Real);
    stride = (p.width + kLanes - 1) / kLanes * kLanes;
    const std::int64_t block = std::int64_t(p.levels) * p.points * kBlock, all = first * stride;
    const std::int64_t references = std::int64_t(p.levels) * p.reference_width * kBlock;
    const std::int64_t total = all * (backward ? 2 : 1) + 16 * block + references + stride;
    memory.reset(std::aligned_alloc(kAlignment, (total + 1) * sizeof(Real) / kAlignment * kAlignment + kAlignment));
    if (!memory) throw std::bad_alloc();
    Real* next = static_cast<Real*>(memory.get());
    const auto take = [&](std::int64_t count) { return std::exchange(next, next + count); };
    cells = take(all);
    grads = backward ? take(all) : nullptr;
    offset = take(2 * block);
    weight = take(block);
    reference = take(references);
    right = take(block);
    down = take(block);
    seen = take(block);
    corner = take(4 * block);
    dot = take(4 * block);
    cell = reinterpret_cast<Index*>(take(block));
    row = take(stride);
    partial = take(block);
    std::fill_n(cells, all, Real(0));
    std::fill_n(dot, 4 * block, Real(0));
    std::fill_n(row, stride, Real(0));
  }
};

#define DNDETR_TARGET
#define DNDETR_VECTOR 16
namespace plain {
#include "ms_deform_attn_kernel.h"
}
#undef DNDETR_TARGET
#undef DNDETR_VECTOR

#if defined(__x86_64__)
#define DNDETR_TARGET __attribute__((target("avx2,fma")))
#define DNDETR_VECTOR 32
namespace avx2 {
#include "ms_deform_attn_kernel.h"
}
#undef DNDETR_TARGET
#undef DNDETR_VECTOR

#define DNDETR_TARGET __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,fma")))
#define DNDETR_VECTOR 64
namespace avx512 {
#include "ms_deform_attn_kernel.h"
}
#undef DNDETR_TARGET
#undef DNDETR_VECTOR
#endif

template <class Real>
struct Kernels {
  void (*forward)(const DeformAttn&, Array, int, int, const Workspace<Real>&);
  void (*backward)(const DeformAttn&, Array, const DeformAttnGrads&, int, int, const Workspace<Real>&);
};

template <class Real>
Kernels<Real> kernels_for(Simd simd) {
#if defined(__x86_64__)
  if (simd == Simd::avx512) return {avx512::forward<Real>, avx512::backward<Real>};
  if (simd == Simd::avx2) return {avx2::forward<Real>, avx2::backward<Real>};
#endif
  return {plain::forward<Real>, plain::backward<Real>};
}

// Calls run(image, head, workspace) for all of them, by a team of threads if it pays to wake one.
template <class Real, class Run>
void for_each_head(const DeformAttn& p, bool backward, int threads, const Run& run) {
  constexpr double kWorkPerTeam = 8e6;  // about a millisecond of one thread
  const int tasks = p.batch * p.heads;
  const double samples = double(tasks) * p.queries * p.levels * p.points;
  const int team = samples * 4 * p.width * (backward ? 3 : 1) > kWorkPerTeam ? std::min(threads, tasks) : 1;
#pragma omp parallel num_threads(team) if (team > 1)
  {
    const Workspace<Real> workspace(p, backward);
#pragma omp for schedule(dynamic)
    for (int task = 0; task < tasks; ++task) run(task / p.heads, task % p.heads, workspace);
  }
}

template <class Real>
void run_forward(const DeformAttn& p, Array out, int threads, Simd simd) {
  const auto kernel = kernels_for<Real>(simd).forward;
  for_each_head<Real>(p, false, threads,
                      [&](int b, int head, const Workspace<Real>& workspace) { kernel(p, out, b, head, workspace); });
}

template <class Real>
void run_backward(const DeformAttn& p, Array grad_out, const DeformAttnGrads& grads, int threads, Simd simd) {
  const auto kernel = kernels_for<Real>(simd).backward;
  for_each_head<Real>(p, true, threads, [&](int b, int head, const Workspace<Real>& workspace) {
    kernel(p, grad_out, grads, b, head, workspace);
  });
}

}  // namespace

void ms_deform_attn(const DeformAttn& p, Array out, int threads, Simd simd) {
  const auto run = p.value.dtype == Dtype::float64 ? run_forward<double> : run_forward<float>;
  run(p, out, threads, std::min(simd, best_simd()));
}

void ms_deform_attn_backward(const DeformAttn& p, Array grad_out, const DeformAttnGrads& grads, int threads,
                             Simd simd) {
  const auto run = p.value.dtype == Dtype::float64 ? run_backward<double> : run_backward<float>;
  run(p, grad_out, grads, threads, std::min(simd, best_simd()));
}

}  // namespace dndetr
