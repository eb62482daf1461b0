// Deformable attention on a GPU, backward: everything is recomputed from the inputs, in one pass over the samples.
//
// Per corner a lane spreads channels of the output's gradient to the gradient of value (a vector reduction in global
// memory), and dots its own with the corner. The dots of a step are summed over the
// lanes, each lane keeping its share; once a row is done, its team turns them into the gradients of offsets, logits and
// reference points.
#pragma once

#include "rows.cuh"

namespace dndetr::deform {

extern __shared__ float4 shared[];

// Where gradients go. `value` is float, or int64 with `fixed_point`, what one is worth in it.
struct Outputs {
  void* value;
  Array reference, offsets, logits;  // reference: float [B, H, Q, L, 2 or 4], or null data
  std::int64_t offsets_stride, logits_stride;
  const float* fixed_point;
};

// What the gradient of value is summed in. Float sums depend on their order; those of whole numbers do not, whatever the
// order of the blocks.
template <bool Fixed>
using Sum = std::conditional_t<Fixed, unsigned long long, float>;

template <bool Fixed>
__device__ __forceinline__ void add_four(Sum<Fixed>* to, float a, float b, float c, float d, float unit) {
  if constexpr (Fixed) {
    const float added[4] = {a, b, c, d};
#pragma unroll
    for (int i = 0; i < 4; ++i) atomicAdd(to + i, static_cast<unsigned long long>(__float2ll_rn(added[i] * unit)));
  } else {
    add_quad(to, a, b, c, d);
  }
}
// Apart: elements between a lane's quads.
template <bool Fixed, int Apart, int N>
__device__ __forceinline__ void spread(Sum<Fixed>* to, const float (&grad)[N], float weight, float unit) {
#pragma unroll
  for (int i = 0; i < N; i += 4) {
    add_four<Fixed>(to + i / 4 * Apart, weight * grad[i], weight * grad[i + 1], weight * grad[i + 2], weight * grad[i + 3],
                    unit);
  }
}

// From the dots of a row to its gradients. `scale` times a dot is that of the gradient divided by the softmax's sum. read(k)
// has a sample's axes and its attention weight before the division.
template <int Team, class Given, class Read>
__device__ __forceinline__ void finish(const Problem& p, const Outputs& grads, const Row& row, const View* views,
                                       const Softmax& softmax, float scale, int lane, float4* dots,
                                       const Read& read) {
  const Array offsets = advance<Given>(grads.offsets, row.query * grads.offsets_stride + row.head * p.samples * 2);
  const Array logits = advance<Given>(grads.logits, row.query * grads.logits_stride + row.head * p.samples);
  float mean = 0;
#pragma unroll 1
  for (int k = lane; k < p.samples; k += Team) {
    const float4 d = dots[k];
    const auto [x_axis, y_axis, attention] = read(k);
    const SampleGrad grad = differentiate(x_axis, y_axis, d.x, d.y, d.z, d.w);
    const float weight = scale * grad.weight, x = attention * (scale * grad.x), y = attention * (scale * grad.y);
    const int l = level_of(p, k);
    const Two pixels = affine_of<Given>(p, row, l, views[l]).scale;
    if (row.live) store_two<Given>(offsets, k, {x * pixels.x, y * pixels.y});
    mean += attention * weight;
    dots[k] = {weight, attention, x, y};
  }
  mean = sum_over<Team>(mean) * softmax.inverse;
#pragma unroll 1
  for (int k = lane; k < p.samples; k += Team) {
    const float weight = dots[k].x;
    const float grad = has_reference<Given>(p) ? dots[k].y * (weight - mean) : weight;
    if (row.live) store<Given>(logits, k, grad);
  }
  if (grads.reference.data == nullptr) return;
  __syncwarp();
#pragma unroll 1
  for (int l = lane; l < p.levels && row.live; l += Team) {
    float moved_x = 0, moved_y = 0, grown_x = 0, grown_y = 0;
#pragma unroll 1
    for (int k = l * p.points; k < (l + 1) * p.points; ++k) {
      const Two offset = load_two<Given>(row.offsets, k);
      moved_x += dots[k].z, moved_y += dots[k].w;
      grown_x += dots[k].z * offset.x, grown_y += dots[k].w * offset.y;
    }
    const std::int64_t image = row.query / p.queries, image_row = row.query - image * p.queries;
    const std::int64_t head_row = (image * p.heads + row.head) * p.queries + image_row;
    float* const to = static_cast<float*>(grads.reference.data) + (head_row * p.levels + l) * p.reference_width;
    const float width = views[l].width, height = views[l].height, half = 0.5f / float(p.points);
    to[0] = moved_x * width, to[1] = moved_y * height;
    if (p.reference_width == 4) to[2] = grown_x * width * half, to[3] = grown_y * height * half;
  }
}

// What `finish` reads of a sample.
struct Moment {
  Axis x, y;
  float attention;
};

template <class Element, int Width, bool Split, bool Fixed>
__global__ void __launch_bounds__(kThreads, 5)
    backward(const Problem p, const Element* __restrict__ grad_out, const Outputs grads) {
  using M = Mapping<Element, Width>;
  using Channels = Vector<Element, M::vector>;
  constexpr int kParts = Split ? M::split : 1, kTeam = M::lanes * kParts;
  constexpr int kDots = 4 * kStep, kKept = kDots > M::lanes ? kDots / M::lanes : 1;
  const int lane = threadIdx.x % kTeam, part = lane / M::lanes, team = threadIdx.x / kTeam, teams = blockDim.x / kTeam;
  const int channel_lane = lane % M::lanes, apart = samples_in_shared(p);
  View* const views = reinterpret_cast<View*>(shared);
  float4* const memory = after_views(shared);
  float4* const weights = memory + team * apart;
  // Tuned widths are done with a sample's weights when its dots are known; others come back for more channels.
  float4* const dots = Width > 0 ? weights : weights + teams * apart;
  Place* const places = reinterpret_cast<Place*>(memory + (Width > 0 ? 1 : 2) * teams * apart) + team * apart;
  const int rows = p.tiles.rows(), width = Width > 0 ? Width : p.width;
  const float unit = Fixed ? *grads.fixed_point : 0.0f;
  const Block block = block_at(p);
  look(p, block, views);
  const std::int64_t image = block.image * p.batch_stride;
  const Element* const value = static_cast<const Element*>(p.value) + image;

#pragma unroll 1
  for (int first = 0; first < rows; first += teams) {
    const Row row = row_at<Mixed>(p, block, first + team);
    const auto keep = [&](int k, const Sample& s, float attention) { weights[k] = weights_of(s, attention); };
    const Softmax softmax = prepare<kTeam, Mixed>(p, row, lane, views, places, keep);
    for (int start = 0; start < width; start += M::lanes * M::vector) {
      const int channel = start + channel_lane * M::vector;
      const bool inside = Width > 0 || channel < width;
      const Channels* const base =
          kept_whole(reinterpret_cast<const Channels*>(value + (inside ? channel : width - M::vector)));
      const Channels given =
          load_vector(reinterpret_cast<const Channels*>(grad_out + row.index * width + (inside ? channel : 0)));
      float grad[M::vector];
#pragma unroll
      for (int i = 0; i < M::vector; ++i) grad[i] = inside ? widen(given.at[i]) * softmax.inverse : 0.0f;
      // What is spread are quads that lie beside the neighbouring lanes' ones, so that a reduction fills whole sectors of 32
      // bytes: those of a lane's own channels would each fill one half.
      constexpr int kQuads = Width > 0 ? M::vector / 4 : 1, kApart = M::lanes * 4;
      const int quad = kQuads > 1 ? start + channel_lane * 4 : inside ? channel : width - 4;
      Sum<Fixed>* sums = static_cast<Sum<Fixed>*>(grads.value) + image + quad;
      if constexpr (kQuads > 1) sums = kept_whole(sums);
      float quads[M::vector];
#pragma unroll
      for (int q = 0; q < kQuads; ++q) {
        const auto part4 = load_vector(
            reinterpret_cast<const Vector<Element, 4>*>(grad_out + row.index * width + quad + q * kApart));
#pragma unroll
        for (int i = 0; i < 4; ++i) quads[4 * q + i] = widen(part4.at[i]) * softmax.inverse;
      }
      for (int k = part * kStep; k < p.padded; k += kStep * kParts) {
        Channels corner[kStep][4];
        Addresses a[kStep];
#pragma unroll
        for (int u = 0; u < kStep; ++u) {
          a[u] = addresses_of(places[k + u], p.pixel_stride);
#pragma unroll
          for (int c = 0; c < 4; ++c) corner[u][c] = load_vector(base + a[u].at[c]);
        }
        float dot[kDots];
#pragma unroll
        for (int u = 0; u < kStep; ++u) {
          const float4 w = weights[k + u];
          const float weight[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            float channels[M::vector], sum = 0;
            widen_to(corner[u][c], channels);
#pragma unroll
            for (int i = 0; i < M::vector; ++i) sum += grad[i] * channels[i];
            dot[u * 4 + c] = sum;
            if (weight[c] != 0.0f && inside) {
              spread<Fixed, kApart>(sums + std::int64_t(a[u].at[c]) * M::vector, quads, weight[c], unit);
            }
          }
        }
        scatter_sums<M::lanes>(dot, channel_lane);
        __syncwarp();  // all lanes have read the weights
        float* const to = reinterpret_cast<float*>(dots + k) + channel_lane * kDots / M::lanes;
#pragma unroll
        for (int i = 0; i < kKept; ++i) to[i] = start > 0 ? to[i] + dot[i] : dot[i];
      }
    }
    __syncwarp();
    finish<kTeam, Mixed>(p, grads, row, views, softmax, 1.0f, lane, dots, [&](int k) {
      const Sample s = sample_at<Mixed>(p, row, k, views);
      return Moment{s.x, s.y, attention_at<Mixed>(p, row, k, softmax.largest)};
    });
    __syncwarp();  // the next row's samples take the place of these
  }
}

}  // namespace dndetr::deform
