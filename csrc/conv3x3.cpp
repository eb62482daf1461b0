// 3x3 convolution on the CPU with fewer products (Winograd): tiles, blocks, threads. Formulas are in dndetr/ops/conv3x3.py.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "fused_sums.h"

#include "blocks.h"
#include "floats.h"
#include "ops.h"

namespace dndetr {
namespace {

constexpr int kSide = 4, kWindow = kSide + 2, kPlaces = kWindow * kWindow;

// The points 0, +-a, +-b and infinity, at which polynomials are multiplied. Around 1, so that powers stay of one size:
// with 1 and 2 results have 2.5 times the error. All squares are exact.
constexpr float kA = 0.625f, kB = 1.5f, kA2 = kA * kA, kB2 = kB * kB;
constexpr float kPerZero = 1 / (kA2 * kB2), kPerA = 1 / (2 * kA2 * (kA2 - kB2)), kPerB = 1 / (2 * kB2 * (kB2 - kA2));

// [images, height, width, channels]
struct Map {
  float* data;
  int height, width, channels;
};

// Tiles of 4x4 pixels, the last ones of rows and columns partly outside.
struct Grid {
  int columns, per_image, count;

  Grid(int images, int height, int width)
      : columns(rounded_up(width, kSide) / kSide),
        per_image(rounded_up(height, kSide) / kSide * columns),
        count(images * per_image) {}
};

#define DNDETR_KERNELS "conv3x3_kernel.h"
#include "instruction_sets.h"

BlockShape block_shape(Simd simd) { return DNDETR_FOR(simd, kShape); }

// Threads for a call: waking a team takes longer than a small problem.
int team_of(const Conv3x3& p, int threads) {
  constexpr double kProductsPerTeam = 1e7;
  const double products = double(Grid(p.batch, p.height, p.width).count) * kPlaces * p.inputs * p.outputs;
  return products > kProductsPerTeam ? threads : 1;
}

std::int64_t kernel_places(const Conv3x3& p) { return std::int64_t(kPlaces) * p.inputs * p.outputs; }

std::int64_t block_scratch(const Blocks& blocks, int inputs, BlockShape shape) {
  return std::int64_t(kPlaces) * blocks.rows * (inputs + blocks.group * shape.panel);
}

void convolve(const Map& map, const Map& out, const Grid& grid, const float* places, const float* bias, float* scratch,
              int team, Simd simd) {
  const BlockShape shape = block_shape(simd);
  const Blocks blocks(grid.count, out.channels, shape, team);
  const auto run = DNDETR_FOR(simd, convolve_block);
  for_all(blocks.count(), team, [&](int index) {
    float* own = scratch + thread_number() * block_scratch(blocks, map.channels, shape);
    run(map, places, blocks[index], bias, out, grid, own);
  });
}

}  // namespace

Conv3x3Workspace conv3x3_workspace(const Conv3x3& p, int threads, Simd simd) {
  simd = std::min(simd, best_simd());
  const int team = team_of(p, threads);
  const BlockShape shape = block_shape(simd);
  const Grid grid(p.batch, p.height, p.width);
  const auto forward = [&](int inputs, int outputs) {
    return kernel_places(p) + team * block_scratch(Blocks(grid.count, outputs, shape, team), inputs, shape);
  };
  return {forward(p.inputs, p.outputs), forward(p.outputs, p.inputs),
          std::int64_t(kPlaces) * (std::int64_t(grid.count) * (p.inputs + p.outputs) + team * shape.panel * shape.panel)};
}

void conv3x3(const Conv3x3& p, float* x, const float* weight, const float* bias, float* out, float* workspace,
             int threads, Simd simd) {
  simd = std::min(simd, best_simd());
  const int team = team_of(p, threads);
  const auto prepare = DNDETR_FOR(simd, transform_kernel);
  for_all(p.outputs / block_shape(simd).panel, team,
          [&](int panel) { prepare(weight, p.inputs, p.outputs, panel, workspace); });
  convolve({x, p.height, p.width, p.inputs}, {out, p.height, p.width, p.outputs}, Grid(p.batch, p.height, p.width),
           workspace, bias, workspace + kernel_places(p), team, simd);
}

void conv3x3_grad_input(const Conv3x3& p, float* grad_out, const float* weight, float* grad_x, float* workspace,
                        int threads, Simd simd) {
  simd = std::min(simd, best_simd());
  const int team = team_of(p, threads);
  const auto prepare = DNDETR_FOR(simd, transform_turned_kernel);
  for_all(p.inputs / block_shape(simd).panel, team,
          [&](int panel) { prepare(weight, p.inputs, p.outputs, panel, workspace); });
  convolve({grad_out, p.height, p.width, p.outputs}, {grad_x, p.height, p.width, p.inputs},
           Grid(p.batch, p.height, p.width), workspace, nullptr, workspace + kernel_places(p), team, simd);
}

void conv3x3_grad_weight(const Conv3x3& p, float* x, float* grad_out, float* grad_weight, float* workspace,
                         int threads, Simd simd) {
  simd = std::min(simd, best_simd());
  const int team = team_of(p, threads);
  const Grid grid(p.batch, p.height, p.width);
  const BlockShape shape = block_shape(simd);
  float* results = workspace + std::int64_t(kPlaces) * grid.count * p.inputs;
  float* scratch = results + std::int64_t(kPlaces) * grid.count * p.outputs;
  const auto windows_of = DNDETR_FOR(simd, transform_windows), gradients_of = DNDETR_FOR(simd, transform_gradients);
  const int steps = rounded_up(grid.count, kMostRows) / kMostRows;
  for_all(steps, team, [&](int step) {
    const int first = step * kMostRows, count = std::min(kMostRows, grid.count - first);
    const std::int64_t place = std::int64_t(first) * shape.panel;
    windows_of({x, p.height, p.width, p.inputs}, grid, first, count, grid.count, workspace + place);
    gradients_of({grad_out, p.height, p.width, p.outputs}, grid, first, count, grid.count, results + place);
  });
  const int inputs = p.inputs / shape.panel, outputs = p.outputs / shape.panel;
  const auto run = DNDETR_FOR(simd, grad_kernel_block);
  for_all(outputs * inputs, team, [&](int index) {
    float* own = scratch + std::int64_t(thread_number()) * kPlaces * shape.panel * shape.panel;
    run(results, workspace, p.inputs, p.outputs, grid.count, index / inputs, index % inputs, grad_weight, own);
  });
}

}  // namespace dndetr
