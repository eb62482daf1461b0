// Multi-scale deformable attention of one image and head, on one instruction set.
//
// Included once per instruction set, as vectors.h says.
//
// A head's pixels are first copied to `cells`: in the computing type, padded pixels zero, the width rounded up to whole
// registers, and a border of zeros around each level. A row's right border is the next row's left one. Coordinates are
// clamped to the border, so that a point off the image reads zeros, without a branch and never out of range. Points are
// prepared for a block of queries at a time, one query per vector lane; then each query gathers whole registers of
// channels. The backward pass adds to cells of its own in the order of the queries, so its sums do not depend on threads.

#include "vectors.h"

static_assert(kBlock % Registers<float>::lanes == 0);

// rows x columns elements -> to[column * kBlock + row]; missing rows become zero.
template <class Element, class Real>
DNDETR_KERNEL void load_columns(const Element* from, std::int64_t row_stride, int rows, int columns, Real* to) {
  for (int q = 0; q < rows; ++q) {
    const Element* row = from + q * row_stride;
    for (int k = 0; k < columns; ++k) to[k * kBlock + q] = static_cast<Real>(widen(row[k]));
  }
  for (int q = rows; q < kBlock; ++q) {
    for (int k = 0; k < columns; ++k) to[k * kBlock + q] = 0;
  }
}
template <class Element, class Real>
DNDETR_KERNEL void store_columns(const Real* from, std::int64_t row_stride, int rows, int columns, Element* to) {
  for (int q = 0; q < rows; ++q) {
    Element* row = to + q * row_stride;
    for (int k = 0; k < columns; ++k) row[k] = narrow<Element>(from[k * kBlock + q]);
  }
}

template <class Element, class Real>
DNDETR_KERNEL void load_row(const Element* from, int width, Real* to) {
  for (int d = 0; d < width; ++d) to[d] = static_cast<Real>(widen(from[d]));
}
template <class Element, class Real>
DNDETR_KERNEL void store_row(const Real* from, int width, Element* to) {
  for (int d = 0; d < width; ++d) to[d] = narrow<Element>(from[d]);
}

struct Inside {
  int height, width;
};
DNDETR_KERNEL Inside inside(const DeformAttn& p, int b, int l) {
  const int h = p.shapes[2 * l], w = p.shapes[2 * l + 1];
  if (!p.valid_sizes) return {h, w};
  const std::int64_t* valid = p.valid_sizes + (std::int64_t(b) * p.levels + l) * 2;
  return {static_cast<int>(std::clamp<std::int64_t>(valid[0], 0, h)),
          static_cast<int>(std::clamp<std::int64_t>(valid[1], 0, w))};
}

// The head's pixels -> cells. Borders were zeroed when the workspace was made, and stay so.
template <class Element, class Real>
DNDETR_KERNEL void pack(const DeformAttn& p, int b, int head, const Workspace<Real>& s) {
  const Element* pixel = static_cast<const Element*>(p.value.data) + b * p.batch_stride + head * p.head_stride;
  for (int l = 0; l < p.levels; ++l) {
    const Level& level = s.levels[l];
    const Inside valid = inside(p, b, l);
    for (int y = 0; y < level.height; ++y) {
      Real* cell = s.cells + (level.first + std::int64_t(y + 1) * level.row + 1) * s.stride;
      for (int x = 0; x < level.width; ++x, pixel += p.pixel_stride, cell += s.stride) {
        if (y < valid.height && x < valid.width) {
          load_row(pixel, p.width, cell);
        } else {
          std::memset(cell, 0, s.stride * sizeof(Real));
        }
      }
    }
  }
}

// Cells -> the head's part of grad_value, zero at padded pixels.
template <class Element, class Real>
DNDETR_KERNEL void unpack(const DeformAttn& p, int b, int head, const Workspace<Real>& s, Element* to) {
  const std::int64_t pixels = s.levels[p.levels].pixel, step = std::int64_t(p.heads) * p.width;
  Element* pixel = to + b * pixels * step + head * p.width;
  for (int l = 0; l < p.levels; ++l) {
    const Level& level = s.levels[l];
    const Inside valid = inside(p, b, l);
    for (int y = 0; y < level.height; ++y) {
      const Real* cell = s.grads + (level.first + std::int64_t(y + 1) * level.row + 1) * s.stride;
      for (int x = 0; x < level.width; ++x, pixel += step, cell += s.stride) {
        if (y < valid.height && x < valid.width) {
          store_row(cell, p.width, pixel);
        } else {
          std::memset(pixel, 0, p.width * sizeof(Element));
        }
      }
    }
  }
}

