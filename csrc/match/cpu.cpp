// Matching on the CPU: memory of a thread, instruction sets, threads over problems when they pay.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>

#include "common/floats.h"
#include "common/ops.h"

namespace dndetr {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr int kAlignment = 64;  // bytes, the widest register
constexpr int kLine = 32;       // columns are padded to a multiple of it

// Costs beyond it count as not finite, so that no sum of them overflows: sums are double.
template <class Cost>
constexpr Cost kLargest = sizeof(Cost) == 4 ? std::numeric_limits<Cost>::max() : Cost(1e150);

template <class Cost>
bool is_sound(Cost c) {
  return std::fabs(c) <= kLargest<Cost>;
}

// What replaces costs that are not finite, where `worst` is the largest other one (or none: -kLargest).
template <class Cost>
Cost worst_cost(Cost worst) {
  if (worst == -kLargest<Cost>) return 1;
  return std::min(worst + std::fabs(worst) + 1, std::numeric_limits<Cost>::max());
}

// Four numbers of an array of any float type.
template <class Real>
void load_box(Array boxes, std::int64_t first, Real* box) {
  DNDETR_WITH_ELEMENT(boxes.dtype, {
    const Element* from = static_cast<const Element*>(boxes.data) + first;
    for (int k = 0; k < 4; ++k) box[k] = static_cast<Real>(widen(from[k]));
  })
}

int padded(int count) { return (count + kLine - 1) / kLine * kLine; }

// Aligned memory that only grows.
template <class Element>
class Lines {
 public:
  Element* resize(std::int64_t count) {
    if (count > size_) {
      constexpr std::int64_t kStep = kAlignment / sizeof(Element);
      size_ = (count + kStep - 1) / kStep * kStep;
      memory_.reset(std::aligned_alloc(kAlignment, size_ * sizeof(Element)));
      if (!memory_) throw std::bad_alloc();
    }
    return data();
  }
  Element* data() const { return static_cast<Element*>(memory_.get()); }

 private:
  std::int64_t size_ = 0;
  std::unique_ptr<void, decltype(&std::free)> memory_{nullptr, &std::free};
};

// Boxes of one set of queries, and their logits of one label: an array for each number, padded with zeros.
template <class Cost>
struct Queries {
  int count, stride, image = 0;
  Cost *x, *y, *w, *h, *logit;

  explicit Queries(int queries) : count(queries), stride(padded(queries)) {
    x = memory_.resize(5 * stride);
    std::fill_n(x, 5 * stride, Cost(0));
    y = x + stride;
    w = y + stride;
    h = w + stride;
    logit = h + stride;
  }

  void load_boxes(const MatchInputs& m, int layer, int from_image, int set) {
    image = from_image;
    const std::int64_t first = set * std::int64_t(count);
    first_logit_ = layer * m.logits_strides.layer + image * m.logits_strides.image + first * m.logits_strides.query;
    std::int64_t from = layer * m.boxes_strides.layer + image * m.boxes_strides.image + first * m.boxes_strides.query;
    for (int q = 0; q < count; ++q, from += m.boxes_strides.query) {
      Cost box[4];
      load_box(m.boxes, from, box);
      x[q] = box[0];
      y[q] = box[1];
      w[q] = box[2];
      h[q] = box[3];
    }
  }

  // A label that does not exist has no logits: its costs are not finite.
  void load_logits(const MatchInputs& m, std::int64_t label) const {
    if (label < 0 || label >= m.classes) {
      std::fill_n(logit, count, std::numeric_limits<Cost>::quiet_NaN());
      return;
    }
    DNDETR_WITH_ELEMENT(m.logits.dtype, {
      const Element* from = static_cast<const Element*>(m.logits.data) + first_logit_ + label;
      for (int q = 0; q < count; ++q) logit[q] = static_cast<Cost>(widen(from[q * m.logits_strides.query]));
    })
  }

 private:
  std::int64_t first_logit_ = 0;
  Lines<Cost> memory_;
};

// One problem and its solution. Rows are the smaller side: targets, or queries where there are more targets than those.
template <class Cost>
struct Problem {
  struct Closed {
    int column;
    double length, rise;
  };

  bool swapped;
  int rows, columns, stride, visited;
  Cost* cost;             // [rows, stride]
  double *length, *rise;  // [stride]: of the shortest path so far, and the negative price
  double* taken;          // [stride]: infinite where a row has the column, else 0
  std::int64_t* before;   // [stride]: the row before a column
  double* row_price;
  int *row_of, *column_of;
  Closed* closed;

