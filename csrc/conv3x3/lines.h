// Transforms of 3x3 convolutions by stride. Included once per instruction set; formulas are in dndetr/ops/conv3x3.py.
//
// The transforms of one line; each is applied to columns, then to rows. The window of the tile with number t begins at pixel
// t * step - border.

// Five places of a line whose values are a, b, c, d, e: at the points 0, +-a, +-b.
DNDETR_KERNEL void at_points(Vec a, Vec b, Vec c, Vec d, Vec e, Vec* y) {
  const Vec even_a = e - kB2 * c, odd_a = kA * (d - kB2 * b), even_b = e - kA2 * c, odd_b = kB * (d - kA2 * b);
  y[0] = kA2 * kB2 * a - (kA2 + kB2) * c + e;
  y[1] = even_a + odd_a, y[2] = even_a - odd_a;
  y[3] = even_b + odd_b, y[4] = even_b - odd_b;
}
// Values of four coefficients there, and its transpose.
DNDETR_KERNEL void evaluate(const Vec* x, Vec* y) {
  const Vec even_a = x[0] + kA2 * x[2], odd_a = kA * x[1] + kA * kA2 * x[3];
  const Vec even_b = x[0] + kB2 * x[2], odd_b = kB * x[1] + kB * kB2 * x[3];
  y[0] = x[0];
  y[1] = even_a + odd_a, y[2] = even_a - odd_a;
  y[3] = even_b + odd_b, y[4] = even_b - odd_b;
}
DNDETR_KERNEL void gather(const Vec* x, Vec (&y)[4]) {
  const Vec even_a = x[1] + x[2], odd_a = x[1] - x[2], even_b = x[3] + x[4], odd_b = x[3] - x[4];
  y[0] = x[0] + even_a + even_b;
  y[1] = kA * odd_a + kB * odd_b;
  y[2] = kA2 * even_a + kB2 * even_b;
  y[3] = kA * kA2 * odd_a + kB * kB2 * odd_b;
}

template <int Stride>
struct Lines;

// Stride 1: six points, the last one infinity.
template <>
struct Lines<1> {
  // 6 pixels -> 6 places (B^T).
  struct Window {
    static constexpr int from = 6, to = 6, step = kSide, border = 1;
    static DNDETR_KERNEL void apply(const Vec (&x)[6], Vec (&y)[6]) {
      at_points(x[0], x[1], x[2], x[3], x[4], y);
      y[5] = kA2 * kB2 * x[1] - (kA2 + kB2) * x[3] + x[5];
    }
  };
  typedef Window GradWindow;  // of gradients, for those of the pixels

  // 3 taps -> 6 places (G).
  struct Kernel {
    static constexpr int from = 3, to = kWays;
    static DNDETR_KERNEL void apply(const Vec (&x)[3], Vec (&y)[kWays]) {
      const Vec even_a = kPerA * x[0] + kPerA * kA2 * x[2], odd_a = kPerA * kA * x[1];
      const Vec even_b = kPerB * x[0] + kPerB * kB2 * x[2], odd_b = kPerB * kB * x[1];
      y[0] = kPerZero * x[0];
      y[1] = even_a + odd_a, y[2] = even_a - odd_a;
      y[3] = even_b + odd_b, y[4] = even_b - odd_b;
      y[5] = x[2];
    }
  };

  // 6 places -> 4 results (A^T).
  struct Result {
    static constexpr int from = 6, to = kSide;
    static DNDETR_KERNEL void apply(const Vec (&x)[6], Vec (&y)[kSide]) {
      gather(x, y);
      y[3] += x[5];
    }
  };
  typedef Result GradPixels;

  // 4 gradients of results -> 6 places (A).
  struct Grad {
    static constexpr int from = kSide, to = 6, step = kSide, border = 0;
    static DNDETR_KERNEL void apply(const Vec (&x)[kSide], Vec (&y)[6]) {
      evaluate(x, y);
      y[5] = x[3];
    }
  };

