// Costs and assignments on the CPU, vector lanes over queries, on one instruction set.
//
// Included once per instruction set, as vectors.h says.

#include "common/vectors.h"

#define DNDETR_INLINE DNDETR_KERNEL

#include "assign.h"

// As many costs as there are doubles in a register.
template <class Cost>
struct PerDouble {
  typedef Cost Costs __attribute__((vector_size(DNDETR_VECTOR / 8 * sizeof(Cost))));
};
template <class Real>
using Bits = Indices<Real>;
template <class Real>
using IntegerAs = typename Registers<Real>::Index;
template <class Real>
constexpr int kLanes = Registers<Real>::lanes;

template <class Element, class Vector>
DNDETR_INLINE Element least_lane(const Vector& x) {
  if constexpr (sizeof(Vector) > 16) {
    typedef Element Half __attribute__((vector_size(sizeof(Vector) / 2)));
    Half half[2];
    std::memcpy(half, &x, sizeof x);
    return least_lane<Element>(half[0] < half[1] ? half[0] : half[1]);
  } else {
    Element low = x[0];
    for (std::size_t l = 1; l < sizeof(Vector) / sizeof(Element); ++l) low = x[l] < low ? x[l] : low;
    return low;
  }
}

template <class Vector>
DNDETR_INLINE bool any_lane(const Vector& x) {
  bool any = false;
  for (std::size_t l = 0; l < sizeof(x) / sizeof(x[0]); ++l) any |= x[l] != 0;
  return any;
}

#include "common/vector_math.h"

#include "cost.h"

// The smallest value seen, and the lowest column that has it; two chains of vectors, so that one need not wait for the
// other.
template <class Real>
struct Lowest {
  Reals<Real> low[2];
  Bits<Real> where[2], here[2];

  DNDETR_INLINE Lowest() {
    for (int chain = 0; chain < 2; ++chain) {
      low[chain] = Reals<Real>{} + std::numeric_limits<Real>::infinity();
      where[chain] = here[chain] = lane_numbers<Real>() + chain * kLanes<Real>;
    }
  }

  DNDETR_INLINE void see(int chain, const Reals<Real>& values) {
    const Bits<Real> less = values < low[chain];
    low[chain] = less ? values : low[chain];
    where[chain] = less ? here[chain] : where[chain];
    here[chain] += 2 * kLanes<Real>;
  }

  DNDETR_INLINE Shortest<Real> find() const {
    const Real least = least_lane<Real>(smaller(low[0], low[1]));
    const Bits<Real> never = Bits<Real>{} + std::numeric_limits<std::int32_t>::max();
    const Bits<Real> a = low[0] == least ? where[0] : never, b = low[1] == least ? where[1] : never;
    return {least, static_cast<int>(least_lane<IntegerAs<Real>>(smaller(a, b)))};
  }
};

template <class Cost>
DNDETR_INLINE Shortest<Cost> smallest(const Cost* row, int stride) {
  Lowest<Cost> lowest;
  for (int j = 0; j < stride; j += 2 * kLanes<Cost>) {
#pragma GCC unroll 2
    for (int chain = 0; chain < 2; ++chain) lowest.see(chain, vector_at<Reals<Cost>>(row + j + chain * kLanes<Cost>));
  }
  return lowest.find();
}

// One problem, its columns padded to whole lines of infinite cost. Prices and lengths are double for every cost.
template <class Cost>
struct VectorColumns {
  using Real = double;
  using Values = Reals<double>;
  using Indices = Bits<double>;

  Problem<Cost>& p;

  DNDETR_INLINE const Cost* row(int i) const { return p.cost + std::int64_t(i) * p.stride; }

  DNDETR_INLINE void start(int rows) {
    std::fill_n(p.rise, p.stride, 0.0);
    std::fill_n(p.taken, p.stride, 0.0);
    std::fill_n(p.row_of, p.stride, -1);
    for (int i = 0; i < rows; ++i) {
      const Shortest<Cost> best = smallest(row(i), p.stride);
      const bool kept = p.row_of[best.column] < 0;
      p.row_price[i] = best.length;
      p.column_of[i] = kept ? best.column : -1;
      if (kept) take(best.column, i);
    }
  }

  DNDETR_INLINE void take(int j, int i) {
    p.row_of[j] = i;
    p.taken[j] = kInfinity;
  }

  DNDETR_INLINE int next_unmatched(int i) const {
    do ++i;
    while (i < p.rows && p.column_of[i] >= 0);
    return i;
  }

  DNDETR_INLINE void restart() {
    std::fill_n(p.length, p.stride, kInfinity);
    p.visited = 0;
  }