// One coordinate in pixels -> the cell before it, and the part of the way to the next one; in (-1, size), or clamped.
template <class Real>
DNDETR_KERNEL void split(Reals<Real> x, int size, Indices<Real>& before, Reals<Real>& part) {
  const Reals<Real> low = Reals<Real>{} - 1, high = Reals<Real>{} + static_cast<Real>(size);
  x = x < low ? low : x;
  x = x > high ? high : x;
  const Reals<Real> safe = x > low ? x : low;  // a NaN goes on in `part`, but not into an address
  before = __builtin_convertvector(safe, Indices<Real>);
  before += __builtin_convertvector(before, Reals<Real>) > safe;
  const Indices<Real> last = Indices<Real>{} + (size - 1);
  before = before > last ? last : before;
  part = x - __builtin_convertvector(before, Reals<Real>);
}

// Offset -> pixel coordinate is  start + scale * offset,  for one of x, y.
template <class Real>
struct Affine {
  Reals<Real> start, scale;
};
template <class Real>
DNDETR_KERNEL Affine<Real> affine(const DeformAttn& p, const Workspace<Real>& s, int l, int axis, int q, int size) {
  const Reals<Real> one = Reals<Real>{} + 1, side = one * static_cast<Real>(size);
  const Real* reference = s.reference + l * p.reference_width * kBlock + q;
  if (p.reference_width == 0) return {one * Real(-0.5), side};
  const Reals<Real> start = at(reference + axis * kBlock) * side - Real(0.5);
  if (p.reference_width == 2) return {start, one};
  return {start, at(reference + (2 + axis) * kBlock) * side * (Real(0.5) / p.points)};
}

// Softmax over all levels and points, or the given weights.
template <class Real>
DNDETR_KERNEL void weigh(const DeformAttn& p, const Workspace<Real>& s) {
  if (p.reference_width == 0) return;
  const int samples = p.levels * p.points;
  for (int q = 0; q < kBlock; q += Registers<Real>::lanes) {
    Reals<Real> most = at(s.weight + q), sum{};
    for (int k = 1; k < samples; ++k) {
      const Reals<Real> x = at(s.weight + k * kBlock + q);
      most = x > most ? x : most;
    }
    for (int k = 0; k < samples; ++k) {
      Reals<Real>& x = at(s.weight + k * kBlock + q);
      x = exp_of_negative(x - most);
      sum += x;
    }
    for (int k = 0; k < samples; ++k) at(s.weight + k * kBlock + q) /= sum;
  }
}