  // 6 places -> gradients of 3 taps (G^T).
  struct GradKernel {
    static constexpr int from = kWays, to = 3;
    static DNDETR_KERNEL void apply(const Vec (&x)[kWays], Vec (&y)[3]) {
      const Vec even_a = kPerA * (x[1] + x[2]), odd_a = kPerA * (x[1] - x[2]);
      const Vec even_b = kPerB * (x[3] + x[4]), odd_b = kPerB * (x[3] - x[4]);
      y[0] = kPerZero * x[0] + even_a + even_b;
      y[1] = kA * odd_a + kB * odd_b;
      y[2] = kA2 * even_a + kB2 * even_b + x[5];
    }
  };
};

// Stride 2: the outer taps meet every other pixel, a filter of two taps at five points; the middle tap meets those between,
// one product for each result.
template <>
struct Lines<2> {
  struct Window {
    static constexpr int from = 9, to = 9, step = 2 * kSide, border = 1;
    static DNDETR_KERNEL void apply(const Vec (&x)[9], Vec (&y)[9]) {
      at_points(x[0], x[2], x[4], x[6], x[8], y);
      y[5] = x[1], y[6] = x[3], y[7] = x[5], y[8] = x[7];
    }
  };
  struct GradWindow {
    static constexpr int from = 5, to = 9, step = kSide, border = 0;
    static DNDETR_KERNEL void apply(const Vec (&x)[5], Vec (&y)[9]) {
      at_points(x[0], x[1], x[2], x[3], x[4], y);
      y[5] = x[0], y[6] = x[1], y[7] = x[2], y[8] = x[3];
    }
  };
  struct Kernel {
    static constexpr int from = 3, to = kWays;
    static DNDETR_KERNEL void apply(const Vec (&x)[3], Vec (&y)[kWays]) {
      y[0] = kPerZero * x[0];
      y[1] = kPerA * x[0] + kPerA * kA * x[2], y[2] = kPerA * x[0] - kPerA * kA * x[2];
      y[3] = kPerB * x[0] + kPerB * kB * x[2], y[4] = kPerB * x[0] - kPerB * kB * x[2];
      y[5] = x[1];
    }
  };
  struct Result {
    static constexpr int from = 9, to = kSide;
    static DNDETR_KERNEL void apply(const Vec (&x)[9], Vec (&y)[kSide]) {
      gather(x, y);
      y[0] += x[5], y[1] += x[6], y[2] += x[7], y[3] += x[8];
    }
  };
  struct GradPixels {
    static constexpr int from = 9, to = 2 * kSide;
    static DNDETR_KERNEL void apply(const Vec (&x)[9], Vec (&y)[2 * kSide]) {
      Vec odd[kSide];
      gather(x, odd);
      y[0] = x[5], y[2] = x[6], y[4] = x[7], y[6] = x[8];
      y[1] = odd[0], y[3] = odd[1], y[5] = odd[2], y[7] = odd[3];
    }
  };
  struct Grad {
    static constexpr int from = kSide, to = 9, step = kSide, border = 0;
    static DNDETR_KERNEL void apply(const Vec (&x)[kSide], Vec (&y)[9]) {
      evaluate(x, y);
      y[5] = x[0], y[6] = x[1], y[7] = x[2], y[8] = x[3];
    }
  };
  struct GradKernel {
    static constexpr int from = kWays, to = 3;
    static DNDETR_KERNEL void apply(const Vec (&x)[kWays], Vec (&y)[3]) {
      y[0] = kPerZero * x[0] + kPerA * (x[1] + x[2]) + kPerB * (x[3] + x[4]);
      y[1] = x[5];
      y[2] = kPerA * kA * (x[1] - x[2]) + kPerB * kB * (x[3] - x[4]);
    }
  };
};

// The place of the kernel that a place of a window of Side x Side places meets: the middle tap's are all the same.
template <int Side>
DNDETR_KERNEL int kernel_place(int place) {
  return std::min(place / Side, kWays - 1) * kWays + std::min(place % Side, kWays - 1);
}
