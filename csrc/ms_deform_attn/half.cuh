// Deformable attention in half precision on tensor cores: a warp takes the corners of one row at a time as a matrix.
//
// What a corner gives is a product of small matrices. Forward, [channels, corners] times the corners' weights; backward,
// [corners, channels] times the gradient of the output. In either, lanes load whole lines of pixels, as many instructions
// as without, but neither widen nor multiply nor add what they hold. A row of a product is one channel, or one corner, so
// what is not finite stays where it was. Weights are split in two numbers of half precision, 16 digits together: with values
// that have eight or eleven, what is left out is far below the result's own rounding.
//
// Warps prepare kBatch rows together, four lanes for each, and then go through them. The gradient of value is
// value_gradient.cuh's.
#pragma once

#include "backward.cuh"
#include "common/mma.cuh"

namespace dndetr::deform {

constexpr int kBatch = 8;                // rows that a warp prepares together
constexpr int kBatchTeam = 32 / kBatch;  // lanes of each meanwhile
constexpr int kSamples = 8;              // of a step: eight loads in flight forward, four backward

// For which values there are these kernels and value_gradient.cuh's: of half precision, which tensor cores take as they
// are, at the models' width.
template <class Element, int Width>
constexpr bool has_half_kernels = sizeof(Element) == 2 && Width == 32;

// In the place of a row's index: nothing is written.
constexpr std::uint32_t kDead = 0xffffffffu;

// Weights of four corners as two numbers of half precision each: words of the larger parts of the upper two and of the
// lower two corners, then of the smaller parts.
template <class Element>
__device__ __forceinline__ uint4 split_weights(float4 w) {
  struct alignas(4) Pair {
    Element low, high;
  };
  const auto pair = [](float low, float high) {
    return bit_cast<std::uint32_t>(Pair{narrow<Element>(low), narrow<Element>(high)});
  };
  const auto large = [](float weight) {
    if constexpr (std::is_same_v<Element, BFloat16>) return bit_cast<float>(bit_cast<std::uint32_t>(weight) & 0xffff0000u);
    else return widen(narrow<Element>(weight));
  };
  const float x = large(w.x), y = large(w.y), z = large(w.z), last = large(w.w);
  return {pair(x, y), pair(z, last), pair(w.x - x, w.y - y), pair(w.z - z, w.w - last)};
}

// Memory of a block: each row's samples as weights and places, `samples_in_shared` apart.
template <class Element, class Given>
__global__ void __launch_bounds__(kThreads, 7) half_forward(const Problem p, Element* __restrict__ out) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  constexpr int kWidth = 32;
  using Channels = Vector<Element, 4>;
  struct Words {
    std::uint32_t at[2];
  };
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, member = lane % kBatchTeam, own = lane / kBatchTeam;
  const int apart = samples_in_shared(p), rows = p.tiles.rows(), line = lane / 4, place = lane % 4;
  View* const views = reinterpret_cast<View*>(shared);
  uint4* const all_weights = reinterpret_cast<uint4*>(after_views(shared));
  uint4* const weights = all_weights + warp * kBatch * apart;
  Place* const places = reinterpret_cast<Place*>(all_weights + blockDim.x / kBatchTeam * apart) + warp * kBatch * apart;
  const Block block = block_at(p);
  look(p, block, views);
  const Channels* const image =
      reinterpret_cast<const Channels*>(static_cast<const Element*>(p.value) + block.image * p.batch_stride);

#pragma unroll 1
  for (int first = warp * kBatch; first < rows; first += int(blockDim.x) / kBatchTeam) {
    const Row row = row_at<Given>(p, block, first + own);
    const auto keep = [&](int k, const Sample& s, float attention) {
      weights[own * apart + k] = split_weights<Element>(weights_of(s, attention));
    };
    const Softmax softmax = prepare<kBatchTeam, Given>(p, row, member, views, places + own * apart, keep);
#pragma unroll 1
    for (int group = 0; group < kBatch; group += 4) {
      // Lanes of one line hold four channels, and a sample's four corners at each place. Columns of the result are sums with
      // the larger or the smaller parts of the weights; all lanes of a line have all, and write one of every four rows each.
      float kept[4] = {};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint2* const its_weights = reinterpret_cast<const uint2*>(weights + (group + i) * apart + place) + line % 2;
        const Place* const its_places = places + (group + i) * apart + place;
        float sums[2][4] = {};  // of the first two channels, and of the others
#pragma unroll 1
        for (int k = 0; k < p.padded; k += kSamples) {
          Words corner[kSamples / 4][4];
#pragma unroll
          for (int u = 0; u < kSamples / 4; ++u) {
            const Place at = its_places[k + 4 * u];
            const Addresses a = addresses_of({at.first + line, at.steps}, p.pixel_stride);
#pragma unroll
            for (int c = 0; c < 4; ++c) corner[u][c] = bit_cast<Words>(load_vector(image + a.at[c]));
          }
#pragma unroll
          for (int u = 0; u < kSamples / 4; ++u) {
            const uint2 w = its_weights[2 * (k + 4 * u)];
            const Words(&c)[4] = corner[u];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const std::uint32_t channels[4] = {
                  __byte_perm(c[0].at[half], c[1].at[half], 0x5410u), __byte_perm(c[0].at[half], c[1].at[half], 0x7632u),
                  __byte_perm(c[2].at[half], c[3].at[half], 0x5410u), __byte_perm(c[2].at[half], c[3].at[half], 0x7632u)};
              multiply_add<Element>(sums[half], channels, w.x, w.y);
            }
          }
        }
#pragma unroll
        for (int channel = 0; channel < 4; ++channel) {
          const float* const parts = sums[channel / 2] + channel % 2 * 2;
          if (place == i) kept[channel] = parts[0] + parts[1];
        }
      }
      const int source = (group + place) * kBatchTeam;
      const unsigned index = __shfl_sync(kWarp, row.live ? unsigned(row.index) : kDead, source);
      const float factor = __shfl_sync(kWarp, softmax.inverse, source);
      const bool seen = __shfl_sync(kWarp, unsigned(softmax.seen), source) != 0;
      Channels result;
#pragma unroll
      for (int i = 0; i < 4; ++i) result.at[i] = narrow<Element>((seen ? kept[i] : 0.0f) * factor);
      if (index != kDead) *reinterpret_cast<Channels*>(out + std::int64_t(index) * kWidth + line * 4) = result;
    }
    __syncwarp();  // the next rows' samples take the place of these
  }
