// One sample of deformable attention on a GPU: where it lies, what its corners weigh, and its gradient.
//
// Plain arithmetic on values, so it compiles for the host too, where the tests run the kernels thread by thread.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "common/floats.h"
#include "common/ops.h"

namespace dndetr::deform {

constexpr int kMaxLevels = 8, kMaxPoints = 8;

struct Level {
  int height, width;
  unsigned first;  // its first pixel
};

// Queries of a block: a tile of a grid in row-major order. A level where queries are pixels, else all queries in a line.
struct Grid {
  int height, width, columns;  // columns: tiles in a row
  int first, first_tile;       // its first query and tile
};
// Powers of two are given by their exponents: a block finds its rows without a division.
struct Tiles {
  int height_bits, width_bits, heads_bits;  // of a tile; heads: how many a block takes
  int grids, count;                         // count: tiles of all grids
  Grid grid[kMaxLevels];

  DNDETR_CONVERT int rows() const { return 1 << (height_bits + width_bits + heads_bits); }
};

// What a kernel is given, by value. `padded`: samples rounded up to whole steps of the inner loop.
struct Problem {
  int batch, queries, heads, width, levels, points, samples, padded;
  int reference_width;
  unsigned per_level;  // 2^16 / points, rounded up: a sample's level is its number times that, by 2^16
  Level level[kMaxLevels];
  const void* value;
  std::int64_t batch_stride;           // in elements
  unsigned pixel_stride, head_stride;  // in a lane's vectors
  Array reference, offsets, logits;
  std::int64_t offsets_stride, logits_stride;  // elements from a query to the next
  const std::int64_t* valid_sizes;
  Tiles tiles;
};

// Which output row: its head, and its place in [B, Q] and [B, Q, H]. Arrays start with what is the row's.
struct Row {
  int head;
  std::int64_t query, index;
  bool live;  // others repeat a live row's work and write nothing: lanes of a warp stay together
  Array reference, offsets, logits;
};

// Given: the elements of offsets and logits as a kernel was compiled for them, with reference points in float. Mixed: all as
// their arrays say, and there may be no reference points.
struct Mixed {};
template <class Given>
constexpr bool is_mixed = std::is_same_v<Given, Mixed>;
template <class Given>
using Reference = std::conditional_t<is_mixed<Given>, Mixed, float>;
template <class Given>
DNDETR_CONVERT bool has_reference(const Problem& p) {
  return !is_mixed<Given> || p.reference_width > 0;
}

// The array from element i on.
template <class Given>
DNDETR_CONVERT Array advance(const Array& a, std::int64_t i) {
  if constexpr (is_mixed<Given>) {
    return {static_cast<char*>(a.data) + i * (a.dtype == Dtype::float32 ? 4 : 2), a.dtype};
  } else {
    return {static_cast<Given*>(a.data) + i, a.dtype};
  }
}
template <class Given>
DNDETR_CONVERT float load(const Array& a, int i) {
  if constexpr (is_mixed<Given>) {
    if (a.dtype == Dtype::float32) return load<float>(a, i);
    return a.dtype == Dtype::bfloat16 ? load<BFloat16>(a, i) : load<Float16>(a, i);
  } else {
    return widen(static_cast<const Given*>(a.data)[i]);
  }
}
// Two elements that follow each other, the i-th pair of an array that starts where such a pair may.
struct Two {
  float x, y;
};
template <class Element>
struct alignas(2 * sizeof(Element)) ElementPair {
  Element x, y;
};
template <class Given>
DNDETR_CONVERT Two load_two(const Array& a, int i) {
  if constexpr (is_mixed<Given>) {
    if (a.dtype == Dtype::float32) return load_two<float>(a, i);
    return a.dtype == Dtype::bfloat16 ? load_two<BFloat16>(a, i) : load_two<Float16>(a, i);
  } else {
    const auto two = static_cast<const ElementPair<Given>*>(a.data)[i];
    return {widen(two.x), widen(two.y)};
  }
}
template <class Given>
DNDETR_CONVERT void store(const Array& a, int i, float x) {
  if constexpr (is_mixed<Given>) {
    if (a.dtype == Dtype::float32) return store<float>(a, i, x);
    return a.dtype == Dtype::bfloat16 ? store<BFloat16>(a, i, x) : store<Float16>(a, i, x);
  } else {
    static_cast<Given*>(a.data)[i] = narrow<Given>(x);
  }
}
template <class Given>
DNDETR_CONVERT void store_two(const Array& a, int i, Two x) {
  if constexpr (is_mixed<Given>) {
    store<Mixed>(a, 2 * i, x.x), store<Mixed>(a, 2 * i + 1, x.y);
  } else {
    static_cast<ElementPair<Given>*>(a.data)[i] = {narrow<Given>(x.x), narrow<Given>(x.y)};
  }
}

// A level as an image has it, of which `valid` pixels count.
struct alignas(16) View {
  float height, width;
  int valid_height, valid_width;
  int columns;  // width
  unsigned first;
};

DNDETR_CONVERT View view_of(const Problem& p, int image, int l) {
  const Level level = p.level[l];
  View view{float(level.height), float(level.width), level.height, level.width, level.width, level.first};
  if (p.valid_sizes) {
    const std::int64_t* valid = p.valid_sizes + (std::int64_t(image) * p.levels + l) * 2;
    view.valid_height = int(valid[0] < 0 ? 0 : valid[0] > level.height ? level.height : valid[0]);
    view.valid_width = int(valid[1] < 0 ? 0 : valid[1] > level.width ? level.width : valid[1]);
  }
  return view;
}

// One coordinate, between the pixels `low` and low + 1: which of them count, and the second one's bilinear weight.
struct Axis {
  int low;
  float part;
  bool has_low, has_high;

