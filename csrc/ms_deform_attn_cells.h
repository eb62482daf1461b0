// A head's pixels in memory that a kernel reads and adds to without a branch. Included once per instruction set.
//
// Pixels are copied to `cells`: in the computing type, padded pixels zero, the width rounded up to whole registers, and a
// border of zeros around each level. A row's right border is the next row's left one.

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