#endif
}

// What is kept of a prepared sample for `finish`.
struct Kept {
  float attention, x, y;
  unsigned counts;  // has_low and has_high of x, then of y, a bit each
};

// All gradients but value's.
template <class Element, class Given>
__global__ void __launch_bounds__(kThreads, 8)
    half_backward(const Problem p, const Element* __restrict__ grad_out, const Outputs grads) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  constexpr int kWidth = 32;
  using Channels = Vector<Element, 8>;
  struct Words {
    std::uint32_t at[4];
  };
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, member = lane % kBatchTeam, own = lane / kBatchTeam;
  const int apart = samples_in_shared(p), rows = p.tiles.rows(), line = lane / 4, place = lane % 4;
  const int held = int(blockDim.x) / kBatchTeam * apart;
  View* const views = reinterpret_cast<View*>(shared);
  float4* const dots = after_views(shared) + warp * kBatch * apart;
  Kept* const kept = reinterpret_cast<Kept*>(after_views(shared) + held) + warp * kBatch * apart;
  Place* const places = reinterpret_cast<Place*>(after_views(shared) + 2 * held) + warp * kBatch * apart;
  const Block block = block_at(p);
  look(p, block, views);
  const Channels* const image =
      reinterpret_cast<const Channels*>(static_cast<const Element*>(p.value) + block.image * p.batch_stride);
  // A line is a corner of one of two samples.
  const unsigned right = line % 2 == 0 ? 0u : p.pixel_stride, down = line % 4 < 2 ? 0u : 0x7fffffffu;

#pragma unroll 1
  for (int first = warp * kBatch; first < rows; first += int(blockDim.x) / kBatchTeam) {
    const Row row = row_at<Given>(p, block, first + own);
    const auto keep = [&](int k, const Sample& s, float attention) {
      const unsigned counts = unsigned(s.x.has_low) | unsigned(s.x.has_high) << 1 | unsigned(s.y.has_low) << 2 |
                              unsigned(s.y.has_high) << 3;
      kept[own * apart + k] = {attention, s.x.part, s.y.part, counts};
    };
    const Softmax softmax = prepare<kBatchTeam, Given>(p, row, member, views, places + own * apart, keep);
#pragma unroll 1
    for (int i = 0; i < kBatch; ++i) {
      // Of the eight channels of a corner that a lane loads, four count as a row's, four as those of the row eight on; the
      // gradient's own ones meet the first in even columns and the others in odd ones.
      const std::int64_t its = __shfl_sync(kWarp, unsigned(row.index), i * kBatchTeam);
      const Words grad = bit_cast<Words>(load_vector(reinterpret_cast<const Channels*>(grad_out + its * kWidth) + place));
      const bool odd = line % 2 != 0;
      const std::uint32_t first_half = odd ? grad.at[1] : grad.at[0], second_half = odd ? grad.at[3] : grad.at[2];
      const Place* const its_places = places + i * apart + line / 4;
      float* const its_dots = reinterpret_cast<float*>(dots + i * apart + line / 4 + 2 * place) + line % 4;
#pragma unroll 1
      for (int k = 0; k < p.padded; k += kSamples) {
        Words corner[kSamples / 2];
#pragma unroll
        for (int u = 0; u < kSamples / 2; ++u) {
          const Place at = its_places[k + 2 * u];
          const unsigned from = at.first + place + (int(at.steps) < 0 ? 0u : right) + (at.steps & down);
          corner[u] = bit_cast<Words>(load_vector(image + from));
        }
        float dot = 0;  // of one of the corners: each lane of a line keeps another
#pragma unroll
        for (int u = 0; u < kSamples / 2; ++u) {
          float sum[4] = {};
          multiply_add<Element>(sum, corner[u].at, first_half, second_half);
          dot = place == u ? sum[0] + sum[3] : dot;
        }
        its_dots[k * 4] = dot;
      }
    }
    __syncwarp();
    finish<kBatchTeam, Given>(p, grads, row, views, softmax, softmax.inverse, member, dots + own * apart, [&](int k) {
      const Kept sample = kept[own * apart + k];
      const auto has = [&](int bit) { return (sample.counts >> bit & 1u) != 0; };
      return Moment{{0, sample.x, has(0), has(1)}, {0, sample.y, has(2), has(3)}, sample.attention};
    });
    __syncwarp();  // the next rows' samples take the place of these
  }
#endif
}

}  // namespace dndetr::deform