  void resize(int queries, int targets) {
    swapped = targets > queries;
    rows = swapped ? queries : targets;
    columns = swapped ? targets : queries;
    stride = padded(columns);
    cost = costs_.resize(std::int64_t(rows) * stride);
    length = values_.resize(3 * stride + rows);
    rise = length + stride;
    taken = rise + stride;
    row_price = taken + stride;
    before = indices_.resize(stride);
    row_of = numbers_.resize(stride + rows);
    column_of = row_of + stride;
    closed = closed_.resize(rows);
  }

  // The query of each of `slots` targets, counted from `first`.
  void write_queries(std::int32_t* query, int slots, int first) const {
    std::fill_n(query, slots, -1);
    const int targets = swapped ? columns : rows;
    for (int t = 0; rows > 0 && t < targets; ++t) {
      const int found = swapped ? row_of[t] : column_of[t];
      query[t] = found < 0 ? -1 : found + first;
    }
  }

  void write_targets(std::int32_t* target, int queries) const {
    if (rows == 0) {
      std::fill_n(target, queries, -1);
    } else {
      std::copy_n(swapped ? column_of : row_of, queries, target);
    }
  }

 private:
  Lines<Cost> costs_;
  Lines<double> values_;
  Lines<std::int64_t> indices_;
  Lines<int> numbers_;
  Lines<Closed> closed_;
};

#define DNDETR_KERNELS "match/kernel.h"
#include "common/instruction_sets.h"

// Waking a team of threads costs tens of microseconds on a quiet machine and milliseconds on a shared one.
constexpr double kWorkPerTeam = 2e6;

// Calls run(first, last) over all problems, by a team of threads if `work` is worth waking one.
template <class Run>
void for_ranges(int problems, double work, int threads, const Run& run) {
  const int team = work > kWorkPerTeam ? std::min(threads, problems) : 1;
  if (team <= 1) return run(0, problems);
  const int chunks = std::min(problems, 8 * team);
#pragma omp parallel for num_threads(team) schedule(dynamic)
  for (int c = 0; c < chunks; ++c) {
    run(int(std::int64_t(problems) * c / chunks), int(std::int64_t(problems) * (c + 1) / chunks));
  }
}

double total(const std::int32_t* counts, int images) {
  double sum = 0;
  for (int b = 0; b < images; ++b) sum += counts[b];
  return sum;
}

constexpr double kCostWork = 8;  // of computing a cost, in terms of reading one

}  // namespace

Simd best_simd() {
#if defined(__x86_64__)
  // Kernels of both are compiled with fused multiply-add, which is a feature of its own.
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Simd::plain;
  const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  return wide ? Simd::avx512 : Simd::avx2;
#else
  return Simd::plain;
#endif
}

void assign(const AssignProblems& p, int threads, Simd simd) {
  simd = std::min(simd, best_simd());
  const auto run = p.is_double ? DNDETR_FOR(simd, assign_range<double>) : DNDETR_FOR(simd, assign_range<float>);
  for_ranges(p.problems, total(p.counts, p.problems) * p.queries, threads,
             [&](int first, int last) { run(p, first, last); });
}

void match_cost(const MatchInputs& m, void* cost, int threads, Simd simd) {
  simd = std::min(simd, best_simd());
  const auto run = m.logits.dtype == Dtype::float64 ? DNDETR_FOR(simd, match_cost_range<double>)
                                                    : DNDETR_FOR(simd, match_cost_range<float>);
  for_ranges(m.layers * m.batch, kCostWork * m.layers * total(m.counts, m.batch) * m.queries, threads,
             [&](int first, int last) { run(m, cost, first, last); });
}

void match(const MatchInputs& m, const MatchOutputs& out, int threads, Simd simd) {
  simd = std::min(simd, best_simd());
  const auto run = m.logits.dtype == Dtype::float64 ? DNDETR_FOR(simd, match_range<double>)
                                                    : DNDETR_FOR(simd, match_range<float>);
  for_ranges(m.layers * m.batch * out.sets, kCostWork * m.layers * total(m.counts, m.batch) * m.queries, threads,
             [&](int first, int last) { run(m, out, first, last); });
}

}  // namespace dndetr
