// The gradient of value where queries are the pixels of the levels: sums over a tile of queries, made on chip.
//
// A tile's queries and their samples lie close together: on each level nearly all of them fall into a small window, and a
// few hundred pixels get some four thousand corners. So a block takes one head of one tile and writes, level by level, what
// each query's samples weigh in each pixel of the window as a matrix [pixels, queries] in shared memory. Its product with
// the queries' gradients [queries, channels], by the tensor cores, is the window's gradient, added to global memory once.
// A corner outside of the window is added there directly.
#pragma once

#include "backward.cuh"
#include "common/mma.cuh"

namespace dndetr::deform {

constexpr int kWindow = 16;              // pixels, both ways
constexpr int kTile = 8;                 // queries, both ways
constexpr int kQueries = kTile * kTile;  // of a block
constexpr int kTeam = 4;                 // lanes that place a query's samples
constexpr int kValueThreads = kQueries * kTeam;
constexpr int kMostSide = 1 << 15;      // pixels of a level

// A sample's upper left corner on its level, and whether the others are one pixel to the right and down.
struct Corner {
  std::uint32_t bits;

  DNDETR_CONVERT int x() const { return int(bits & 0x7fffu); }
  DNDETR_CONVERT int y() const { return int(bits >> 15 & 0x7fffu); }
  DNDETR_CONVERT int right() const { return int(bits >> 30 & 1u); }
  DNDETR_CONVERT int down() const { return int(bits >> 31); }
};
DNDETR_CONVERT Corner corner_of(const Sample& s) {
  return {std::uint32_t(s.x.pixel()) | std::uint32_t(s.y.pixel()) << 15 | (s.x.step() ? 1u << 30 : 0u) |
          (s.y.step() ? 1u << 31 : 0u)};
}

// Where the matrix has a query's weight in a pixel of the window: what is read together does not share banks.
__host__ __device__ constexpr int place_of(int pixel, int query) { return pixel * kQueries + (query ^ pixel % 2 * 16); }

// A block's shared memory; the samples' weights and corners follow, queries `samples_apart` from each other.
template <class Element, int Width>
struct TileMemory {
  static constexpr int row = Width + 8;  // of the gradients, padded as rows are read together

  alignas(16) float matrix[kWindow * kWindow * kQueries];
  alignas(16) Element gradients[kQueries * row];
  View views[kMaxLevels];
  float inverse[kQueries];    // of the softmax's sum
  bool finite[kQueries];      // the gradient
  int sums[kMaxLevels][3];    // over a level's samples: x, y, one
  int start[kMaxLevels][2];   // of its window: x, y
  unsigned rows[kMaxLevels];  // of the window that a level's samples lie in, a bit each
};
__host__ __device__ constexpr int samples_apart(int samples) { return samples | 1; }

template <class Element, int Width>
constexpr std::size_t tile_bytes(int samples) {
  return sizeof(TileMemory<Element, Width>) + std::size_t(kQueries) * samples_apart(samples) * (sizeof(float4) + sizeof(Corner));
}
static_assert(tile_bytes<BFloat16, 32>(16) <= 99 * 1024, "the models' samples fit where a block has least, on sm_86 and sm_120");

// Along one axis: where a window around the mean of the samples starts.
__device__ __forceinline__ int window_start(int sum, int count, int size) {
  const int middle = count > 0 ? sum / count : 0;
  return max(0, min(middle + 1 - kWindow / 2, size - kWindow));
}

// Channel of a column of the product's part, eight columns wide: of two parts a lane holds four channels in a row, its
// neighbours those beside them.
__host__ __device__ constexpr int channel_of(int part, int column) {
  return part / 2 * 16 + column / 2 * 4 + part % 2 * 2 + column % 2;
}

// Adds what lanes of a warp have outside of the window to global memory: four samples at a time, by eight lanes each.
// far: which of a sample's four corners, a bit each.
template <bool Fixed, class Element, int Width>
__device__ __forceinline__ void add_far(const TileMemory<Element, Width>& tile, Sum<Fixed>* image, unsigned map,
                                        unsigned apart, int width, unsigned far, Corner corner, const float (&weight)[4],
                                        float unit) {
  const int lane = threadIdx.x % 32, first = threadIdx.x / 32 * (32 / kTeam);
  for (unsigned left = __ballot_sync(kWarp, far != 0); left != 0;) {
    unsigned mine = left;
    for (int i = 0; i < lane / 8; ++i) mine &= mine - 1;
    for (int i = 0; i < 4; ++i) left &= left - 1;
    const int source = mine != 0 ? __ffs(int(mine)) - 1 : 0;
    const Corner at{__shfl_sync(kWarp, corner.bits, source)};
    const unsigned its = __shfl_sync(kWarp, far, source), its_far = mine != 0 ? its : 0u;
    static_assert(Width == 32, "eight lanes hold the channels");
    const Element* const from = tile.gradients + (first + source / kTeam) * tile.row + lane % 8 * 4;
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const float w = __shfl_sync(kWarp, weight[c], source);
      if ((its_far >> c & 1u) == 0) continue;
      const unsigned pixel = (at.y() + c / 2 * at.down()) * width + at.x() + c % 2 * at.right();
      add_four<Fixed>(image + 4 * std::uint64_t(map + pixel * apart + lane % 8), w * widen(from[0]), w * widen(from[1]),
                      w * widen(from[2]), w * widen(from[3]), unit);
    }
  }
}

