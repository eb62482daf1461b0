// Attention on the CPU: memory of a thread, instruction sets, threads over images and heads.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <type_traits>
#include <utility>

#include "common/fused_sums.h"

#include "plan.h"
#include "common/floats.h"
#include "common/ops.h"

namespace dndetr {
namespace {

constexpr int kAlignment = 64;  // bytes, the widest register
constexpr int kChunk = 8;       // panels whose scores a tile holds at once: they stay in the first cache

template <class Real>
constexpr Real kInfinity = std::numeric_limits<Real>::infinity();

// Memory of one thread, which only grows. Each array starts at a line.
class Memory {
 public:
  // Room for `count` numbers in up to 16 arrays -> a function that hands out the arrays.
  template <class Real>
  auto room(std::int64_t count) {
    const std::int64_t bytes = whole_lines(count * sizeof(Real)) + 16 * kAlignment;
    if (bytes > size_) {
      bytes_.reset(static_cast<char*>(std::aligned_alloc(kAlignment, bytes)));
      if (!bytes_) throw std::bad_alloc();
      size_ = bytes;
    }
    return [next = bytes_.get()](std::int64_t count) mutable {
      return reinterpret_cast<Real*>(std::exchange(next, next + whole_lines(count * sizeof(Real))));
    };
  }

 private:
  static std::int64_t whole_lines(std::int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

  std::int64_t size_ = 0;
  std::unique_ptr<char, decltype(&std::free)> bytes_{nullptr, &std::free};
};

#define DNDETR_KERNELS "attention/kernel.h"
#include "common/instruction_sets.h"

// Calls run(task, memory) for all tasks, by a team of threads if `products`, of all of them, are worth waking one.
template <class Run>
void for_each_task(int tasks, double products, int threads, const Run& run) {
  constexpr double kProductsPerTeam = 1e7;  // a quarter of a millisecond of one thread
  const int team = products > kProductsPerTeam ? std::min(threads, tasks) : 1;
#pragma omp parallel num_threads(team) if (team > 1)
  {
    Memory memory;
#pragma omp for schedule(dynamic)
    for (int task = 0; task < tasks; ++task) run(task, memory);
  }
}

// Products of the forward pass, at most.
double products(const Attention& p) {
  const double shared = p.keys - double(p.groups) * p.slots;
  const double pairs = p.queries * shared + double(p.groups) * p.slots * p.slots;
  return p.batch * p.heads * pairs * (p.widths[0] + p.widths[1] + p.value_width);
}

}  // namespace

void attention(const Attention& p, Heads out, void* lse, int threads, Simd simd) {
  simd = std::min(simd, best_simd());
  // float64 is for comparisons: it needs no vectors, whose kernels are a third of what there is to compile.
  const auto kernel = p.v.array.dtype == Dtype::float64 ? plain::forward<double> : DNDETR_FOR(simd, forward<float>);
  // Each row is computed alike whatever the parts are; more parts than threads need would only copy keys more often.
  const int heads = std::max(1, p.batch * p.heads), parts = heads >= threads ? 1 : (threads + heads - 1) / heads;
  for_each_task(p.batch * p.heads * parts, products(p), threads, [&](int task, Memory& memory) {
    const int head = task / parts;
    kernel(p, out, lse, head / p.heads, head % p.heads, task % parts, parts, memory);
  });
}

void attention_backward(const Attention& p, Heads grad_out, Heads out, const void* lse, const AttentionGrads& grads,
                        int threads, Simd simd) {
  simd = std::min(simd, best_simd());
  const auto kernel = p.v.array.dtype == Dtype::float64 ? plain::backward<double> : DNDETR_FOR(simd, backward<float>);
  for_each_task(p.batch * p.heads, 2.5 * products(p), threads, [&](int task, Memory& memory) {
    kernel(p, grad_out, out, lse, grads, task / p.heads, task % p.heads, memory);
  });
}

}  // namespace dndetr
