// 3x3 convolution on the CPU with fewer products (Winograd): tiles, blocks, threads. Formulas are in dndetr/ops/conv3x3.py.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "common/fused_sums.h"

#include "common/blocks.h"
#include "common/floats.h"
#include "common/ops.h"

namespace dndetr {
namespace {

constexpr int kSide = 4;  // of a tile of results
constexpr int kWays = 6;  // that a line of a kernel can be met, so many places a kernel has
constexpr int kKernelPlaces = kWays * kWays;
constexpr std::int64_t kMostPlaces = 16 << 20;  // numbers of transformed windows and gradients that are held at once

// The points 0, +-a, +-b and infinity, at which polynomials are multiplied. Around 1, so that powers stay of one size:
// with 1 and 2 results have 2.5 times the error. All squares are exact.
constexpr float kA = 0.625f, kB = 1.5f, kA2 = kA * kA, kB2 = kB * kB;
constexpr float kPerZero = 1 / (kA2 * kB2), kPerA = 1 / (2 * kA2 * (kA2 - kB2)), kPerB = 1 / (2 * kB2 * (kB2 - kA2));

// [images, height, width, channels]
struct Map {
  float* data;
  int height, width, channels;
};

// Tiles of 4x4 results, the last ones of rows and columns partly outside.
struct Grid {
  int columns, per_image, count;

  explicit Grid(const Conv3x3& p)
      : columns(rounded_up(p.out_width(), kSide) / kSide),
        per_image(rounded_up(p.out_height(), kSide) / kSide * columns),
        count(p.batch * per_image) {}
};

#define DNDETR_KERNELS "conv3x3/kernel.h"
#include "common/instruction_sets.h"

#define DNDETR_STRIDE(simd, p, function) \
  (p.stride == 1 ? DNDETR_FOR(simd, function<1>) : DNDETR_FOR(simd, function<2>))

BlockShape block_shape(Simd simd) { return DNDETR_FOR(simd, kShape); }

// Of a window, in the transformed domain.
std::int64_t places(const Conv3x3& p) { return p.stride == 1 ? 36 : 81; }
std::int64_t kernel_size(const Conv3x3& p) { return std::int64_t(kKernelPlaces) * p.inputs * p.outputs; }

// Threads for a call: waking a team takes longer than a small problem.
int team_of(const Conv3x3& p, int threads) {
  constexpr double kProductsPerTeam = 1e7;
  return double(Grid(p).count) * places(p) * p.inputs * p.outputs > kProductsPerTeam ? threads : 1;
}

// Tiles whose part of a kernel's gradient is summed at once.
int grad_tiles(const Conv3x3& p) {
  const std::int64_t most = std::max<std::int64_t>(kMostPlaces / (places(p) * (p.inputs + p.outputs)), 1);
  return std::min<std::int64_t>(Grid(p).count, rounded_up(most, kMostRows));
}

// One of the two convolutions, whose scratch lies behind the transformed kernel.
class Convolution {
 public:
  Convolution(const Conv3x3& p, int inputs, int outputs, int threads, Simd simd)
      : grid_(p),
        shape_(block_shape(simd)),
        team_(team_of(p, threads)),
        blocks_(grid_.count, outputs, shape_, team_),
        kernel_(kernel_size(p)),
        scratch_(places(p) * blocks_.rows * (inputs + blocks_.group * shape_.panel)) {}

  std::int64_t workspace() const { return kernel_ + team_ * scratch_; }

  template <class Prepare, class Run>
  void operator()(const Map& map, const Map& out, const float* bias, float* workspace, const Prepare& prepare,
                  const Run& run) const {
    for_all(blocks_.panels, team_, prepare);
    for_all(blocks_.count(), team_, [&](int index) {
      run(map, workspace, blocks_[index], bias, out, grid_, workspace + kernel_ + thread_number() * scratch_);
    });
  }

 private:
  Grid grid_;
  BlockShape shape_;
  int team_;
  Blocks blocks_;
  std::int64_t kernel_, scratch_;
};

}  // namespace

Conv3x3Workspace conv3x3_workspace(const Conv3x3& p, int threads, Simd simd) {
  simd = std::min(simd, best_simd());
  const int panel = block_shape(simd).panel;
  return {Convolution(p, p.inputs, p.outputs, threads, simd).workspace(),
          Convolution(p, p.outputs, p.inputs, threads, simd).workspace(),
          places(p) * grad_tiles(p) * (p.inputs + p.outputs) +
              std::int64_t(team_of(p, threads)) * kKernelPlaces * panel * panel};
}

void conv3x3(const Conv3x3& p, float* x, const float* weight, const float* bias, float* out, float* workspace,
             int threads, Simd simd) {
  simd = std::min(simd, best_simd());
  const auto prepare = DNDETR_STRIDE(simd, p, transform_kernel);
  Convolution(p, p.inputs, p.outputs, threads, simd)(
      {x, p.height, p.width, p.inputs}, {out, p.out_height(), p.out_width(), p.outputs}, bias, workspace,
      [&](int panel) { prepare(weight, p.inputs, p.outputs, panel, workspace); }, DNDETR_STRIDE(simd, p, convolve_block));
}

void conv3x3_grad_input(const Conv3x3& p, float* grad_out, const float* weight, float* grad_x, float* workspace,
                        int threads, Simd simd) {
  simd = std::min(simd, best_simd());
  const auto prepare = DNDETR_STRIDE(simd, p, transform_turned_kernel);
  Convolution(p, p.outputs, p.inputs, threads, simd)(
      {grad_out, p.out_height(), p.out_width(), p.outputs}, {grad_x, p.height, p.width, p.inputs}, nullptr, workspace,
      [&](int panel) { prepare(weight, p.inputs, p.outputs, panel, workspace); }, DNDETR_STRIDE(simd, p, grad_input_block));
}

void conv3x3_grad_weight(const Conv3x3& p, float* x, float* grad_out, float* grad_weight, float* workspace,
                         int threads, Simd simd) {
  simd = std::min(simd, best_simd());
  const int team = team_of(p, threads), panel = block_shape(simd).panel;
  const Grid grid(p);
  const int most = grad_tiles(p), inputs = p.inputs / panel, outputs = p.outputs / panel;
  float* results = workspace + places(p) * most * p.inputs;
  float* scratch = results + places(p) * most * p.outputs;
  const auto windows_of = DNDETR_STRIDE(simd, p, transform_windows);
  const auto gradients_of = DNDETR_STRIDE(simd, p, transform_gradients);
  const auto add = DNDETR_STRIDE(simd, p, grad_kernel_block);
  std::memset(grad_weight, 0, sizeof(float) * 9 * p.inputs * p.outputs);
  for (int start = 0; start < grid.count; start += most) {
    const int tiles = std::min(most, grid.count - start);
    for_all(rounded_up(tiles, kMostRows) / kMostRows, team, [&](int step) {
      const int first = step * kMostRows, count = std::min(kMostRows, tiles - first);
      const std::int64_t place = std::int64_t(first) * panel;
      windows_of({x, p.height, p.width, p.inputs}, grid, start + first, count, tiles, workspace + place);
      gradients_of({grad_out, p.out_height(), p.out_width(), p.outputs}, grid, start + first, count, tiles, results + place);
    });
    for_all(outputs * inputs, team, [&](int index) {
      float* own = scratch + std::int64_t(thread_number()) * kKernelPlaces * panel * panel;
      add(results, workspace, p.inputs, p.outputs, tiles, index / inputs, index % inputs, grad_weight, own);
    });
  }
}

}  // namespace dndetr