// Queries first..first + rows - 1 -> cells, parts and corner weights of all their samples.
template <class Real>
DNDETR_KERNEL void prepare(const DeformAttn& p, int b, int head, int first, int rows, const Workspace<Real>& s) {
  const int samples = p.levels * p.points;
  const std::int64_t row = (std::int64_t(b) * p.queries + first) * p.heads + head;
  DNDETR_WITH_ELEMENT(p.offsets.dtype, load_columns(static_cast<const Element*>(p.offsets.data) + row * samples * 2,
                                                    std::int64_t(p.heads) * samples * 2, rows, samples * 2, s.offset))
  DNDETR_WITH_ELEMENT(p.logits.dtype, load_columns(static_cast<const Element*>(p.logits.data) + row * samples,
                                                   std::int64_t(p.heads) * samples, rows, samples, s.weight))
  if (p.reference_width > 0) {
    const int columns = p.levels * p.reference_width;
    const std::int64_t start = (std::int64_t(b) * p.queries + first) * columns;
    DNDETR_WITH_ELEMENT(p.reference.dtype, load_columns(static_cast<const Element*>(p.reference.data) + start, columns,
                                                        rows, columns, s.reference))
  }
  weigh(p, s);
  for (int l = 0, k = 0; l < p.levels; ++l) {
    const Level& level = s.levels[l];
    for (int q = 0; q < kBlock; q += Registers<Real>::lanes) {
      const Affine<Real> x_of = affine(p, s, l, 0, q, level.width), y_of = affine(p, s, l, 1, q, level.height);
      const Real width = static_cast<Real>(level.width), height = static_cast<Real>(level.height);
      for (int point = 0; point < p.points; ++point) {
        const int i = (k + point) * kBlock + q;
        const Reals<Real> x = x_of.start + x_of.scale * at(s.offset + 2 * i - q);
        const Reals<Real> y = y_of.start + y_of.scale * at(s.offset + 2 * i - q + kBlock);
        Indices<Real> column, line;
        Reals<Real> right, down;
        split<Real>(x, level.width, column, right);
        split<Real>(y, level.height, line, down);
        *reinterpret_cast<Indices<Real>*>(s.cell + i) =
            (line + 1) * level.row + column + (1 + static_cast<typename Workspace<Real>::Index>(level.first));
        const Reals<Real> zero{}, one = zero + 1, weight = at(s.weight + i);
        const auto out = (x <= -one) | (x >= width) | (y <= -one) | (y >= height);
        at(s.seen + i) = out ? zero : one;
        at(s.right + i) = right;
        at(s.down + i) = down;
        const Reals<Real> low = weight * down, high = weight - low, low_right = low * right, high_right = high * right;
        Real* corner = s.corner + (k + point) * 4 * kBlock + q;
        at(corner) = high - high_right;
        at(corner + kBlock) = high_right;
        at(corner + 2 * kBlock) = low - low_right;
        at(corner + 3 * kBlock) = low_right;
      }
    }
    k += p.points;
  }
}

// N registers of channels of one query: the weighted sum of all corners of all samples.
template <int N, class Real>
DNDETR_KERNEL void gather(const DeformAttn& p, const Workspace<Real>& s, int q, int channel) {
  constexpr int kLanes = Registers<Real>::lanes;
  Reals<Real> above[N] = {}, below[N] = {};
  int k = 0;
  for (int l = 0; l < p.levels; ++l) {
    const std::int64_t next_row = s.levels[l].row * s.stride;
    for (const int end = k + p.points; k < end; ++k) {
      const Real* high = s.cells + std::int64_t(s.cell[k * kBlock + q]) * s.stride + channel;
      const Real* low = high + next_row;
      const Real* weight = s.corner + k * 4 * kBlock + q;
      for (int n = 0; n < N; ++n) {
        above[n] += weight[0] * at(high + n * kLanes);
        below[n] += weight[2 * kBlock] * at(low + n * kLanes);
      }
      for (int n = 0; n < N; ++n) {
        above[n] += weight[kBlock] * at(high + s.stride + n * kLanes);
        below[n] += weight[3 * kBlock] * at(low + s.stride + n * kLanes);
      }
    }
  }
  for (int n = 0; n < N; ++n) at(s.row + channel + n * kLanes) = above[n] + below[n];
}

// Adds upper halves of a register to lower ones until a quad of lanes is left (or what the register has).
template <class Real, int Lanes>
struct Folded {
  typedef Real Lower __attribute__((vector_size(Lanes / 2 * sizeof(Real)), may_alias));
  template <class Whole>
  static DNDETR_KERNEL void store(const Whole& x, Real* to) {
    Lower low, high;
    std::memcpy(&low, &x, sizeof low);
    std::memcpy(&high, reinterpret_cast<const char*>(&x) + sizeof low, sizeof high);
    Folded<Real, Lanes / 2>::store(low + high, to);
  }
};
template <class Real>
struct Folded<Real, 4> {
  template <class Whole>
  static DNDETR_KERNEL void store(const Whole& x, Real* to) { std::memcpy(to, &x, sizeof x); }
};
template <class Real>
struct Folded<Real, 2> : Folded<Real, 4> {};

