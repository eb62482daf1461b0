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

// A prepared sample in shared memory; rows are `samples_in_shared` apart, an odd number, so that they do not share banks.
struct Corners {
  float4 weights;  // above left, above right, below left, below right; times the (unnormalised) attention weight
};
struct Place {
  unsigned first;  // vector index of the upper left corner
  unsigned steps;  // to the row below, in vectors; the top bit is set if there is no step to the right
};

__host__ __device__ inline int samples_in_shared(const Problem& p) { return p.padded + 1; }

// The row that number `i` of a block stands for; heads alternate fastest.
__device__ __forceinline__ Row row_at(const Problem& p, int i) {
  const int teams = p.heads / p.tiles.heads;
  int tile = int(blockIdx.x % unsigned(p.tiles.count));
  const int rest = int(blockIdx.x / unsigned(p.tiles.count));
  Grid grid = p.tiles.grid[0];
#pragma unroll 1
  for (int l = 1; l < p.tiles.grids && tile >= p.tiles.grid[l].first_tile; ++l) grid = p.tiles.grid[l];
  tile -= grid.first_tile;
  const int place = i / p.tiles.heads;
  int y = tile / grid.columns * p.tiles.height + place / p.tiles.width;
  int x = tile % grid.columns * p.tiles.width + place % p.tiles.width;
  Row row;
  row.live = place < p.tiles.height * p.tiles.width && y < grid.height && x < grid.width;
  y = row.live ? y : 0, x = row.live ? x : 0;
  row.image = rest / teams;
  row.head = rest % teams * p.tiles.heads + i % p.tiles.heads;
  row.query = std::int64_t(row.image) * p.queries + grid.first + y * grid.width + x;
  row.index = row.query * p.heads + row.head;
  return row;
}

// The softmax of a row: its largest logit, and one by the sum of exp(logit - largest). `seen`: any of its samples.
struct Softmax {
  float largest, inverse;
  bool seen;
};

// A sample's weight before the division by the sum.
__device__ __forceinline__ float attention_at(const Problem& p, const Row& row, int k, float largest) {
  const float x = load(p.logits, row.index * p.samples + k);
  return p.reference_width > 0 ? exp2f((x - largest) * 1.44269504f) : x;
}

// The largest logit of a row, 0 where what is given are weights, by the `Team` lanes that share it.
template <int Team>
__device__ __forceinline__ float largest_logit(const Problem& p, const Row& row, int lane) {
  if (p.reference_width == 0) return 0.0f;
  float largest = -INFINITY;
#pragma unroll 1
  for (int k = lane; k < p.samples; k += Team) largest = fmaxf(largest, load(p.logits, row.index * p.samples + k));
  return max_over<Team>(largest);
}

// All samples of a row, by the `Team` lanes that share it. Samples that see no pixel read, with weight zero, what another one
// of the row sees: zero times a number that is not finite must not come from elsewhere.
template <int Team>
__device__ __forceinline__ Softmax prepare(const Problem& p, const Row& row, int lane, float4* weights, Place* places) {
  const float largest = largest_logit<Team>(p, row, lane);
  float sum = 0;
  constexpr unsigned kNowhere = 0xffffffffu;
  unsigned somewhere = 0;  // one more than a place that is seen
  bool nowhere = false;
#pragma unroll 1  // most teams prepare one or two samples a lane
  for (int k = lane; k < p.padded; k += Team) {
    const int real = k < p.samples ? k : p.samples - 1;
    const Sample s = sample_at(p, row, real);
    const float attention = k == real && row.live ? attention_at(p, row, real, largest) : 0.0f;
    const float above = attention * s.y.low, below = attention * s.y.high;
    sum += attention;
    weights[k] = {above * s.x.low, above * s.x.high, below * s.x.low, below * s.x.high};
    const unsigned first = s.pixel * p.pixel_stride;
    if (s.seen) {
      somewhere = first + 1;
    } else {
      nowhere = true;
    }
    places[k] = {s.seen ? first : kNowhere,
                 unsigned(s.y.step * s.width) * p.pixel_stride | (s.x.step > 0 ? 0u : 0x80000000u)};
  }
  sum = sum_over<Team>(sum);
  somewhere = max_over<Team>(somewhere);
  if (nowhere) {
#pragma unroll 1
    for (int k = lane; k < p.padded; k += Team) {
      if (places[k].first == kNowhere) places[k] = {somewhere > 0 ? somewhere - 1 : 0, 0x80000000u};
    }
  }
  __syncwarp();
  return {largest, p.reference_width > 0 ? 1.0f / sum : 1.0f, somewhere > 0};
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
