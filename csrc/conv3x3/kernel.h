// 3x3 convolution by tiles of 4x4 results: transforms and products. Included once per instruction set; formulas are in
// dndetr/ops/conv3x3.py.

#include "common/vectors.h"

#include "common/matrix_products.h"

typedef Reals<float> Vec;

#include "lines.h"

constexpr int kGradTiles = 128;  // tiles of two panels that stay in the first cache

// A square of registers in memory, `row` and `column` numbers apart.
struct Square {
  float* at0;
  std::int64_t row, column;

  DNDETR_KERNEL Vec get(int i, int j) const { return at(at0 + i * row + j * column); }
  DNDETR_KERNEL void put(int i, int j, Vec x) const { at(at0 + i * row + j * column) = x; }
};

// One that is added to.
struct Sums {
  float* at0;
  std::int64_t row, column;

  DNDETR_KERNEL void put(int i, int j, Vec x) const { at(at0 + i * row + j * column) += x; }
};

// Part of a map, zero beyond its edges; of the rows and columns from `low` to below `high` there are pixels.
template <bool Inside>
struct Pixels {
  const float* at0;
  std::int64_t row, column;
  int low_row, high_row, low_column, high_column;

  DNDETR_KERNEL Vec get(int i, int j) const {
    if (Inside || (i >= low_row && i < high_row && j >= low_column && j < high_column)) {
      return at(at0 + i * row + j * column);
    }
    return Vec{};
  }
};

struct Results {
  float* at0;
  std::int64_t row, column;
  int rows, columns;
  Vec bias;

  DNDETR_KERNEL void put(int i, int j, Vec x) const {
    if (i < rows && j < columns) at(at0 + i * row + j * column) = x + bias;
  }
};

template <class Line, class Source, class Sink>
DNDETR_KERNEL void transform(const Source& from, const Sink& to) {
  Vec half[Line::to][Line::from];
#pragma GCC unroll 9
  for (int j = 0; j < Line::from; ++j) {
    Vec x[Line::from], y[Line::to];
#pragma GCC unroll 9
    for (int i = 0; i < Line::from; ++i) x[i] = from.get(i, j);
    Line::apply(x, y);
#pragma GCC unroll 9
    for (int i = 0; i < Line::to; ++i) half[i][j] = y[i];
  }
#pragma GCC unroll 9
  for (int i = 0; i < Line::to; ++i) {
    Vec y[Line::to];
    Line::apply(half[i], y);
#pragma GCC unroll 9
    for (int j = 0; j < Line::to; ++j) to.put(i, j, y[j]);
  }
}

// Places [places, panels, tiles, kPanel] of one tile's window of a map.
template <class Line>
DNDETR_TARGET void transform_tile(const Map& map, const Grid& grid, int tile, int index, int tiles, float* places) {
  const int image = tile / grid.per_image, inside = tile % grid.per_image;
  const int y = inside / grid.columns * Line::step - Line::border, x = inside % grid.columns * Line::step - Line::border;
  const std::int64_t column = map.channels, row = column * map.width, panel = std::int64_t(tiles) * kPanel<float>;
  const float* at0 = map.data + image * row * map.height + y * row + x * column;
  const int low_row = std::max(0, -y), low_column = std::max(0, -x);
  const int high_row = std::min(Line::from, map.height - y), high_column = std::min(Line::from, map.width - x);
  const bool whole = !low_row && !low_column && high_row == Line::from && high_column == Line::from;
  const std::int64_t place = panel * (map.channels / kPanel<float>);
  for (int c = 0; c < map.channels; c += kLanes<float>) {
    float* to = places + c / kPanel<float> * panel + index * kPanel<float> + c % kPanel<float>;
    const Square square = {to, place * Line::to, place};
    if (whole) {
      transform<Line>(Pixels<true>{at0 + c, row, column}, square);
    } else {
      transform<Line>(Pixels<false>{at0 + c, row, column, low_row, high_row, low_column, high_column}, square);
    }
  }
}

