// Deformable attention on a GPU, forward: a team of lanes gathers and sums the samples of one query and head.
#pragma once

#include "rows.cuh"

namespace dndetr::deform {

extern __shared__ float4 shared[];

template <class Element, int Width, bool Split>
__global__ void __launch_bounds__(kThreads, 8) forward(const Problem p, Element* __restrict__ out) {
  using M = Mapping<Element, Width>;
  using Channels = Vector<Element, M::vector>;
  constexpr int kParts = Split ? M::split : 1, kTeam = M::lanes * kParts;
  const int lane = threadIdx.x % kTeam, part = lane / M::lanes, team = threadIdx.x / kTeam, teams = blockDim.x / kTeam;
  View* const views = reinterpret_cast<View*>(shared);
  float4* const weights = after_views(shared) + team * samples_in_shared(p);
  Place* const places =
      reinterpret_cast<Place*>(after_views(shared) + teams * samples_in_shared(p)) + team * samples_in_shared(p);
  const int rows = p.tiles.rows(), width = Width > 0 ? Width : p.width;
  const Block block = block_at(p);
  look(p, block, views);
  const Element* const value = static_cast<const Element*>(p.value) + block.image * p.batch_stride;

#pragma unroll 1
  for (int first = 0; first < rows; first += teams) {
    const Row row = row_at<Mixed>(p, block, first + team);
    const auto keep = [&](int k, const Sample& s, float attention) { weights[k] = weights_of(s, attention); };
    const Softmax softmax = prepare<kTeam, Mixed>(p, row, lane, views, places, keep);
    for (int channel = lane % M::lanes * M::vector; channel - lane % M::lanes * M::vector < width;
         channel += M::lanes * M::vector) {
      // Lanes past the last channel repeat it.
      const int from = Width > 0 || channel < width ? channel : width - M::vector;
      const Channels* const base = kept_whole(reinterpret_cast<const Channels*>(value + from));
      float sum[M::vector] = {};
      for (int k = part * kStep; k < p.padded; k += kStep * kParts) {
        Channels corner[kStep][4];
#pragma unroll
        for (int u = 0; u < kStep; ++u) {
          const Addresses a = addresses_of(places[k + u], p.pixel_stride);
#pragma unroll
          for (int c = 0; c < 4; ++c) corner[u][c] = load_vector(base + a.at[c]);
        }
#pragma unroll
        for (int u = 0; u < kStep; ++u) {
          const float4 w = weights[k + u];
          const float weight[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            float channels[M::vector];
            widen_to(corner[u][c], channels);
#pragma unroll
            for (int i = 0; i < M::vector; ++i) sum[i] += weight[c] * channels[i];
          }
        }
      }
#pragma unroll
      for (int step = M::lanes; step < kTeam; step *= 2) {
#pragma unroll
        for (int i = 0; i < M::vector; ++i) sum[i] += __shfl_xor_sync(kWarp, sum[i], step);
      }
      if (row.live && part == 0 && (Width > 0 || channel < width)) {
        Channels result;
#pragma unroll
        for (int i = 0; i < M::vector; ++i) result.at[i] = narrow<Element>((softmax.seen ? sum[i] : 0.0f) * softmax.inverse);
        *reinterpret_cast<Channels*>(out + row.index * width + channel) = result;
      }
    }
    __syncwarp();  // the next row's samples take the place of these
  }
}

}  // namespace dndetr::deform
