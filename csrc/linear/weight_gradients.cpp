// Gradients of a linear layer's weight and bias on the CPU: sums over rows of products of two columns.
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

constexpr int kPartRows = 768;   // that are laid out in panels at once, which stay in the caches
constexpr int kCopiedRows = 16;  // that one step lays out
constexpr int kDepth = 384;      // rows whose products are summed in registers

#define DNDETR_KERNELS "linear/kernel.h"
#include "common/instruction_sets.h"

// How the work is cut: rows that are summed at once, panels, threads.
struct Plan {
  int rows, inputs, outputs, panel, team;

  Plan(const WeightGradients& p, int threads, int panel)
      : inputs(rounded_up(p.inputs, panel) / panel), outputs(rounded_up(p.outputs, panel) / panel), panel(panel) {
    // Equal parts: the sums of a short last one would take as long to be added as those of a whole one.
    const std::int64_t parts = std::max<std::int64_t>(1, (p.rows + kPartRows - 1) / kPartRows);
    rows = rounded_up(int((p.rows + parts - 1) / parts), kCopiedRows);
    constexpr double kProductsPerTeam = 3e6;  // waking a team takes longer than a small problem
    team = double(p.rows) * p.inputs * p.outputs > kProductsPerTeam ? threads : 1;
  }

  std::int64_t workspace() const {
    return std::int64_t(rows) * (inputs + outputs) * panel + std::int64_t(team) * (panel + 1) * panel;
  }
};

}  // namespace

std::int64_t weight_gradients_workspace(const WeightGradients& p, int threads, Simd simd) {
  return Plan(p, threads, DNDETR_FOR(std::min(simd, best_simd()), kShape).panel).workspace();
}

void weight_gradients(const WeightGradients& p, const float* grad_out, const float* x, float* grad_weight,
                      float* grad_bias, float* workspace, int threads, Simd simd) {
  simd = std::min(simd, best_simd());
  const int panel = DNDETR_FOR(simd, kShape).panel;
  const Plan plan(p, threads, panel);
  const auto copy = DNDETR_FOR(simd, copy_to_panels);
  const auto multiply = DNDETR_FOR(simd, multiply_panels);
  const auto sum = DNDETR_FOR(simd, sum_rows);
  float* results = workspace + std::int64_t(plan.rows) * plan.inputs * panel;
  float* scratch = results + std::int64_t(plan.rows) * plan.outputs * panel;
  std::memset(grad_weight, 0, sizeof(float) * p.inputs * p.outputs);
  std::memset(grad_bias, 0, sizeof(float) * p.outputs);
  for (std::int64_t start = 0; start < p.rows; start += plan.rows) {
    const int rows = int(std::min<std::int64_t>(plan.rows, p.rows - start));
    for_all(rounded_up(rows, kCopiedRows) / kCopiedRows, plan.team, [&](int step) {
      const int first = step * kCopiedRows, count = std::min(kCopiedRows, rows - first);
      copy(x + (start + first) * p.inputs, p.inputs, count, rows, workspace + first * panel);
      copy(grad_out + (start + first) * p.outputs, p.outputs, count, rows, results + first * panel);
    });
    for_all(plan.outputs * plan.inputs, plan.team, [&](int index) {
      const int output = index / plan.inputs, input = index % plan.inputs;
      const float* panel_of_results = results + std::int64_t(output) * rows * panel;
      float* tile = scratch + std::int64_t(thread_number()) * (panel + 1) * panel;
      const int high = std::min(panel, p.outputs - output * panel), wide = std::min(panel, p.inputs - input * panel);
      multiply(panel_of_results, workspace + std::int64_t(input) * rows * panel, rows, tile);
      for (int r = 0; r < high; ++r) {
        float* to = grad_weight + std::int64_t(output * panel + r) * p.inputs + input * panel;
        for (int c = 0; c < wide; ++c) to[c] += tile[r * panel + c];
      }
      if (input == 0) {
        float* sums = tile + panel * panel;
        sum(panel_of_results, rows, sums);
        for (int r = 0; r < high; ++r) grad_bias[output * panel + r] += sums[r];
      }
    });
  }
}

}  // namespace dndetr