  DNDETR_INLINE Shortest<double> relax(int i, double length) {
    const double base = length - p.row_price[i];
    const Cost* const costs = row(i);
    const Indices from = static_cast<std::int64_t>(i) - Indices{};
    Lowest<double> lowest;
    Values free[2] = {kInfinity - Values{}, kInfinity - Values{}};  // the smallest of columns without a row
    for (int first = 0; first < p.stride; first += 2 * kLanes<double>) {
#pragma GCC unroll 2
      for (int chain = 0; chain < 2; ++chain) {
        const int j = first + chain * kLanes<double>;
        const Values c = __builtin_convertvector(vector_at<typename PerDouble<Cost>::Costs>(costs + j), Values);
        const Values through = base + c + vector_at<Values>(p.rise + j);
        const Values old = vector_at<Values>(p.length + j);
        const Indices shorter = through < old;
        const Values now = shorter ? through : old;
        vector_at<Values>(p.length + j) = now;
        vector_at<Indices>(p.before + j) = shorter ? from : vector_at<Indices>(p.before + j);
        lowest.see(chain, now);
        free[chain] = smaller(free[chain], now + vector_at<Values>(p.taken + j));
      }
    }
    const Shortest<double> best = lowest.find();
    if (p.row_of[best.column] < 0 || least_lane<double>(smaller(free[0], free[1])) != best.length) return best;
    return {best.length, free_column(best.length)};
  }

  // The lowest column without a row at exactly this length; there is one.
  DNDETR_INLINE int free_column(double length) const {
    int j = 0;
    while (p.length[j] != length || p.row_of[j] >= 0) ++j;
    return j;
  }

  DNDETR_INLINE int row_of(int j) const { return p.row_of[j]; }

  // A closed column has an infinite price and length meanwhile.
  DNDETR_INLINE void close(int j) {
    p.closed[p.visited++] = {j, p.length[j], p.rise[j]};
    p.rise[j] = p.length[j] = kInfinity;
  }

  DNDETR_INLINE void reprice(int first, double length) {
    p.row_price[first] += length;
    for (int v = 0; v < p.visited; ++v) {
      const double amount = length - p.closed[v].length;
      p.row_price[p.row_of[p.closed[v].column]] += amount;
      p.rise[p.closed[v].column] = p.closed[v].rise + amount;
    }
  }

  DNDETR_INLINE void augment(int first, int j) {
    for (int row = -1; row != first;) {
      row = static_cast<int>(p.before[j]);
      take(j, row);
      std::swap(p.column_of[row], j);
    }
  }
};

// What is not finite becomes a cost worse than all that are.
template <class Cost>
DNDETR_INLINE void make_finite(const Problem<Cost>& p) {
  Cost worst = -kLargest<Cost>;
  for (int i = 0; i < p.rows; ++i) {
    for (int j = 0; j < p.columns; ++j) {
      const Cost c = p.cost[std::int64_t(i) * p.stride + j];
      worst = is_sound(c) ? std::max(worst, c) : worst;
    }
  }
  worst = worst_cost(worst);
  for (int i = 0; i < p.rows; ++i) {
    for (int j = 0; j < p.columns; ++j) {
      Cost& c = p.cost[std::int64_t(i) * p.stride + j];
      c = is_sound(c) ? c : worst;
    }
  }
}

template <class Cost>
DNDETR_INLINE void pad_rows(const Problem<Cost>& p) {
  for (int i = 0; i < p.rows; ++i) {
    Cost* row = p.cost + std::int64_t(i) * p.stride;
    std::fill(row + p.columns, row + p.stride, std::numeric_limits<Cost>::infinity());
  }
}

// Rows of targets, `stride` apart, to rows of queries.
template <class Cost>
DNDETR_INLINE void transpose(const Cost* from, int stride, const Problem<Cost>& p) {
  for (int j = 0; j < p.columns; ++j) {
    for (int i = 0; i < p.rows; ++i) p.cost[std::int64_t(i) * p.stride + j] = from[std::int64_t(j) * stride + i];
  }
}

// Costs of one problem from a tensor; whether all are finite.
template <class Cost>
DNDETR_INLINE bool load(const AssignProblems& a, int problem, const Problem<Cost>& p) {
  const Cost* from = static_cast<const Cost*>(a.cost) + problem * a.problem_stride;
  const std::int64_t row_step = p.swapped ? a.query_stride : a.target_stride;
  const std::int64_t column_step = p.swapped ? a.target_stride : a.query_stride;
  Bits<Cost> odd{};
  if (column_step == 1) {
    for (int i = 0; i < p.rows; ++i, from += row_step) {
      Cost* to = p.cost + std::int64_t(i) * p.stride;
      int j = 0;
      for (; j + kLanes<Cost> <= p.columns; j += kLanes<Cost>) {
        Reals<Cost> c;
        std::memcpy(&c, from + j, sizeof c);
        __builtin_prefetch(from + row_step + j);
        odd |= ~(larger(c, -c) <= kLargest<Cost>);
        vector_at<Reals<Cost>>(to + j) = c;
      }
      for (; j < p.columns; ++j) odd |= -IntegerAs<Cost>(!is_sound(to[j] = from[j]));
    }
  } else {
    for (int j = 0; j < p.columns; j += kLanes<Cost>) {
      const Cost* lanes[kLanes<Cost>];  // beyond the last column once more that one; padding replaces it
      for (int l = 0; l < kLanes<Cost>; ++l) lanes[l] = from + std::min(j + l, p.columns - 1) * column_step;
      for (int l = 0; l < kLanes<Cost>; ++l) {
        const Cost* const next = lanes[l] + kLanes<Cost> * column_step;
        for (int i = 0; i < p.rows; i += 64 / sizeof(Cost)) __builtin_prefetch(next + i * row_step);
      }
      for (int i = 0; i < p.rows; ++i) {
        Reals<Cost> c;
        for (int l = 0; l < kLanes<Cost>; ++l) c[l] = lanes[l][i * row_step];
        odd |= ~(larger(c, -c) <= kLargest<Cost>);
        vector_at<Reals<Cost>>(p.cost + std::int64_t(i) * p.stride + j) = c;
      }
    }
  }
  pad_rows(p);
  return !any_lane(odd);
}

