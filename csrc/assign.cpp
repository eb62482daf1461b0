// Batched assignment on the CPU: vector lanes over the columns of a problem, threads over problems when they pay.
#include "assign.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "ops.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace dndetr {
namespace {

// Duals and path lengths are double for every input: the optimum is then scipy's, also at near-ties of float32 costs.
constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kLargest = 1e150;  // costs beyond it count as not finite, so that no sum of them overflows

// Vectors as wide as the registers: wider ones would be taken apart lane by lane.
template <int Lanes>
struct Simds;
#define DNDETR_SIMDS(LANES)                                                                    \
  template <>                                                                                  \
  struct Simds<LANES> {                                                                        \
    typedef double Values __attribute__((vector_size(LANES * sizeof(double)), may_alias));     \
    typedef std::int64_t Indices __attribute__((vector_size(LANES * sizeof(std::int64_t)), may_alias)); \
  };
DNDETR_SIMDS(2)
DNDETR_SIMDS(4)
DNDETR_SIMDS(8)
#undef DNDETR_SIMDS

constexpr int kMostLanes = 8;
struct alignas(kMostLanes * sizeof(double)) Line {
  double lane[kMostLanes];
};

// Columns of one problem, padded to whole lines: padded costs are infinite, so that they are never the shortest.
template <int Lanes>
struct VectorColumns {
  using Values = typename Simds<Lanes>::Values;
  using Indices = typename Simds<Lanes>::Indices;

  int stride;
  const double* cost;
  double *length, *rise, *open_rise;  // rise is the negative price, infinite where closed; open_rise keeps it meanwhile
  double* blocked;                    // infinite where a row has the column, else 0
  std::int64_t* previous;

  template <class Vector, class Element>
  static DNDETR_INLINE Vector& at(Element* array, int j) {
    return *reinterpret_cast<Vector*>(array + j);
  }

  static DNDETR_INLINE Indices lanes() {
    Indices numbers{};
    for (int l = 0; l < Lanes; ++l) numbers[l] = l;
    return numbers;
  }

  DNDETR_INLINE const double* row(int i) const { return cost + static_cast<std::ptrdiff_t>(i) * stride; }

  // The smallest of all lanes, the lowest column first.
  static DNDETR_INLINE Shortest<double> reduce(const Values& low, const Indices& where) {
    Shortest<double> best{low[0], static_cast<int>(where[0])};
    for (int l = 1; l < Lanes; ++l) {
      if (low[l] < best.length || (low[l] == best.length && where[l] < best.column)) {
        best = {low[l], static_cast<int>(where[l])};
      }
    }
    return best;
  }

  DNDETR_INLINE Shortest<double> smallest(int i) const {
    Values low = at<const Values>(row(i), 0);
    Indices here = lanes(), where = here;
    for (int j = Lanes; j < stride; j += Lanes) {
      here += Lanes;
      const Values c = at<const Values>(row(i), j);
      const Indices less = c < low;
      low = less ? c : low;
      where = less ? here : where;
    }
    return reduce(low, where);
  }

  DNDETR_INLINE void restart() { std::fill_n(length, stride, kInfinity); }

  DNDETR_INLINE Shortest<double> relax(int i, double base) {
    const Indices from = static_cast<std::int64_t>(i) - Indices{};
    Values low = kInfinity - Values{};
    Indices here = lanes(), where = here;
    for (int j = 0; j < stride; j += Lanes, here += Lanes) {
      const Values through = base + at<const Values>(row(i), j) + at<Values>(rise, j);
      const Values old = at<Values>(length, j);
      const Indices shorter = through < old;
      const Values now = shorter ? through : old;
      at<Values>(length, j) = now;
      at<Indices>(previous, j) = shorter ? from : at<Indices>(previous, j);
      const Indices less = now < low;
      low = less ? now : low;
      where = less ? here : where;
    }
    return reduce(low, where);
  }

  DNDETR_INLINE int find_free(double target) const {
    const std::int64_t none = stride;
    Indices here = lanes() + none, lowest = none - Indices{};
    for (int j = stride - Lanes; j >= 0; j -= Lanes) {
      here -= Lanes;
      const Indices hit = at<Values>(length, j) + at<Values>(blocked, j) == target;
      lowest = hit ? here : lowest;
    }
    std::int64_t first = lowest[0];
    for (int l = 1; l < Lanes; ++l) first = std::min<std::int64_t>(first, lowest[l]);
    return first == none ? -1 : static_cast<int>(first);
  }

  DNDETR_INLINE int before(int j) const { return static_cast<int>(previous[j]); }

  DNDETR_INLINE void take(int j) { blocked[j] = kInfinity; }

  DNDETR_INLINE void close(int j) {
    open_rise[j] = rise[j];
    rise[j] = length[j] = kInfinity;
  }