// N registers of channels of one query's gradient, backwards: spread to the corners, and dotted with each of them.
template <int N, class Real>
DNDETR_KERNEL void scatter(const DeformAttn& p, const Workspace<Real>& s, int q, int channel) {
  constexpr int kLanes = Registers<Real>::lanes, kPart = kLanes < 4 ? kLanes : 4;
  const Real *const cells = s.cells + channel, *const corner = s.corner + q;
  Real *const grads = s.grads + channel, *const partial = s.partial;
  Reals<Real> grad[N];
  for (int n = 0; n < N; ++n) grad[n] = at(s.row + channel + n * kLanes);
  int k = 0;
  for (int l = 0; l < p.levels; ++l) {
    const std::int64_t next_row = s.levels[l].row * s.stride;
    const std::int64_t corners[4] = {0, s.stride, next_row, next_row + s.stride};
    for (const int end = k + p.points; k < end; ++k) {
      const std::int64_t cell = std::int64_t(s.cell[k * kBlock + q]) * s.stride;
      for (int c = 0; c < 4; ++c) {
        const std::int64_t place = cell + corners[c];
        const Real weight = corner[(k * 4 + c) * kBlock];
        Reals<Real> dot{};
        for (int n = 0; n < N; ++n) {
          dot += grad[n] * at(cells + place + n * kLanes);
          at(grads + place + n * kLanes) += weight * grad[n];
        }
        Folded<Real, kLanes>::store(dot, partial + (k * 4 + c) * kPart);
      }
    }
  }
  Real* const dots = s.dot + q;
  for (int i = 0; i < k * 4; ++i) {
    Real sum = channel > 0 ? dots[i * kBlock] : 0;
    for (int part = 0; part < kPart; ++part) sum += partial[i * kPart + part];
    dots[i * kBlock] = sum;
  }
}

// All channels, several registers at a time.
#define DNDETR_ALL_CHANNELS(STEP)                                            \
  for (int channel = 0; channel < s.stride;) {                              \
    const int left = (s.stride - channel) / Registers<Real>::lanes;         \
    if (left >= 4) {                                                        \
      STEP<4>(p, s, q, channel), channel += 4 * Registers<Real>::lanes;     \
    } else if (left >= 2) {                                                 \
      STEP<2>(p, s, q, channel), channel += 2 * Registers<Real>::lanes;     \
    } else {                                                                \
      STEP<1>(p, s, q, channel), channel += Registers<Real>::lanes;         \
    }                                                                       \
  }

// From the dots of a block to the gradients of its offsets, logits (in place of both) and reference points.
template <class Real>
DNDETR_KERNEL void differentiate(const DeformAttn& p, const Workspace<Real>& s) {
  const int samples = p.levels * p.points;
  for (int q = 0; q < kBlock; q += Registers<Real>::lanes) {
    Reals<Real> mean{};
    for (int l = 0, k = 0; l < p.levels; ++l) {
      const Level& level = s.levels[l];
      const Affine<Real> x_of = affine(p, s, l, 0, q, level.width), y_of = affine(p, s, l, 1, q, level.height);
      Reals<Real> moved_x{}, moved_y{}, grown_x{}, grown_y{};
      for (const int end = k + p.points; k < end; ++k) {
        const int i = k * kBlock + q;
        const Real* dot = s.dot + k * 4 * kBlock + q;
        const Reals<Real> d00 = at(dot), d01 = at(dot + kBlock), d10 = at(dot + 2 * kBlock), d11 = at(dot + 3 * kBlock);
        const Reals<Real> right = at(s.right + i), down = at(s.down + i), weight = at(s.weight + i), zero{};
        const auto seen = at(s.seen + i) > zero;
        const Reals<Real> above = d00 + right * (d01 - d00), below = d10 + right * (d11 - d10);
        const Reals<Real> left_side = d00 + down * (d10 - d00), right_side = d01 + down * (d11 - d01);
        const Reals<Real> grad_x = seen ? weight * (right_side - left_side) : zero;
        const Reals<Real> grad_y = seen ? weight * (below - above) : zero;
        const Reals<Real> grad_weight = above + down * (below - above);
        Reals<Real>&offset_x = at(s.offset + 2 * i - q), &offset_y = at(s.offset + 2 * i - q + kBlock);
        moved_x += grad_x, moved_y += grad_y;
        grown_x += grad_x * offset_x, grown_y += grad_y * offset_y;
        offset_x = grad_x * x_of.scale, offset_y = grad_y * y_of.scale;
        at(s.right + i) = grad_weight;
        mean += weight * grad_weight;
      }
      Real* reference = s.reference + l * p.reference_width * kBlock + q;
      const Real width = static_cast<Real>(level.width), height = static_cast<Real>(level.height);
      if (p.reference_width > 0) {
        at(reference) = moved_x * width;
        at(reference + kBlock) = moved_y * height;
      }
      if (p.reference_width == 4) {
        at(reference + 2 * kBlock) = grown_x * (width * (Real(0.5) / p.points));
        at(reference + 3 * kBlock) = grown_y * (height * (Real(0.5) / p.points));
      }
    }
    for (int k = 0; k < samples; ++k) {
      Reals<Real>& weight = at(s.weight + k * kBlock + q);
      const Reals<Real> grad_weight = at(s.right + k * kBlock + q);
      weight = p.reference_width > 0 ? weight * (grad_weight - mean) : grad_weight;
    }
  }
}

