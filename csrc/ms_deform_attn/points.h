// Points of a block of queries, one query per vector lane: pixels and weights of their corners, and gradients. Included
// once per instruction set.

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

// One coordinate in pixels, clamped to [-1, size] -> the pixel before it, and the part of the way to the next one.
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

// The (height, width) of a level's pixels that count.
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
      x = exp_of(x - most);
      sum += x;
    }
    for (int k = 0; k < samples; ++k) at(s.weight + k * kBlock + q) /= sum;
  }
}

// Queries first..first + rows - 1 -> pixels and weights of the corners of all their samples. Called once per block, so not
// inlined: that would only take the compiler longer.
template <class Real>
DNDETR_TARGET __attribute__((noinline)) void prepare(const DeformAttn& p, int b, int head, int first, int rows,
                                                     const Workspace<Real>& s) {
  const int samples = p.levels * p.points;
  const std::int64_t query = std::int64_t(b) * p.queries + first;
  const std::int64_t offset = query * p.offsets_stride + head * samples * 2, logit = query * p.logits_stride + head * samples;
  DNDETR_WITH_ELEMENT(p.offsets.dtype, load_columns(static_cast<const Element*>(p.offsets.data) + offset, p.offsets_stride,
                                                    rows, samples * 2, s.offset))
  DNDETR_WITH_ELEMENT(p.logits.dtype, load_columns(static_cast<const Element*>(p.logits.data) + logit, p.logits_stride,
                                                   rows, samples, s.weight))
  if (p.reference_width > 0) {
    const int columns = p.levels * p.reference_width;
    const std::int64_t start = query * columns;
    DNDETR_WITH_ELEMENT(p.reference.dtype, load_columns(static_cast<const Element*>(p.reference.data) + start, columns,
                                                        rows, columns, s.reference))
  }
  weigh(p, s);
  for (int l = 0, k = 0; l < p.levels; ++l, k += p.points) {
    const Level& level = s.levels[l];
    const Inside valid = inside(p, b, l);
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
        at(s.right + i) = right;
        at(s.down + i) = down;
        const Reals<Real> weight = at(s.weight + i);
        const Reals<Real> low = weight * down, high = weight - low, low_right = low * right, high_right = high * right;
        Real* corner = s.corner + (k + point) * 4 * kBlock + q;
        at(corner) = high - high_right;
        at(corner + kBlock) = high_right;
        at(corner + 2 * kBlock) = low - low_right;
        at(corner + 3 * kBlock) = low_right;
        // A NaN is not off: it goes on in the weights.
        const Indices<Real> off = (x <= Real(-1)) | (x >= width) | (y <= Real(-1)) | (y >= height);
        const Indices<Real> no_left = off | (column < 0) | (column >= valid.width);
        const Indices<Real> no_right = off | (column + 1 >= valid.width);
        const Indices<Real> no_upper = (line < 0) | (line >= valid.height), no_lower = line + 1 >= valid.height;
        const Indices<Real> first = line * level.width + column + static_cast<Index<Real>>(level.first);
        Index<Real>* pixel = s.pixel + (k + point) * 4 * kBlock + q;
        at(pixel) = first | no_upper | no_left;
        at(pixel + kBlock) = (first + 1) | no_upper | no_right;
        at(pixel + 2 * kBlock) = (first + level.width) | no_lower | no_left;
        at(pixel + 3 * kBlock) = (first + level.width + 1) | no_lower | no_right;
      }
    }
  }
}

// From the dots of a block to the gradients of its offsets, logits (in place of both) and reference points.
template <class Real>
DNDETR_TARGET __attribute__((noinline)) void differentiate(const DeformAttn& p, const Workspace<Real>& s) {
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
        const Reals<Real> right = at(s.right + i), down = at(s.down + i), weight = at(s.weight + i);
        const Reals<Real> above = d00 + right * (d01 - d00), below = d10 + right * (d11 - d10);
        const Reals<Real> left_side = d00 + down * (d10 - d00), right_side = d01 + down * (d11 - d01);
        const Reals<Real> grad_x = weight * (right_side - left_side), grad_y = weight * (below - above);
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