  // The first pixel that is read, and the step to the second, 0 or 1: in the place of one that does not count, the other.
  DNDETR_CONVERT int pixel() const { return has_low ? low : low + 1; }
  DNDETR_CONVERT bool step() const { return has_low && has_high; }
  DNDETR_CONVERT bool seen() const { return has_low || has_high; }
  DNDETR_CONVERT float low_weight() const { return has_low ? 1.0f - part : 0.0f; }
  DNDETR_CONVERT float high_weight() const { return has_high ? part : 0.0f; }
};

DNDETR_CONVERT int floor_of(float x) {
#ifdef __CUDA_ARCH__
  return __float2int_rd(x);
#else
  return int(std::floor(x));
#endif
}

// x in pixels of which there are `size`. A NaN lies before the first one, and goes on into the weights.
DNDETR_CONVERT Axis axis_at(float x, float size, int valid) {
  Axis axis;
  axis.low = floor_of(fminf(fmaxf(x, -1.0f), size));
  axis.part = x - float(axis.low);
  axis.has_low = unsigned(axis.low) < unsigned(valid);
  axis.has_high = !(x <= -1.0f) && axis.low + 1 < valid;
  return axis;
}

// Offset -> pixel coordinate is  start + scale * offset.
struct Affine {
  Two start, scale;
};

template <class Given>
DNDETR_CONVERT Affine affine_of(const Problem& p, const Row& row, int l, const View& level) {
  if (!has_reference<Given>(p)) return {{-0.5f, -0.5f}, {level.width, level.height}};
  const int at = p.reference_width == 4 ? 2 * l : l;
  const Two centre = load_two<Reference<Given>>(row.reference, at);
  const Two start{centre.x * level.width - 0.5f, centre.y * level.height - 0.5f};
  if (p.reference_width == 2) return {start, {1.0f, 1.0f}};
  const Two size = load_two<Reference<Given>>(row.reference, at + 1);
  const float half = 0.5f / float(p.points);
  return {start, {size.x * level.width * half, size.y * level.height * half}};
}

DNDETR_CONVERT int level_of(const Problem& p, int k) { return int(unsigned(k) * p.per_level >> 16); }

struct Sample {
  Axis x, y;
  unsigned pixel;    // that is read first, the upper left one, from the first level's first
  unsigned columns;  // pixels to the one below

  DNDETR_CONVERT bool seen() const { return x.seen() && y.seen(); }
};

template <class Given>
DNDETR_CONVERT Sample sample_at(const Problem& p, const Row& row, int k, const View* views) {
  const int l = level_of(p, k);
  const View level = views[l];
  const Affine affine = affine_of<Given>(p, row, l, level);
  const Two offset = load_two<Given>(row.offsets, k);
  Sample s;
  s.x = axis_at(affine.start.x + affine.scale.x * offset.x, level.width, level.valid_width);
  s.y = axis_at(affine.start.y + affine.scale.y * offset.y, level.height, level.valid_height);
  s.columns = unsigned(level.columns);
  s.pixel = level.first + unsigned(s.y.pixel()) * s.columns + unsigned(s.x.pixel());
  return s;
}

// Gradients of a sample's weight, and of its pixel coordinates per unit of weight, from its corners' dots with the
// gradient of the output: above left, above right, below left, below right.
struct SampleGrad {
  float weight, x, y;
};

DNDETR_CONVERT SampleGrad differentiate(const Axis& x, const Axis& y, float d00, float d01, float d10, float d11) {
  if (!(x.seen() && y.seen())) return {0, 0, 0};
  // What does not count is zero, whatever was read in its place.
  d00 = x.has_low && y.has_low ? d00 : 0.0f, d01 = x.has_high && y.has_low ? d01 : 0.0f;
  d10 = x.has_low && y.has_high ? d10 : 0.0f, d11 = x.has_high && y.has_high ? d11 : 0.0f;
  const float across_above = d01 - d00, across_below = d11 - d10;
  const float above = d00 + x.part * across_above, below = d10 + x.part * across_below;
  return {above + y.part * (below - above), across_above + y.part * (across_below - across_above), below - above};
}

}  // namespace dndetr::deform
