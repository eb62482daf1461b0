// The mapping of 2020 that most detectors still use: one thread per output channel, written anew as a peer to measure against.
//
// Every thread of a head repeats the arithmetic of all its samples and loads 4 bytes at a time; backwards a block is one
// (query, head), whose first thread sums the other threads' parts after each sample. float32 only. Built by device_code.py.
#include <cstdint>

namespace {

constexpr int kMaxLevels = 8;

struct Sizes {
  int batch, queries, heads, width, levels, points, pixels;
  int height[kMaxLevels], columns[kMaxLevels], first[kMaxLevels];
};

struct Corners {
  int at[4];  // pixel, -1 outside
  float weight[4], x[4], y[4];  // and its derivatives by the pixel coordinates
};

__device__ Corners corners_of(const Sizes& s, int level, float location_x, float location_y) {
  const int height = s.height[level], columns = s.columns[level];
  const float x = location_x * columns - 0.5f, y = location_y * height - 0.5f;
  const int left = int(floorf(x)), top = int(floorf(y));
  const float right_part = x - left, low_part = y - top;
  Corners corners;
  for (int c = 0; c < 4; ++c) {
    const int column = left + c % 2, row = top + c / 2;
    const bool inside = column >= 0 && column < columns && row >= 0 && row < height;
    const float across = c % 2 ? right_part : 1 - right_part, down = c / 2 ? low_part : 1 - low_part;
    corners.at[c] = inside ? s.first[level] + row * columns + column : -1;
    corners.weight[c] = across * down;
    corners.x[c] = (c % 2 ? 1 : -1) * down;
    corners.y[c] = (c / 2 ? 1 : -1) * across;
  }
  return corners;
}

__global__ void forward(const __grid_constant__ Sizes s, const float* value, const float* locations,
                        const float* weights, float* out, std::int64_t count) {
  const std::int64_t index = std::int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index >= count) return;
  const int channel = index % s.width, head = index / s.width % s.heads;
  const std::int64_t row = index / s.width, image = row / s.heads / s.queries;
  const float* const pixels = value + (image * s.pixels * s.heads + head) * s.width + channel;
  float sum = 0;
  for (int l = 0; l < s.levels; ++l) {
    for (int p = 0; p < s.points; ++p) {
      const std::int64_t k = (row * s.levels + l) * s.points + p;
      const Corners corners = corners_of(s, l, locations[2 * k], locations[2 * k + 1]);
      float sample = 0;
      for (int c = 0; c < 4; ++c) {
        if (corners.at[c] >= 0) sample += corners.weight[c] * pixels[std::int64_t(corners.at[c]) * s.heads * s.width];
      }
      sum += weights[k] * sample;
    }
  }
  out[index] = sum;
}

__global__ void backward(const __grid_constant__ Sizes s, const float* grad_out, const float* value,
                         const float* locations, const float* weights, float* grad_value, float* grad_locations,
                         float* grad_weights) {
  extern __shared__ float parts[];  // [3, width]
  const std::int64_t row = blockIdx.x, image = row / s.heads / s.queries;
  const int channel = threadIdx.x, head = row % s.heads;
  const std::int64_t start = (image * s.pixels * s.heads + head) * s.width + channel;
  const float grad = grad_out[row * s.width + channel];
  for (int l = 0; l < s.levels; ++l) {
    for (int p = 0; p < s.points; ++p) {
      const std::int64_t k = (row * s.levels + l) * s.points + p;
      const Corners corners = corners_of(s, l, locations[2 * k], locations[2 * k + 1]);
      const float weight = weights[k];
      float sample = 0, x = 0, y = 0;
      for (int c = 0; c < 4; ++c) {
        if (corners.at[c] < 0) continue;
        const std::int64_t at = start + std::int64_t(corners.at[c]) * s.heads * s.width;
        const float pixel = value[at];
        atomicAdd(grad_value + at, weight * corners.weight[c] * grad);
        sample += corners.weight[c] * pixel;
        x += corners.x[c] * pixel;
        y += corners.y[c] * pixel;
      }
      parts[channel] = grad * sample;
      parts[s.width + channel] = grad * weight * x * s.columns[l];
      parts[2 * s.width + channel] = grad * weight * y * s.height[l];
      __syncthreads();
      if (channel == 0) {
        float sum = 0, sum_x = 0, sum_y = 0;
        for (int i = 0; i < s.width; ++i) sum += parts[i], sum_x += parts[s.width + i], sum_y += parts[2 * s.width + i];
        grad_weights[k] = sum;
        grad_locations[2 * k] = sum_x, grad_locations[2 * k + 1] = sum_y;
      }
      __syncthreads();
    }
  }
}

Sizes sizes_of(const int* sizes, const int* shapes) {
  Sizes s{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], 0, {}, {}, {}};
  for (int l = 0; l < s.levels; ++l) {
    s.height[l] = shapes[2 * l], s.columns[l] = shapes[2 * l + 1], s.first[l] = s.pixels;
    s.pixels += s.height[l] * s.columns[l];
  }
  return s;
}

}  // namespace

// sizes: batch, queries, heads, width, levels, points.
extern "C" int classical_forward(const int* sizes, const int* shapes, const float* value, const float* locations,
                                 const float* weights, float* out, void* stream) {
  const Sizes s = sizes_of(sizes, shapes);
  const std::int64_t count = std::int64_t(s.batch) * s.queries * s.heads * s.width;
  forward<<<unsigned((count + 1023) / 1024), 1024, 0, static_cast<cudaStream_t>(stream)>>>(s, value, locations, weights, out,
                                                                                          count);
  return cudaGetLastError();
}
extern "C" int classical_backward(const int* sizes, const int* shapes, const float* grad_out, const float* value,
                                  const float* locations, const float* weights, float* grad_value, float* grad_locations,
                                  float* grad_weights, void* stream) {
  const Sizes s = sizes_of(sizes, shapes);
  const unsigned rows = unsigned(s.batch) * s.queries * s.heads;
  backward<<<rows, s.width, 3 * s.width * sizeof(float), static_cast<cudaStream_t>(stream)>>>(
      s, grad_out, value, locations, weights, grad_value, grad_locations, grad_weights);
  return cudaGetLastError();
}