// Writes grads.value alone. Launched only as compiled for sm_80 or later: before, there are no such products.
template <class Element, int Width, bool Fixed, class Given>
__global__ void __launch_bounds__(kValueThreads, Fixed ? 1 : 2)
    value_gradient(const Problem p, const Element* __restrict__ grad_out, const Outputs grads) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  constexpr int kParts = Width / 8, kSlabs = kQueries / 16, kWarps = kValueThreads / 32;
  using Channels = Vector<Element, 8>;
  auto& tile = *reinterpret_cast<TileMemory<Element, Width>*>(shared);
  const int apart = samples_apart(p.samples);
  float4* const weights = reinterpret_cast<float4*>(&tile + 1);
  Corner* const corners = reinterpret_cast<Corner*>(weights + kQueries * apart);
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, query = thread / kTeam, member = thread % kTeam;

  const Block block = block_at(p);
  look(p, block, tile.views);
  const Row row = row_at<Given>(p, block, query);
  const float largest = largest_logit<kTeam, Given>(p, row, member);
  float sum = 0;
#pragma unroll 1
  for (int k = member; k < p.samples; k += kTeam) {
    const Sample s = sample_at<Given>(p, row, k, tile.views);
    const float attention = row.live ? attention_at<Given>(p, row, k, largest) : 0.0f;
    sum += attention;
    weights[query * apart + k] = weights_of(s, attention);
    corners[query * apart + k] = corner_of(s);
  }
  sum = sum_over<kTeam>(sum);
  // A query whose gradient is not finite would spoil its neighbours' pixels in the product: zero times infinity.
  unsigned broken = 0;
#pragma unroll
  for (int channel = member * 8; channel < Width; channel += kTeam * 8) {
    const Channels given = load_vector(reinterpret_cast<const Channels*>(grad_out + row.index * Width + channel));
#pragma unroll
    for (int i = 0; i < 8; ++i) broken |= !(fabsf(widen(given.at[i])) < INFINITY);
    *reinterpret_cast<Channels*>(tile.gradients + query * tile.row + channel) = given;
  }
  tile.inverse[query] = row.live ? 1.0f / sum : 0.0f;
  broken = max_over<kTeam>(broken);
  tile.finite[query] = broken == 0;
  for (int i = thread; i < kWindow * kWindow * kQueries / 4; i += kValueThreads) {
    reinterpret_cast<float4*>(tile.matrix)[i] = {0, 0, 0, 0};
  }
  if (thread < kMaxLevels * 3) tile.sums[thread / 3][thread % 3] = 0;
  if (thread < kMaxLevels) tile.rows[thread] = 0;
  __syncthreads();

#pragma unroll 1
  for (int l = 0; l < p.levels; ++l) {
    int x = 0, y = 0, count = 0;
    for (int i = thread; i < kQueries * p.points; i += kValueThreads) {
      const int at = i % kQueries * apart + l * p.points + i / kQueries;
      const float4 w = weights[at];
      if (w.x != 0.0f || w.y != 0.0f || w.z != 0.0f || w.w != 0.0f) {
        x += corners[at].x(), y += corners[at].y(), ++count;
      }
    }
    x = __reduce_add_sync(kWarp, x), y = __reduce_add_sync(kWarp, y), count = __reduce_add_sync(kWarp, count);
    if (lane == 0) atomicAdd(&tile.sums[l][0], x), atomicAdd(&tile.sums[l][1], y), atomicAdd(&tile.sums[l][2], count);
  }
  // A lane's share of the gradients in all products: of a slab of sixteen queries, four side by side.
  const int line = lane / 4, place = lane % 4;
  float gradients[kSlabs][4][kParts];