template <class Line>
DNDETR_TARGET void transform_tiles(const Map& map, const Grid& grid, int first, int count, int tiles, float* places) {
  for (int t = 0; t < count; ++t) transform_tile<Line>(map, grid, first + t, t, tiles, places);
}
template <int Stride>
DNDETR_TARGET void transform_windows(const Map& map, const Grid& grid, int first, int count, int tiles, float* places) {
  transform_tiles<typename Lines<Stride>::Window>(map, grid, first, count, tiles, places);
}
template <int Stride>
DNDETR_TARGET void transform_gradients(const Map& map, const Grid& grid, int first, int count, int tiles, float* places) {
  transform_tiles<typename Lines<Stride>::Grad>(map, grid, first, count, tiles, places);
}

// Kernel [outputs, 3, 3, inputs] -> the places [36, outputs / kPanel, inputs, kPanel] of a panel of outputs.
template <int Stride>
DNDETR_TARGET void transform_kernel(const float* kernel, int inputs, int outputs, int panel, float* places) {
  constexpr int kBlock = kLanes<float>;
  alignas(64) float taps[9 * kBlock * kPanel<float>];
  const std::int64_t place = std::int64_t(outputs) * inputs;
  for (int c = 0; c < inputs; c += kBlock) {
    for (int tap = 0; tap < 9; ++tap) {
      const float* from = kernel + (std::int64_t(panel) * kPanel<float> * 9 + tap) * inputs + c;
      transpose(from, 9 * inputs, kPanel<float>, kBlock, kBlock, taps + tap * kBlock * kPanel<float>, kPanel<float>);
    }
    for (int n = 0; n < kBlock * kPanel<float>; n += kLanes<float>) {
      float* to = places + (std::int64_t(panel) * inputs + c) * kPanel<float> + n;
      transform<typename Lines<Stride>::Kernel>(Square{taps + n, 3 * kBlock * kPanel<float>, kBlock * kPanel<float>},
                                                Square{to, place * kWays, place});
    }
  }
}

// The same of the kernel that gradients are convolved with: inputs and outputs change places, taps are turned round.
template <int Stride>
DNDETR_TARGET void transform_turned_kernel(const float* kernel, int inputs, int outputs, int panel, float* places) {
  const std::int64_t place = std::int64_t(outputs) * inputs;
  for (int k = 0; k < outputs; ++k) {
    for (int n = 0; n < kPanel<float>; n += kLanes<float>) {
      const float* last = kernel + (std::int64_t(k) * 9 + 8) * inputs + panel * kPanel<float> + n;
      float* to = places + (std::int64_t(panel) * outputs + k) * kPanel<float> + n;
      transform<typename Lines<Stride>::Kernel>(Square{const_cast<float*>(last), -3 * std::int64_t(inputs), -inputs},
                                                Square{to, place * kWays, place});
    }
  }
}

