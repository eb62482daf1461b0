// Deformable attention on a GPU, host side: from a call's sizes to the problem that kernels take and to blocks.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>

#include "half.cuh"
#include "value_gradient.cuh"

namespace dndetr::deform {

struct Plan {
  Problem problem;
  int threads;
  unsigned blocks;
  std::size_t shared;  // bytes
};

inline void check_supported(const DeformAttn& p) {
  if (p.levels > kMaxLevels || p.points > kMaxPoints || p.width % 4 != 0 || p.value.dtype == Dtype::float64) {
    throw std::invalid_argument("ms_deform_attn: CUDA takes float32, bfloat16 and float16, widths that are a multiple of "
                                "4, at most 8 levels and 8 points");
  }
}

// Queries that are the pixels of the levels are taken in 8 x 8 tiles, whose samples lie close together and are found in
// the L1 cache, and as many heads as share a cache line of 128 bytes. Other queries have no known order; there a block
// takes all heads it can, next to each other in memory.
inline Tiles tiles_for(const DeformAttn& p, std::int64_t pixels, int teams, int element_size) {
  Tiles tiles{};
  const auto heads_up_to = [&](int most) {
    int bits = 0;
    while (2 << bits <= most && p.heads % (2 << bits) == 0) ++bits;
    return bits;
  };
  if (p.queries == pixels) {
    tiles.height_bits = tiles.width_bits = 3;
    tiles.heads_bits = heads_up_to(std::max(1, 128 / (p.width * element_size)));
    tiles.grids = p.levels;
    int first = 0;
    for (int l = 0; l < p.levels; ++l) {
      const int height = p.shapes[2 * l], width = p.shapes[2 * l + 1];
      tiles.grid[l] = {height, width, (width + 7) / 8, first, tiles.count};
      first += height * width;
      tiles.count += (height + 7) / 8 * tiles.grid[l].columns;
    }
  } else {
    tiles.heads_bits = heads_up_to(teams);
    while (teams >> (tiles.heads_bits + tiles.width_bits) > 1) ++tiles.width_bits;
    const int width = 1 << tiles.width_bits;
    tiles.grids = 1, tiles.count = (p.queries + width - 1) / width;
    tiles.grid[0] = {1, p.queries, tiles.count, 0, 0};
  }
  return tiles;
}

inline unsigned blocks_of(const Problem& p) {
  const std::int64_t blocks = std::int64_t(p.batch) * (p.heads >> p.tiles.heads_bits) * p.tiles.count;
  constexpr std::int64_t kMostBlocks = 0x7fffffff;
  if (blocks > kMostBlocks) {
    throw std::invalid_argument("ms_deform_attn: " + std::to_string(blocks) + " blocks for " + std::to_string(p.batch) +
                                " images, " + std::to_string(p.queries) + " queries, " + std::to_string(p.heads) +
                                " heads; CUDA starts " + std::to_string(kMostBlocks));
  }
  return unsigned(blocks);
}

// vector: channels of a lane; team: lanes of a row; parts: of a team; slots: float4 in shared memory per sample.
inline Plan plan_for(const DeformAttn& p, int vector, int team, int parts, int slots) {
  Plan plan{};
  Problem& k = plan.problem;
  k.batch = p.batch, k.queries = p.queries, k.heads = p.heads, k.width = p.width;
  k.levels = p.levels, k.points = p.points, k.samples = p.levels * p.points;
  k.per_level = (65535u + unsigned(p.points)) / unsigned(p.points);
  const int step = kStep * parts;
  k.padded = (k.samples + step - 1) / step * step;
  k.reference_width = p.reference_width;
  std::int64_t pixels = 0;
  for (int l = 0; l < p.levels; ++l) {
    k.level[l] = {p.shapes[2 * l], p.shapes[2 * l + 1], unsigned(pixels)};
    pixels += std::int64_t(p.shapes[2 * l]) * p.shapes[2 * l + 1];
  }
  k.value = p.value.data;
  k.batch_stride = p.batch_stride;
  k.pixel_stride = unsigned(p.pixel_stride / vector), k.head_stride = unsigned(p.head_stride / vector);
  const std::int64_t extent = pixels * p.pixel_stride + p.heads * p.head_stride;
  if (p.pixel_stride % vector != 0 || p.head_stride % vector != 0 || extent / vector >= std::int64_t(1) << 31) {
    throw std::invalid_argument("ms_deform_attn: value's pixels are " + std::to_string(p.pixel_stride) + " and its heads " +
                                std::to_string(p.head_stride) +
                                " elements apart, which is not aligned, or too many for one image");
  }
  k.reference = p.reference, k.offsets = p.offsets, k.logits = p.logits;
  k.offsets_stride = p.offsets_stride, k.logits_stride = p.logits_stride;
  k.valid_sizes = p.valid_sizes;
  const std::size_t row = samples_in_shared(k) * (slots * sizeof(float4) + sizeof(Place));
  for (plan.threads = kThreads; kViews + plan.threads / team * row > 48 * 1024;) plan.threads /= 2;
  const int teams = plan.threads / team;
  plan.shared = kViews + teams * row;
  k.tiles = tiles_for(p, pixels, teams, p.value.dtype == Dtype::float32 ? 4 : 2);
  plan.blocks = blocks_of(k);
  return plan;
}

// The same for the kernels of half.cuh. vector: channels of a lane.
inline Plan half_plan_for(const DeformAttn& p, int vector, int slots) {
  return plan_for(p, vector, kBatchTeam, kSamples / kStep, slots);
}

// The same for `value_gradient`: a block per tile and head.
template <class Element, int Width>
Plan value_plan_for(const DeformAttn& p) {
  Plan plan = plan_for(p, 4, kTeam, 1, 1);
  plan.problem.tiles.heads_bits = 0;
  plan.threads = kValueThreads;
  plan.blocks = blocks_of(plan.problem);
  plan.shared = tile_bytes<Element, Width>(p.levels * p.points);
  return plan;
}

// Whether queries are the pixels of the levels, and weights are those of a softmax, at most 1.
inline bool has_tiles(const DeformAttn& p) {
  std::int64_t pixels = 0;
  for (int l = 0; l < p.levels; ++l) {
    if (p.shapes[2 * l] >= kMostSide || p.shapes[2 * l + 1] >= kMostSide) return false;
    pixels += std::int64_t(p.shapes[2 * l]) * p.shapes[2 * l + 1];
  }
  return p.queries == pixels && p.reference_width > 0;
}

// Whether half.cuh's forward kernel may run: of float16 the weights must be those of a softmax, in its range.
template <class Element>
bool has_half_weights(const DeformAttn& p) {
  return std::is_same_v<Element, BFloat16> || p.reference_width > 0;
}

// Calls run with the type for which offsets and logits are compiled: bfloat16 as under autocast, or as they come.
template <class Element, class Run>
void with_given(const DeformAttn& p, const Run& run) {
  if constexpr (std::is_same_v<Element, BFloat16>) {
    const bool alike = p.offsets.dtype == Dtype::bfloat16 && p.logits.dtype == Dtype::bfloat16;
    if (alike && p.reference_width > 0 && p.reference.dtype == Dtype::float32) return run(Element{});
  }
  run(Mixed{});
}

// Whether rows alone would leave more than half of the GPU empty.
inline bool few_rows(const DeformAttn& p, int lanes, int multiprocessors) {
  return double(p.batch) * p.queries * p.heads * lanes < 1024.0 * multiprocessors;
}

// Calls run with a value of the type of value's elements and with the width, 0 where there is no tuned kernel for it.
template <class Run>
void with_width(int width, const Run& run) {
  switch (width) {
    case 16: return run(std::integral_constant<int, 16>{});
    case 32: return run(std::integral_constant<int, 32>{});
    case 64: return run(std::integral_constant<int, 64>{});
    default: return run(std::integral_constant<int, 0>{});
  }
}
template <class Run>
void with_kernel(const DeformAttn& p, const Run& run) {
  if (p.value.dtype == Dtype::float16) {  // rare: every kernel takes its time to compile, for every kind of GPU
    return p.width == 32 ? run(Float16{}, std::integral_constant<int, 32>{}) : run(Float16{}, std::integral_constant<int, 0>{});
  }
  with_width(p.width, [&](auto width) {
    if (p.value.dtype == Dtype::float32) return run(float{}, width);
    return run(BFloat16{}, width);
  });
}

}  // namespace dndetr::deform
