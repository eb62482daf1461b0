// One sample of deformable attention on a GPU: where it lies, what its corners weigh, and its gradient.
//
// Plain arithmetic on values, so it compiles for the host too, where the tests run the kernels thread by thread.
#pragma once

#include <cmath>
#include <cstdint>

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
struct Tiles {
  int height, width, heads;  // of a tile; heads: how many a block takes
  int grids, count;          // count: tiles of all grids
  Grid grid[kMaxLevels];
};

// What a kernel is given, by value. `padded`: samples rounded up to whole steps of the inner loop.
struct Problem {
  int batch, queries, heads, width, levels, points, samples, padded;
  int reference_width;
  unsigned per_level;  // 2^16 / points, rounded up: a sample's level is its number times that, by 2^16
  Level level[kMaxLevels];
  const void* value;
  std::int64_t batch_stride, head_stride;  // in elements
  unsigned pixel_stride;                   // in a lane's vectors
  Array reference, offsets, logits;
  const std::int64_t* valid_sizes;
  Tiles tiles;
};

// Which output row: image, head, and its place in [B, Q] and [B, Q, H].
struct Row {
  int image, head;
  std::int64_t query, index;
  bool live;  // others repeat a live row's work and write nothing: lanes of a warp stay together
};

DNDETR_CONVERT float load(const Array& a, std::int64_t i) {
  if (a.dtype == Dtype::float32) return static_cast<const float*>(a.data)[i];
  if (a.dtype == Dtype::bfloat16) return widen(static_cast<const BFloat16*>(a.data)[i]);
  return widen(static_cast<const Float16*>(a.data)[i]);
}
// Two elements that follow each other, the i-th pair of an array that starts where such a pair may.
struct Two {
  float x, y;
};
template <class Element>
struct alignas(2 * sizeof(Element)) ElementPair {
  Element x, y;
};
template <class Element>
DNDETR_CONVERT Two load_two_of(const void* data, std::int64_t i) {
  const auto two = static_cast<const ElementPair<Element>*>(data)[i];
  return {widen(two.x), widen(two.y)};
}
DNDETR_CONVERT Two load_two(const Array& a, std::int64_t i) {
  if (a.dtype == Dtype::float32) return load_two_of<float>(a.data, i);
  if (a.dtype == Dtype::bfloat16) return load_two_of<BFloat16>(a.data, i);
  return load_two_of<Float16>(a.data, i);
}
DNDETR_CONVERT void store(const Array& a, std::int64_t i, float x) {
  if (a.dtype == Dtype::float32) {
    static_cast<float*>(a.data)[i] = x;
  } else if (a.dtype == Dtype::bfloat16) {
    static_cast<BFloat16*>(a.data)[i] = narrow<BFloat16>(x);
  } else {
    static_cast<Float16*>(a.data)[i] = narrow<Float16>(x);
  }
}

// One coordinate: the two pixels around it, their bilinear weights and the derivatives of these. What is off the image or
// not valid weighs nothing; in its place the other one is read, if that is seen, else any pixel of the level.
struct Axis {
  int pixel, step;  // the second pixel is pixel + step, step 0 or 1
  float low, high, low_slope, high_slope;
  bool seen;  // one of the two, at least
};

DNDETR_CONVERT int clamp(int x, int low, int high) { return x < low ? low : x > high ? high : x; }

DNDETR_CONVERT Axis axis_at(float x, int size, int valid) {
  const bool off = x <= -1.0f || x >= float(size);  // false for a NaN, which goes on into the weights
  const float before = floorf(fminf(fmaxf(x, -1.0f), float(size)));
  const float part = off ? 0.0f : x - before;
  const int pixel = int(before), last = valid > 0 ? valid - 1 : 0;
  const bool has_low = pixel >= 0 && pixel < valid, has_high = !off && pixel + 1 < valid;
  Axis axis;
  axis.pixel = clamp(pixel, 0, last);
  axis.step = clamp(pixel + 1, 0, last) - axis.pixel;
  axis.low = has_low ? 1.0f - part : 0.0f;
  axis.high = has_high ? part : 0.0f;
  axis.low_slope = has_low ? -1.0f : 0.0f;
  axis.high_slope = has_high ? 1.0f : 0.0f;
  axis.seen = has_low || has_high;
  return axis;
}

// Offset -> pixel coordinate is  start + scale * offset.
struct Affine {
  Two start, scale;
};

DNDETR_CONVERT Affine affine_of(const Problem& p, const Row& row, int l, const Level& level) {
  const float width = float(level.width), height = float(level.height);
  if (p.reference_width == 0) return {{-0.5f, -0.5f}, {width, height}};
  const std::int64_t at = (row.query * p.levels + l) * (p.reference_width / 2);
  const Two centre = load_two(p.reference, at);
  const Two start{centre.x * width - 0.5f, centre.y * height - 0.5f};
  if (p.reference_width == 2) return {start, {1.0f, 1.0f}};
  const Two size = load_two(p.reference, at + 1);
  const float half = 0.5f / float(p.points);
  return {start, {size.x * width * half, size.y * height * half}};
}

struct Sample {
  Axis x, y;
  bool seen;
  float scale_x, scale_y;
  int width;
  unsigned pixel;  // of the upper left corner, from the first level's first
};

DNDETR_CONVERT Sample sample_at(const Problem& p, const Row& row, int k) {
  const int l = int(unsigned(k) * p.per_level >> 16);
  const Level level = p.level[l];
  int height = level.height, width = level.width;
  if (p.valid_sizes) {
    const std::int64_t* valid = p.valid_sizes + (std::int64_t(row.image) * p.levels + l) * 2;
    height = int(valid[0] < 0 ? 0 : valid[0] > height ? height : valid[0]);
    width = int(valid[1] < 0 ? 0 : valid[1] > width ? width : valid[1]);
  }
  const Affine affine = affine_of(p, row, l, level);
  const Two offset = load_two(p.offsets, row.index * p.samples + k);
  Sample s;
  s.x = axis_at(affine.start.x + affine.scale.x * offset.x, level.width, width);
  s.y = axis_at(affine.start.y + affine.scale.y * offset.y, level.height, height);
  s.seen = s.x.seen && s.y.seen;
  s.scale_x = affine.scale.x;
  s.scale_y = affine.scale.y;
  s.width = level.width;
  s.pixel = level.first + unsigned(s.y.pixel) * unsigned(level.width) + unsigned(s.x.pixel);
  return s;
}

// Gradients of a sample's weight, and of its pixel coordinates per unit of weight, from its corners' dots with the
// gradient of the output: above left, above right, below left, below right.
struct SampleGrad {
  float weight, x, y;
};

DNDETR_CONVERT SampleGrad differentiate(const Sample& s, float d00, float d01, float d10, float d11) {
  if (!s.seen) return {0, 0, 0};  // whatever pixel was read
  const float above = s.x.low * d00 + s.x.high * d01, below = s.x.low * d10 + s.x.high * d11;
  const float across = s.y.low * (s.x.low_slope * d00 + s.x.high_slope * d01) +
                       s.y.high * (s.x.low_slope * d10 + s.x.high_slope * d11);
  return {s.y.low * above + s.y.high * below, across, s.y.low_slope * above + s.y.high_slope * below};
}

}  // namespace dndetr::deform