// Results of a block's tiles for some panels of outputs.
template <class Window, class Result>
DNDETR_TARGET void convolve_tiles(const Map& map, const float* kernel, const Block& block, const float* bias,
                                  const Map& out, const Grid& grid, float* scratch) {
  constexpr int kPlaces = Window::to * Window::to;
  constexpr int kWide = kPanel<float>;
  const int inputs = map.channels, panels = inputs / kWide, tiles = block.rows;
  const int height = rounded_up(block.count, kRowUnit);
  float* windows = scratch;
  float* products = windows + std::int64_t(kPlaces) * inputs * tiles;
  transform_tiles<Window>(map, grid, block.first, block.count, tiles, windows);
  // Rows that only fill up the height are multiplied too, and must not be slow subnormal numbers.
  for (int p = 0; p < kPlaces * panels; ++p) {
    std::memset(windows + (std::int64_t(p) * tiles + block.count) * kWide, 0,
                (height - block.count) * kWide * sizeof(float));
  }
  const std::int64_t panel = std::int64_t(tiles) * kWide;
  for (int group = block.first_panel; group < block.last_panel; group += block.group) {
    const int wide = std::min(block.group, block.last_panel - group);
    for (int place = 0; place < kPlaces; ++place) {
      const float* from = windows + place * panels * panel;
      for (int k = 0; k < wide; ++k) {
        const float* by =
            kernel + (std::int64_t(kernel_place<Window::to>(place)) * (out.channels / kWide) + group + k) * inputs * kWide;
        float* to = products + (std::int64_t(place) * block.group + k) * panel;
        row_products(from, panel, by, panels, height, to);
      }
    }
    const std::int64_t column = out.channels, row = column * out.width, place = panel * block.group;
    for (int t = 0; t < block.count; ++t) {
      const int tile = block.first + t, image = tile / grid.per_image, inside = tile % grid.per_image;
      const int y = inside / grid.columns * Result::to, x = inside % grid.columns * Result::to;
      float* at0 = out.data + image * row * out.height + y * row + x * column + group * kWide;
      for (int k = 0; k < wide * kWide; k += kLanes<float>) {
        const Square square = {products + k / kWide * panel + t * kWide + k % kWide, place * Result::from, place};
        const Vec shift = bias ? at(bias + group * kWide + k) : Vec{};
        transform<Result>(square, Results{at0 + k, row, column, out.height - y, out.width - x, shift});
      }
    }
  }
}

template <int Stride>
DNDETR_TARGET void convolve_block(const Map& map, const float* kernel, const Block& block, const float* bias,
                                  const Map& out, const Grid& grid, float* scratch) {
  convolve_tiles<typename Lines<Stride>::Window, typename Lines<Stride>::Result>(map, kernel, block, bias, out, grid, scratch);
}
template <int Stride>
DNDETR_TARGET void grad_input_block(const Map& map, const float* kernel, const Block& block, const float* bias,
                                    const Map& out, const Grid& grid, float* scratch) {
  typedef Lines<Stride> L;
  convolve_tiles<typename L::GradWindow, typename L::GradPixels>(map, kernel, block, bias, out, grid, scratch);
}

// Adds to the gradient [outputs, 3, 3, inputs] of a kernel where a panel of outputs meets one of inputs, from the places of
// some tiles. scratch: kKernelPlaces * kPanel * kPanel numbers.
template <int Stride>
DNDETR_TARGET void grad_kernel_block(const float* results, const float* windows, int inputs, int outputs, int tiles,
                                     int output, int input, float* grad, float* scratch) {
  constexpr int kWide = kPanel<float>, kPlace = kWide * kWide, kSidePlaces = Lines<Stride>::Window::to;
  const std::int64_t panel = std::int64_t(tiles) * kWide;
  std::memset(scratch, 0, kKernelPlaces * kPlace * sizeof(float));
  for (int place = 0; place < kSidePlaces * kSidePlaces; ++place) {
    const float* rows = results + (std::int64_t(place) * (outputs / kWide) + output) * panel;
    const float* columns = windows + (std::int64_t(place) * (inputs / kWide) + input) * panel;
    for (int t = 0; t < tiles; t += kGradTiles) {
      column_products(rows + t * kWide, columns + t * kWide, std::min(kGradTiles, tiles - t),
                      scratch + kernel_place<kSidePlaces>(place) * kPlace);
    }
  }
  for (int k = 0; k < kWide; ++k) {
    for (int c = 0; c < kWide; c += kLanes<float>) {
      float* to = grad + (std::int64_t(output) * kWide + k) * 9 * inputs + input * kWide + c;
      transform<typename Lines<Stride>::GradKernel>(Square{scratch + k * kWide + c, kPlace * kWays, kPlace},
                                                    Sums{to, 3 * std::int64_t(inputs), inputs});
    }
  }
}
