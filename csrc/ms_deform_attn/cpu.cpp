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

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "common/fused_sums.h"

#include "common/floats.h"
#include "common/ops.h"

namespace dndetr {
namespace {

constexpr int kBlock = 16;      // queries prepared together
constexpr int kAlignment = 64;  // bytes, the widest register

template <class Real>
using Index = std::conditional_t<sizeof(Real) == 4, std::int32_t, std::int64_t>;

struct Level {
  int height, width;
  std::int64_t first;  // its first pixel
};

// Whether a head's pixels are copied, next to each other, before they are sampled: a copy reads and writes each of them
// once, and is repaid where each is read often. The limits are as measured; 16-bit elements are converted with each read.
bool worth_copying(const DeformAttn& p, std::int64_t pixels) {
  const int reads = p.value.dtype == Dtype::bfloat16 || p.value.dtype == Dtype::float16 ? 2 : 5;
  return 4.0 * p.queries * p.levels * p.points > double(reads) * pixels;
}

// Memory of one thread, laid out once per call.
template <class Real>
struct Workspace {
  std::vector<Level> levels;
  std::int64_t pixels;
  int samples, stride;                      // stride: channels of a row
  Real *copies = nullptr, *sums = nullptr;  // of pixels -1, 0, ...; null where the tensors themselves serve
  Real *zeros, *nobody;                     // pixel -1 of the tensors
  Real *offset, *weight, *reference;        // [column, query of the block]
  Real *right, *down, *corner, *dot;        // [sample (, corner), query of the block]
  Index<Real>* pixel;                       // of the corners, -1 for none
  Real *row, *partial;                      // one query's channels, and its dots, not yet summed
  std::unique_ptr<void, decltype(&std::free)> memory{nullptr, &std::free};

  Workspace(const DeformAttn& p, bool backward) : samples(p.levels * p.points) {
    pixels = 0;
    for (int l = 0; l < p.levels; ++l) {
      levels.push_back({p.shapes[2 * l], p.shapes[2 * l + 1], pixels});
      pixels += std::int64_t(p.shapes[2 * l]) * p.shapes[2 * l + 1];
    }
    constexpr int kLanes = kAlignment / sizeof(Real);
    stride = (p.width + kLanes - 1) / kLanes * kLanes;
    const bool copied = stride != p.width || worth_copying(p, pixels);
    const bool summed = backward && (copied || p.value.dtype == Dtype::bfloat16 || p.value.dtype == Dtype::float16);
    const std::int64_t block = std::int64_t(samples) * kBlock, all = (pixels + 1) * stride;
    const std::int64_t references = std::int64_t(p.levels) * p.reference_width * kBlock;
    const std::int64_t total = all * (int(copied) + int(summed)) + 18 * block + references + 3 * stride;
    memory.reset(std::aligned_alloc(kAlignment, (total + 1) * sizeof(Real) / kAlignment * kAlignment + kAlignment));
    if (!memory) throw std::bad_alloc();
    Real* next = static_cast<Real*>(memory.get());
    const auto take = [&](std::int64_t count) { return std::exchange(next, next + count); };
    zeros = take(stride);
    nobody = take(stride);
    row = take(stride);
    dot = take(4 * block);
    std::fill(static_cast<Real*>(memory.get()), next, Real(0));
    offset = take(2 * block);
    weight = take(block);
    reference = take(references);
    right = take(block);
    down = take(block);
    corner = take(4 * block);
    pixel = reinterpret_cast<Index<Real>*>(take(4 * block));
    partial = take(block);
    if (copied) copies = take(all);
    if (summed) sums = take(all);
    if (copied) std::fill_n(copies, stride == p.width ? stride : all, Real(0));
  }
};

#define DNDETR_KERNELS "ms_deform_attn/kernel.h"
#include "common/instruction_sets.h"

// Memory of this size is new with each call, and touching it for the first time costs more than adding gradients to it,
// unless it comes in huge pages.
void ask_for_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] std::int64_t bytes) {
#if defined(__linux__)
  constexpr std::uintptr_t kPage = 4096;
  constexpr std::int64_t kLarge = 4 << 20;
  if (bytes < kLarge) return;
  const std::uintptr_t start = reinterpret_cast<std::uintptr_t>(data), first = (start + kPage - 1) / kPage * kPage;
  madvise(reinterpret_cast<void*>(first), (start + bytes - first) / kPage * kPage, MADV_HUGEPAGE);  // a wish: may fail
#endif
}

// Calls run(image, head, workspace) for all of them, by a team of threads if it pays to wake one. Where a workspace has no
// sums of its own, `sums` [B, S, H, D] are zero by then.
template <class Real, class Run>
void for_each_head(const DeformAttn& p, bool backward, int threads, Array sums, const Run& run) {
  constexpr double kWorkPerTeam = 4e6;  // half a millisecond of one thread and more
  constexpr std::int64_t kChunk = 1 << 16;
  const int tasks = p.batch * p.heads;
  const double samples = double(tasks) * p.queries * p.levels * p.points;
  const int team = samples * 4 * p.width * (backward ? 3 : 1) > kWorkPerTeam ? std::min(threads, tasks) : 1;
#pragma omp parallel num_threads(team) if (team > 1)
  {
    const Workspace<Real> workspace(p, backward);
    if (backward && !workspace.sums) {
      Real* const from = static_cast<Real*>(sums.data);
      const std::int64_t total = std::int64_t(tasks) * workspace.pixels * p.width;
#pragma omp single
      ask_for_huge_pages(from, total * sizeof(Real));
#pragma omp for schedule(static)
      for (std::int64_t i = 0; i < total; i += kChunk) std::fill_n(from + i, std::min(kChunk, total - i), Real(0));
    }
#pragma omp for schedule(dynamic)
    for (int task = 0; task < tasks; ++task) run(task / p.heads, task % p.heads, workspace);
  }
}

// float64 is for comparisons: it needs no vectors, whose kernels are a third of what there is to compile.
template <class Real>
auto forward_for([[maybe_unused]] Simd simd) {
  if constexpr (sizeof(Real) == 8) return plain::forward<Real>;
  else return DNDETR_FOR(simd, forward<Real>);
}
template <class Real>
auto backward_for([[maybe_unused]] Simd simd) {
  if constexpr (sizeof(Real) == 8) return plain::backward<Real>;
  else return DNDETR_FOR(simd, backward<Real>);
}

template <class Real>
void run_forward(const DeformAttn& p, Array out, int threads, Simd simd) {
  const auto kernel = forward_for<Real>(simd);
  for_each_head<Real>(p, false, threads, {}, [&](int b, int head, const Workspace<Real>& workspace) {
    kernel(p, out, b, head, workspace);
  });
}

template <class Real>
void run_backward(const DeformAttn& p, Array grad_out, const DeformAttnGrads& grads, int threads, Simd simd) {
  const auto kernel = backward_for<Real>(simd);
  for_each_head<Real>(p, true, threads, grads.value, [&](int b, int head, const Workspace<Real>& workspace) {
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