template <class Cost>
DNDETR_INLINE void solve_problem(Problem<Cost>& p) {
  VectorColumns<Cost> columns{p};
  solve(columns, p.rows);
}

template <class Cost>
DNDETR_INLINE void assign_range(const AssignProblems& a, int first, int last) {
  Problem<Cost> p;
  for (int problem = first; problem < last; ++problem) {
    std::int32_t* query_of = a.query_of + std::int64_t(problem) * a.targets;
    p.resize(a.queries, std::clamp<int>(a.counts[problem], 0, a.targets));
    if (p.rows > 0) {
      if (!load(a, problem, p)) make_finite(p);
      solve_problem(p);
    }
    p.write_queries(query_of, a.targets, 0);
  }
}

// Costs of an image's real targets with all queries of one set: row t at cost + t * queries.stride, up to whole registers.
// Returns whether all are finite.
template <class Cost, class Fit>
DNDETR_INLINE bool cost_rows(const MatchInputs& m, const CostWeights<Cost>& weights, const Fit& fit,
                             const Queries<Cost>& queries, Cost* cost) {
  using Value = Reals<Cost>;
  const Value none{};
  Bits<Cost> odd{};
  for (int t = 0; t < m.targets_of(queries.image); ++t, cost += queries.stride) {
    const std::int64_t slot = std::int64_t(queries.image) * m.slots + t;
    queries.load_logits(m, m.labels[slot]);
    Cost box[4];
    load_box(m.target_boxes, slot * 4, box);
    const Corners<Value> b = corners(none + box[0], none + box[1], none + box[2], none + box[3]);
    for (int q = 0; q < queries.stride; q += kLanes<Cost>) {
      const auto part = [&](const Cost* array) DNDETR_TARGET -> Value { return vector_at<Value>(array + q); };
      const Corners<Value> a = corners(part(queries.x), part(queries.y), part(queries.w), part(queries.h));
      const Value c = pair_cost(part(queries.logit), a, b, weights, fit);
      odd |= ~(larger(c, -c) <= kLargest<Cost>);
      vector_at<Value>(cost + q) = c;
    }
  }
  return !any_lane(odd);
}

template <class Cost>
DNDETR_INLINE bool cost_rows(const MatchInputs& m, const Queries<Cost>& queries, Cost* cost) {
  const CostWeights<Cost> weights = m.weights.as<Cost>();
  return with_fit(weights.position,
                  [&](const auto& fit) DNDETR_TARGET { return cost_rows(m, weights, fit, queries, cost); });
}

template <class Cost>
DNDETR_INLINE void match_cost_range(const MatchInputs& m, void* out, int first, int last) {
  Queries<Cost> queries(m.queries);
  Lines<Cost> rows;
  for (int problem = first; problem < last; ++problem) {
    queries.load_boxes(m, problem / m.batch, problem % m.batch, 0);
    const int targets = m.targets_of(queries.image);
    const Cost* from = rows.resize(std::int64_t(targets) * queries.stride);
    cost_rows(m, queries, rows.data());
    Cost* to = static_cast<Cost*>(out) + std::int64_t(problem) * m.slots * m.queries;
    for (int t = 0; t < targets; ++t, from += queries.stride, to += m.queries) std::copy_n(from, m.queries, to);
    std::fill_n(to, std::int64_t(m.slots - targets) * m.queries, std::numeric_limits<Cost>::infinity());
  }
}

template <class Cost>
DNDETR_INLINE void match_range(const MatchInputs& m, const MatchOutputs& out, int first, int last) {
  Queries<Cost> queries(m.queries / out.sets);
  Lines<Cost> rows;
  Problem<Cost> p;
  for (int problem = first; problem < last; ++problem) {
    const int set = problem % out.sets, image = problem / out.sets % m.batch, layer = problem / out.sets / m.batch;
    p.resize(queries.count, m.targets_of(image));
    bool finite = true;
    if (p.rows > 0) {
      queries.load_boxes(m, layer, image, set);
      Cost* cost = p.swapped ? rows.resize(std::int64_t(p.columns) * queries.stride) : p.cost;
      finite = cost_rows(m, queries, cost);
      if (p.swapped) transpose(cost, queries.stride, p);
      pad_rows(p);
      if (!finite) make_finite(p);
      solve_problem(p);
    }
    out.finite[problem] = finite;
    p.write_queries(out.query + std::int64_t(problem) * m.slots, m.slots, set * queries.count);
    p.write_targets(out.target + std::int64_t(problem) * queries.count, queries.count);
  }
}