#pragma unroll
  for (int slab = 0; slab < kSlabs; ++slab) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int its = slab * 16 + place * 4 + i;
      const bool finite = tile.finite[its];
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        gradients[slab][i][part] = finite ? widen(tile.gradients[its * tile.row + channel_of(part, line)]) : 0.0f;
      }
    }
  }
  __syncthreads();
  if (thread < p.levels * 2) {
    const int l = thread / 2, axis = thread % 2;
    const int size = axis == 0 ? p.level[l].width : p.level[l].height;
    tile.start[l][axis] = window_start(tile.sums[l][axis], tile.sums[l][2], size);
  }
  __syncthreads();

  const unsigned stride = unsigned(p.heads) * (Width / 4);  // in quads, as all places in the image
  Sum<Fixed>* const image = static_cast<Sum<Fixed>*>(grads.value) + block.image * p.batch_stride;
  const float unit = Fixed ? *grads.fixed_point : 0.0f;
#pragma unroll 1
  for (int l = 0; l < p.levels; ++l) {
    const View& level = tile.views[l];
    const unsigned map = level.first * stride + unsigned(block.head) * (Width / 4);
    unsigned rows = 0;
#pragma unroll 1
    for (int k = l * p.points + member; k - member < (l + 1) * p.points; k += kTeam) {
      const bool there = k < (l + 1) * p.points;
      const float4 w = there ? weights[query * apart + k] : float4{0, 0, 0, 0};
      const Corner corner = there ? corners[query * apart + k] : Corner{0};
      const float inverse = tile.inverse[query];
      const float weight[4] = {w.x * inverse, w.y * inverse, w.z * inverse, w.w * inverse};
      const bool finite = tile.finite[query];
      const int x = corner.x() - tile.start[l][0], y = corner.y() - tile.start[l][1];
      int at[4];
      unsigned far = 0;
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int column = x + c % 2 * corner.right(), line = y + c / 2 * corner.down();
        const bool counts = weight[c] != 0.0f;
        const bool near = finite && unsigned(column) < unsigned(kWindow) && unsigned(line) < unsigned(kWindow);
        at[c] = near && counts ? place_of(line * kWindow + column, query) : -1;
        rows |= near && counts ? 1u << line : 0u;
        far |= !near && counts ? 1u << c : 0u;
      }
      // A query's samples may meet in a pixel, so its lanes take turns. Corners that weigh something are different pixels.
#pragma unroll
      for (int turn = 0; turn < kTeam; ++turn) {
        if (turn == member) {
          float moved[4];
#pragma unroll
          for (int c = 0; c < 4; ++c) moved[c] = at[c] >= 0 ? tile.matrix[at[c]] + weight[c] : 0.0f;
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            if (at[c] >= 0) tile.matrix[at[c]] = round_to_tf32(moved[c]);
          }
        }
        __syncwarp();
      }
      add_far<Fixed>(tile, image, map, stride, level.columns, far, corner, weight, unit);
    }
    rows = __reduce_or_sync(kWarp, rows);
    if (lane == 0) atomicOr(&tile.rows[l], rows);
    __syncthreads();
#pragma unroll 1
    for (int y = warp; y < kWindow; y += kWarps) {
      if ((tile.rows[l] >> y & 1u) == 0) continue;
      __syncwarp();  // lanes went different ways at the end of the row before, and the products are of all of them
      float product[kParts][4] = {};
#pragma unroll
      for (int slab = 0; slab < kSlabs; ++slab) {
        float4 weight[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int at = place_of(y * kWindow + half * 8 + line, slab * 16 + place * 4);
          float4* const from = reinterpret_cast<float4*>(tile.matrix + at);
          weight[half] = *from;
          *from = {0, 0, 0, 0};  // for the next level
        }
        // Of a lane's four queries the first two are its columns in one product, the others in the next.
        const float first[4] = {weight[0].x, weight[1].x, weight[0].y, weight[1].y};
        const float second[4] = {weight[0].z, weight[1].z, weight[0].w, weight[1].w};
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          multiply_add(product[part], first, gradients[slab][0][part], gradients[slab][1][part]);
          multiply_add(product[part], second, gradients[slab][2][part], gradients[slab][3][part]);
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int x = tile.start[l][0] + line + half * 8;
        if (x >= level.columns) continue;
        const unsigned pixel = map + unsigned((tile.start[l][1] + y) * level.columns + x) * stride;
#pragma unroll
        for (int part = 0; part < kParts; part += 2) {
          const float a = product[part][2 * half], b = product[part][2 * half + 1];
          const float c = product[part + 1][2 * half], d = product[part + 1][2 * half + 1];
          if (a != 0.0f || b != 0.0f || c != 0.0f || d != 0.0f) {
            add_four<Fixed>(image + 4 * std::uint64_t(pixel + channel_of(part, 2 * place) / 4), a, b, c, d, unit);
          }
        }
      }
    }
    __syncthreads();
  }
#endif
}

}  // namespace dndetr::deform