  DNDETR_INLINE void reopen(int j, double amount) { rise[j] = open_rise[j] + amount; }
};

// Memory of one thread, grown to its largest problem.
struct Workspace {
  std::vector<Line> lines;
  std::vector<double> row_price, row_length;
  std::vector<int> column_of, row_of, closed, contested;
};

// Copies the costs of real targets to rows of whole vectors, with what is not finite replaced by a worst finite cost.
template <class Cost>
DNDETR_INLINE void load(const AssignProblems& p, const Cost* source, bool swapped, int rows, int columns, int stride,
                        double* cost) {
  const std::int64_t row_step = swapped ? p.query_stride : p.target_stride;
  const std::int64_t column_step = swapped ? p.target_stride : p.query_stride;
  double worst = -kLargest;
  int odd = 0;
  const auto copy = [&](const Cost* from, std::int64_t from_step, double* to, std::int64_t to_step, int count) {
    for (int k = 0; k < count; ++k) {
      const double c = static_cast<double>(from[k * from_step]);
      odd |= !(std::fabs(c) <= kLargest);
      to[k * to_step] = c;
    }
  };
  if (column_step == 1) {
    for (int i = 0; i < rows; ++i) copy(source + i * row_step, 1, cost + std::int64_t(i) * stride, 1, columns);
  } else {
    for (int j = 0; j < columns; ++j) copy(source + j * column_step, row_step, cost + j, stride, rows);
  }
  for (int i = 0; i < rows; ++i) {
    std::fill(cost + std::int64_t(i) * stride + columns, cost + std::int64_t(i + 1) * stride, kInfinity);
  }
  if (!odd) return;
  const auto sound = [](double c) { return std::fabs(c) <= kLargest; };
  for (int i = 0; i < rows; ++i) {
    double* row = cost + std::int64_t(i) * stride;
    for (int j = 0; j < columns; ++j) worst = sound(row[j]) ? std::max(worst, row[j]) : worst;
  }
  worst = worst == -kLargest ? 1 : worst + std::fabs(worst) + 1;
  for (int i = 0; i < rows; ++i) {
    double* row = cost + std::int64_t(i) * stride;
    for (int j = 0; j < columns; ++j) row[j] = sound(row[j]) ? row[j] : worst;
  }
}

template <int Lanes, class Cost>
DNDETR_INLINE void assign_one(const AssignProblems& p, int problem, Workspace& w) {
  std::int32_t* query_of = p.query_of + std::int64_t(problem) * p.targets;
  std::fill_n(query_of, p.targets, -1);
  const int targets = std::clamp<int>(p.counts[problem], 0, p.targets);
  const bool swapped = targets > p.queries;
  const int rows = swapped ? p.queries : targets, columns = swapped ? targets : p.queries;
  if (rows == 0) return;

  const int lines = (columns + kMostLanes - 1) / kMostLanes, stride = lines * kMostLanes;
  w.lines.resize(std::size_t(rows + 5) * lines);
  w.row_price.resize(rows);
  w.row_length.resize(rows);
  w.column_of.resize(rows);
  w.closed.resize(rows);
  w.contested.resize(rows);
  w.row_of.assign(columns, -1);
  const auto array = [&](int k) { return w.lines[std::size_t(k) * lines].lane; };
  VectorColumns<Lanes> view{stride, array(5), array(0), array(1), array(2), array(3),
                           reinterpret_cast<std::int64_t*>(array(4))};
  std::fill_n(view.rise, stride, 0.0);
  std::fill_n(view.blocked, stride, 0.0);
  load(p, static_cast<const Cost*>(p.cost) + problem * p.problem_stride, swapped, rows, columns, stride, array(5));

  solve<double>(view, rows,
                {w.row_price.data(), w.column_of.data(), w.row_of.data(), w.closed.data(), w.row_length.data(),
                 w.contested.data()});
  for (int i = 0; i < rows; ++i) {
    if (swapped) {
      query_of[w.column_of[i]] = i;
    } else {
      query_of[i] = w.column_of[i];
    }
  }
}

template <int Lanes>
DNDETR_INLINE void assign_range(const AssignProblems& p, int first, int last) {
  Workspace workspace;
  for (int problem = first; problem < last; ++problem) {
    if (p.is_double) {
      assign_one<Lanes, double>(p, problem, workspace);
    } else {
      assign_one<Lanes, float>(p, problem, workspace);
    }
  }
}

// One copy of everything above per instruction set, chosen at run time: a wheel runs on any machine of its architecture.
void assign_plain(const AssignProblems& p, int first, int last) { assign_range<2>(p, first, last); }
#if defined(__x86_64__)
__attribute__((target("avx2"))) void assign_avx2(const AssignProblems& p, int first, int last) {
  assign_range<4>(p, first, last);
}
__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl"))) void assign_avx512(const AssignProblems& p, int first,
                                                                               int last) {
  assign_range<8>(p, first, last);
}
#endif

using Range = void (*)(const AssignProblems&, int, int);

Range range_for(Simd simd) {
#if defined(__x86_64__)
  if (simd == Simd::avx512) return assign_avx512;
  if (simd == Simd::avx2) return assign_avx2;
#endif
  return assign_plain;
}

// Waking a team of threads costs tens of microseconds on a quiet machine and milliseconds on a shared one.
constexpr double kWorkPerTeam = 2e6;

}  // namespace

Simd best_simd() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl")) {
    return Simd::avx512;
  }
  if (__builtin_cpu_supports("avx2")) return Simd::avx2;
#endif
  return Simd::plain;
}

void assign(const AssignProblems& p, int threads, Simd simd) {
  const Range range = range_for(std::min(simd, best_simd()));
#ifdef _OPENMP
  double work = 0;
  for (int m = 0; m < p.problems; ++m) work += double(p.counts[m]) * p.queries;
  if (threads > 1 && p.problems > 1 && work > kWorkPerTeam) {
    const int chunks = std::min(p.problems, 8 * threads);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int c = 0; c < chunks; ++c) {
      range(p, int(std::int64_t(p.problems) * c / chunks), int(std::int64_t(p.problems) * (c + 1) / chunks));
    }
    return;
  }
#endif
  range(p, 0, p.problems);
}

}  // namespace dndetr
