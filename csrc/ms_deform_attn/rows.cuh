// Deformable attention on a GPU, what both directions share: lanes of a row, rows of a block, and a row's prepared samples.
//
// A row is one query of one head. `lanes` lanes hold its channels, 16 bytes of value each; `Split` times as many form
// its team, each part of which takes every Split-th pair of samples (for few queries, where rows alone would not fill a
// GPU). The team prepares each sample once: addresses and weights of its four corners, left in shared memory for all.
#pragma once

#include "common/lanes.cuh"
#include "sample.cuh"

namespace dndetr::deform {

constexpr int kThreads = 128;
constexpr int kStep = 2;  // samples of one step of the inner loop: eight loads in flight

// Width: channels, 0 for any multiple of 4.
template <class Element, int Width>
struct Mapping {
  static constexpr int vector = Width > 0 ? 16 / int(sizeof(Element)) : 4;
  static constexpr int lanes = Width > 0 ? Width / vector : 8;
  static constexpr int split = lanes <= 8 ? 4 : 32 / lanes;  // where rows are split
};

// Where a prepared sample reads, in shared memory, beside the weights of its corners times that of its (unnormalised)
// attention; rows are `samples_in_shared` apart, an odd number, so that they do not share banks.
struct Place {
  unsigned first;  // vector index of the upper left corner in the image
  unsigned steps;  // to the row below, in vectors; the top bit is set if there is no step to the right
};

__host__ __device__ inline int samples_in_shared(const Problem& p) { return p.padded + 1; }

// What the rows of a block have in common: the image, a tile of queries, and the first of some heads.
struct Block {
  int image, head;
  int y, x, height, width;  // the tile's first query on its grid, and the grid
  std::int64_t query;       // the grid's first
};
__device__ __forceinline__ Block block_at(const Problem& p) {
  int tile = int(blockIdx.x % unsigned(p.tiles.count));
  const unsigned rest = blockIdx.x / unsigned(p.tiles.count), teams = unsigned(p.heads) >> p.tiles.heads_bits;
  int l = 0;
#pragma unroll 1
  while (l + 1 < p.tiles.grids && tile >= p.tiles.grid[l + 1].first_tile) ++l;
  const Grid grid = p.tiles.grid[l];
  tile -= grid.first_tile;
  Block block;
  block.image = int(rest / teams);
  block.head = int(rest % teams) << p.tiles.heads_bits;
  block.y = tile / grid.columns << p.tiles.height_bits;
  block.x = tile % grid.columns << p.tiles.width_bits;
  block.height = grid.height, block.width = grid.width;
  block.query = std::int64_t(block.image) * p.queries + grid.first;
  return block;
}

// The row that number `i` of a block stands for; heads alternate fastest.
template <class Given>
__device__ __forceinline__ Row row_at(const Problem& p, const Block& block, int i) {
  const int place = i >> p.tiles.heads_bits;
  const int y = block.y + (place >> p.tiles.width_bits), x = block.x + (place & ((1 << p.tiles.width_bits) - 1));
  Row row;
  row.live = y < block.height && x < block.width;
  row.head = block.head + (i & ((1 << p.tiles.heads_bits) - 1));
  row.query = block.query + (row.live ? y * block.width + x : 0);
  row.index = row.query * p.heads + row.head;
  row.reference = advance<Reference<Given>>(p.reference, row.query * (p.levels * p.reference_width));
  row.offsets = advance<Given>(p.offsets, row.query * p.offsets_stride + row.head * p.samples * 2);
  row.logits = advance<Given>(p.logits, row.query * p.logits_stride + row.head * p.samples);
  return row;
}

// Shared memory starts with the levels.
constexpr std::size_t kViews = kMaxLevels * sizeof(View);
__device__ __forceinline__ float4* after_views(float4* memory) { return memory + kViews / sizeof(float4); }

// The levels as the block's image has them, left in shared memory for all of its threads.
__device__ __forceinline__ void look(const Problem& p, const Block& block, View* views) {
  if (int(threadIdx.x) < p.levels) views[threadIdx.x] = view_of(p, block.image, threadIdx.x);
  __syncthreads();
}

// The softmax of a row: its largest logit, and one by the sum of exp(logit - largest). `seen`: any of its samples.
struct Softmax {
  float largest, inverse;
  bool seen;
};

// A sample's weight before the division by the sum.
template <class Given>
__device__ __forceinline__ float attention_at(const Problem& p, const Row& row, int k, float largest) {
  const float x = load<Given>(row.logits, k);
  return has_reference<Given>(p) ? exp2_of((x - largest) * 1.44269504f) : x;
}

// The largest logit of a row, 0 where what is given are weights, by the `Team` lanes that share it.
template <int Team, class Given>
__device__ __forceinline__ float largest_logit(const Problem& p, const Row& row, int lane) {
  if (!has_reference<Given>(p)) return 0.0f;
  float largest = -INFINITY;
#pragma unroll 1
  for (int k = lane; k < p.samples; k += Team) largest = fmaxf(largest, load<Given>(row.logits, k));
  return max_over<Team>(largest);
}

// All samples of a row, by the `Team` lanes that share it; keep(k, sample, attention) has them, with attention 0 for what
// fills up the last step. Samples that see no pixel read, with weight zero, what another one of the row sees: zero times a
// number that is not finite must not come from elsewhere.
template <int Team, class Given, class Keep>
__device__ __forceinline__ Softmax prepare(const Problem& p, const Row& row, int lane, const View* views, Place* places,
                                           const Keep& keep) {
  const float largest = largest_logit<Team, Given>(p, row, lane);
  float sum = 0;
  constexpr unsigned kNowhere = 0xffffffffu;
  unsigned somewhere = 0;  // one more than a place that is seen
  bool nowhere = false;
  int k = lane;
#pragma unroll 1  // most teams prepare one or two samples a lane
  for (; k < p.samples; k += Team) {
    const Sample s = sample_at<Given>(p, row, k, views);
    const float x = attention_at<Given>(p, row, k, largest), attention = row.live ? x : 0.0f;
    sum += attention;
    keep(k, s, attention);
    const unsigned first = s.pixel * p.pixel_stride + unsigned(row.head) * p.head_stride;
    if (s.seen()) {
      somewhere = first + 1;
    } else {
      nowhere = true;
    }
    places[k] = {s.seen() ? first : kNowhere,
                 (s.y.step() ? s.columns * p.pixel_stride : 0u) | (s.x.step() ? 0u : 0x80000000u)};
  }
#pragma unroll 1
  for (; k < p.padded; k += Team) {
    keep(k, Sample{}, 0.0f);
    places[k].first = kNowhere;
    nowhere = true;
  }
  sum = sum_over<Team>(sum);
  somewhere = max_over<Team>(somewhere);
  if (nowhere) {
#pragma unroll 1
    for (k = lane; k < p.padded; k += Team) {
      if (places[k].first == kNowhere) places[k] = {somewhere > 0 ? somewhere - 1 : 0, 0x80000000u};
    }
  }
  __syncwarp();
  return {largest, has_reference<Given>(p) ? 1.0f / sum : 1.0f, somewhere > 0};
}

// What the four corners weigh: above left, above right, below left, below right.
__device__ __forceinline__ float4 weights_of(const Sample& s, float attention) {
  const float above = attention * s.y.low_weight(), below = attention * s.y.high_weight();
  const float left = s.x.low_weight(), right = s.x.high_weight();
  return {above * left, above * right, below * left, below * right};
}

// Vector indices of the four corners.
struct Addresses {
  unsigned at[4];
};
__device__ __forceinline__ Addresses addresses_of(Place place, unsigned pixel_stride) {
  const unsigned right = int(place.steps) < 0 ? 0u : pixel_stride, down = place.steps & 0x7fffffffu;
  return {place.first, place.first + right, place.first + down, place.first + down + right};
}

}  // namespace dndetr::deform