template <class Real>
DNDETR_TARGET void forward(const DeformAttn& p, Array out, int b, int head, const Workspace<Real>& s) {
  DNDETR_WITH_ELEMENT(p.value.dtype, pack<Element>(p, b, head, s))
  for (int first = 0; first < p.queries; first += kBlock) {
    const int rows = std::min(kBlock, p.queries - first);
    prepare(p, b, head, first, rows, s);
    for (int q = 0; q < rows; ++q) {
      DNDETR_ALL_CHANNELS(gather)
      const std::int64_t place = ((std::int64_t(b) * p.queries + first + q) * p.heads + head) * p.width;
      DNDETR_WITH_ELEMENT(out.dtype, store_row(s.row, p.width, static_cast<Element*>(out.data) + place))
    }
  }
}

template <class Real>
DNDETR_TARGET void backward(const DeformAttn& p, Array grad_out, const DeformAttnGrads& grads, int b, int head,
                            const Workspace<Real>& s) {
  const int samples = p.levels * p.points, columns = p.levels * p.reference_width;
  DNDETR_WITH_ELEMENT(p.value.dtype, pack<Element>(p, b, head, s))
  std::fill_n(s.grads, s.levels[p.levels].first * s.stride, Real(0));
  for (int first = 0; first < p.queries; first += kBlock) {
    const int rows = std::min(kBlock, p.queries - first);
    const std::int64_t row = (std::int64_t(b) * p.queries + first) * p.heads + head;
    prepare(p, b, head, first, rows, s);
    for (int q = 0; q < rows; ++q) {
      const std::int64_t place = (row + std::int64_t(q) * p.heads) * p.width;
      DNDETR_WITH_ELEMENT(grad_out.dtype, load_row(static_cast<const Element*>(grad_out.data) + place, p.width, s.row))
      DNDETR_ALL_CHANNELS(scatter)
    }
    differentiate(p, s);
    DNDETR_WITH_ELEMENT(grads.offsets.dtype,
                        store_columns(s.offset, std::int64_t(p.heads) * samples * 2, rows, samples * 2,
                                      static_cast<Element*>(grads.offsets.data) + row * samples * 2))
    DNDETR_WITH_ELEMENT(grads.logits.dtype, store_columns(s.weight, std::int64_t(p.heads) * samples, rows, samples,
                                                          static_cast<Element*>(grads.logits.data) + row * samples))
    if (grads.reference.data) {
      const std::int64_t start = ((std::int64_t(b) * p.heads + head) * p.queries + first) * columns;
      store_columns(s.reference, columns, rows, columns, static_cast<Real*>(grads.reference.data) + start);
    }
  }
  DNDETR_WITH_ELEMENT(grads.value.dtype, unpack(p, b, head, s, static_cast<Element*>(grads.value.data)))
}

#undef DNDETR_ALL_CHANNELS
#undef DNDETR_KERNEL
