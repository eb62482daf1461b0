// Matching of one problem by one block of threads.
//
// All warps fill in the costs, in shared memory where they fit, and find the row minima, a row at a time. What is left is
// solved (assign.h) by one warp, if its lanes can hold all columns in registers, or by all: prices and path lengths are in
// registers, the matching so far and the rows before columns in shared memory. A minimum over lanes is a minimum of
// unsigned numbers that are ordered as the floats are, then of the columns where it was found: REDUX, and no order of
// threads that could matter.
#pragma once

#include <cfloat>
#include <climits>
#include <cmath>
#include <cstdint>

#include "floats.h"
#include "ops.h"

#define DNDETR_INLINE __device__ __forceinline__

namespace dndetr::matching {

constexpr unsigned kAll = 0xffffffffu;

__device__ __forceinline__ float exp_of(float x) { return expf(x); }
__device__ __forceinline__ double exp_of(double x) { return exp(x); }
__device__ __forceinline__ float log_of(float x) { return logf(x); }
__device__ __forceinline__ double log_of(double x) { return log(x); }

#include "assign.h"
#include "match_cost.h"

// Numbers that compare as floats do; both zeros are one.
__device__ __forceinline__ std::uint32_t ordered(float x) {
  const std::uint32_t bits = bit_cast<std::uint32_t>(x + 0.0f);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ std::uint64_t ordered(double x) {
  const std::uint64_t bits = bit_cast<std::uint64_t>(x + 0.0);
  return bits >> 63 ? ~bits : bits | 0x8000000000000000ull;
}
__device__ __forceinline__ float value_of(std::uint32_t key) {
  return bit_cast<float>(key >> 31 ? key & 0x7fffffffu : ~key);
}
__device__ __forceinline__ double value_of(std::uint64_t key) {
  return bit_cast<double>(key >> 63 ? key & 0x7fffffffffffffffull : ~key);
}

// The smallest key of a warp and the smallest rank that has it.
__device__ __forceinline__ void least_of_warp(std::uint32_t& key, unsigned& rank) {
  const std::uint32_t low = __reduce_min_sync(kAll, key);
  rank = __reduce_min_sync(kAll, key == low ? rank : kAll);
  key = low;
}
__device__ __forceinline__ void least_of_warp(std::uint64_t& key, unsigned& rank) {
  const auto high = static_cast<std::uint32_t>(key >> 32), low = static_cast<std::uint32_t>(key);
  const std::uint32_t least_high = __reduce_min_sync(kAll, high);
  const std::uint32_t least_low = __reduce_min_sync(kAll, high == least_high ? low : kAll);
  rank = __reduce_min_sync(kAll, high == least_high && low == least_low ? rank : kAll);
  key = std::uint64_t(least_high) << 32 | least_low;
}

struct Candidate {
  std::uint64_t key;
  unsigned rank;
};

// Threads that work together: one warp, or all warps of the block. Each of their minima takes one barrier: they alternate
// between two places to exchange through, so that a thread ahead does not overwrite what others still read.
template <int Warps>
struct Team {
  static constexpr int kLanes = 32 * Warps;
  int lane;
  Candidate* exchange;  // shared, [2 * Warps]
  int turn = 0;

  DNDETR_INLINE void wait() const {
    if constexpr (Warps == 1) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  }

  // The smallest value of all lanes, and the smallest rank that has it, on every lane.
  template <class Real>
  DNDETR_INLINE Shortest<Real> least(Real value, unsigned rank) {
    auto key = ordered(value);
    least_of_warp(key, rank);
    if constexpr (Warps > 1) {
      Candidate* const place = exchange + turn * Warps;
      if (lane % 32 == 0) place[lane / 32] = {key, rank};
      __syncthreads();
      const Candidate other = place[lane % Warps];
      key = static_cast<decltype(key)>(other.key);
      rank = other.rank;
      least_of_warp(key, rank);
      turn ^= 1;
    }
    return {value_of(key), static_cast<int>(rank)};
  }
};

// One problem in shared memory; costs beyond its size are in a workspace. Rows are the smaller side: targets, or queries
// where there are more targets than those.
template <class Cost, class Real>
struct Problem {
  bool swapped;
  int rows, columns;
  Cost* cost;  // [rows, columns]
  Real* row_price;
  int *column_of, *row_of, *before;

  DNDETR_INLINE const Cost* row(int i) const { return cost + std::int64_t(i) * columns; }
};

// Bytes of a problem besides its costs.
template <class Real>
__host__ __device__ inline std::int64_t state_bytes(int rows, int columns) {
  return rows * std::int64_t(sizeof(Real)) + (rows + 2 * std::int64_t(columns) + 1) / 2 * 2 * sizeof(int);
}

// The columns of a problem, `PerLane` of them in the registers of each thread of a team.
template <class Cost, class RealType, int Warps, int PerLane>
struct LaneColumns {
  using Real = RealType;
  static constexpr int kLanes = Team<Warps>::kLanes;
  static constexpr unsigned kTaken = 1u << 31;  // in a rank: after all columns without a row

  const Problem<Cost, Real>& p;
  Team<Warps> team;
  Real length[PerLane], price[PerLane];
  unsigned closed, taken;  // a bit for each column of the lane

  DNDETR_INLINE int column(int k) const { return team.lane + k * kLanes; }

  DNDETR_INLINE void start(int) {
    taken = 0;
#pragma unroll
    for (int k = 0; k < PerLane; ++k) {
      price[k] = 0;
      if (column(k) < p.columns && p.row_of[column(k)] >= 0) taken |= 1u << k;
    }
  }

  DNDETR_INLINE int next_unmatched(int i) {
    unsigned found = INT_MAX;
    for (int row = i + 1 + team.lane; row < p.rows; row += kLanes) {
      if (p.column_of[row] < 0) {
        found = row;
        break;
      }
    }
    return team.template least<float>(0.0f, found).column;
  }

  DNDETR_INLINE void restart() {
    closed = 0;
#pragma unroll
    for (int k = 0; k < PerLane; ++k) length[k] = static_cast<Real>(INFINITY);
  }

  DNDETR_INLINE Shortest<Real> relax(int i, Real so_far) {
    const Real base = so_far - p.row_price[i];
    const Cost* const costs = p.row(i);
    Real low = static_cast<Real>(INFINITY);
    unsigned rank = kAll;
#pragma unroll
    for (int k = 0; k < PerLane; ++k) {
      const int j = column(k);
      if (j < p.columns && !(closed >> k & 1)) {
        const Real through = base + static_cast<Real>(costs[j]) - price[k];
        if (through < length[k]) {
          length[k] = through;
          p.before[j] = i;
        }
        const unsigned own = j | (taken >> k & 1) * kTaken;
        if (length[k] < low || (length[k] == low && own < rank)) {
          low = length[k];
          rank = own;
        }
      }
    }
    const Shortest<Real> best = team.least(low, rank);
    return {best.length, static_cast<int>(best.column & ~kTaken)};
  }

  DNDETR_INLINE int row_of(int j) const { return p.row_of[j]; }

  DNDETR_INLINE void close(int j) {
    if (j % kLanes == team.lane) closed |= 1u << j / kLanes;
  }

  DNDETR_INLINE void reprice(int first, Real total) {
    team.wait();  // all have read the prices of the last search's rows
    if (team.lane == 0) p.row_price[first] += total;
#pragma unroll
    for (int k = 0; k < PerLane; ++k) {
      if (closed >> k & 1) {
        const Real amount = total - length[k];
        price[k] -= amount;
        p.row_price[p.row_of[column(k)]] += amount;
      }
    }
    team.wait();
  }

  DNDETR_INLINE void augment(int first, int sink) {
    if (team.lane == 0) {
      // A path has every row at most once.
      int j = sink, row = -1;
      for (int step = 0; step < p.rows && row != first; ++step) {
        row = p.before[j];
        const int next = p.column_of[row];
        p.row_of[j] = row;
        p.column_of[row] = j;
        j = next;
      }
    }
    if (sink % kLanes == team.lane) taken |= 1u << sink / kLanes;
    team.wait();
  }
};

// Where a problem's costs come from, by its number: a tensor, or predictions and targets.
template <class CostType>
struct GivenCosts {
  using Cost = CostType;
  AssignProblems a;
  const Cost* from = nullptr;
  int targets = 0;

  DNDETR_INLINE int queries() const { return a.queries; }
  DNDETR_INLINE int slots() const { return a.targets; }

  DNDETR_INLINE void open(int problem) {
    from = static_cast<const Cost*>(a.cost) + problem * a.problem_stride;
    targets = min(max(a.counts[problem], 0), a.targets);
  }

  DNDETR_INLINE const Cost* target(int t) const { return from + t * a.target_stride; }

  template <class Use>
  DNDETR_INLINE void with_costs(const Use& use) const {
    use([step = a.query_stride](const Cost* target, int q) { return __ldg(target + q * step); });
  }
};

// Numbers through the read-only cache: the compiler may then load many before it stores one.
template <class Element>
DNDETR_INLINE Element fetch(const Element* from) {
  if constexpr (sizeof(Element) == 2) {
    return Element{__ldg(reinterpret_cast<const std::uint16_t*>(from))};
  } else {
    return __ldg(from);
  }
}

// Boxes are of the type of the costs.
template <class CostType>
struct ComputedCosts {
  using Cost = CostType;
  struct Target {
    std::int64_t label;
    Corners<Cost> box;
  };

  MatchInputs m;
  int sets;
  CostWeights<Cost> weights;
  std::int64_t first_slot = 0, first_logit = 0, first_box = 0;
  int targets = 0;

  DNDETR_INLINE int queries() const { return m.queries / sets; }
  DNDETR_INLINE int slots() const { return m.slots; }

  DNDETR_INLINE void open(int problem) {
    const int set = problem % sets, image = problem / sets % m.batch, layer = problem / sets / m.batch;
    const std::int64_t query = std::int64_t(set) * queries();
    first_slot = std::int64_t(image) * m.slots;
    first_logit = layer * m.logits_strides.layer + image * m.logits_strides.image + query * m.logits_strides.query;
    first_box = layer * m.boxes_strides.layer + image * m.boxes_strides.image + query * m.boxes_strides.query;
    targets = min(max(m.counts[image], 0), m.slots);
  }

  DNDETR_INLINE Corners<Cost> box(Array boxes, std::int64_t first) const {
    const Cost* const from = static_cast<const Cost*>(boxes.data) + first;
    return corners(fetch(from), fetch(from + 1), fetch(from + 2), fetch(from + 3));
  }

  DNDETR_INLINE Target target(int t) const {
    const std::int64_t slot = first_slot + t;
    return {m.labels[slot], box(m.target_boxes, 4 * slot)};
  }

  // A label that does not exist has no logits: its costs are not finite.
  template <class Logit>
  DNDETR_INLINE Cost cost(const Logit* logits, const Target& target, int q) const {
    if (target.label < 0 || target.label >= m.classes) return static_cast<Cost>(NAN);
    const Cost logit = widen(fetch(logits + first_logit + q * m.logits_strides.query + target.label));
    return pair_cost(logit, box(m.boxes, first_box + q * m.boxes_strides.query), target.box, weights);
  }

  // use(cost of a target and a query), for the type of the logits.
  template <class Use>
  DNDETR_INLINE void with_costs(const Use& use) const {
    const auto with = [&](auto logits) { use([=](const Target& t, int q) { return cost(logits, t, q); }); };
    if constexpr (sizeof(Cost) == 8) {
      with(static_cast<const double*>(m.logits.data));
    } else if (m.logits.dtype == Dtype::float32) {
      with(static_cast<const float*>(m.logits.data));
    } else if (m.logits.dtype == Dtype::bfloat16) {
      with(static_cast<const BFloat16*>(m.logits.data));
    } else {
      with(static_cast<const Float16*>(m.logits.data));
    }
  }
};

// Costs beyond it count as not finite, so that no sum of them overflows.
template <class Cost, class Real>
DNDETR_INLINE bool is_sound(Cost c) {
  constexpr double kLargest = sizeof(Real) == 4 ? 1e30 : sizeof(Cost) == 4 ? FLT_MAX : 1e150;
  return fabs(c) <= static_cast<Cost>(kLargest);
}

// All costs, by all warps; whether none had to be replaced by one that is worse than the rest.
template <int Warps, class Source, class Cost, class Real>
DNDETR_INLINE bool fill(const Source& source, const Problem<Cost, Real>& p, Team<Warps>& team) {
  const int lane = team.lane % 32, warp = team.lane / 32;
  bool odd = false;
  Cost worst = static_cast<Cost>(-INFINITY);
  const auto put = [&](int i, int j, Cost c) {
    p.cost[std::int64_t(i) * p.columns + j] = c;
    if (is_sound<Cost, Real>(c)) {
      worst = larger(worst, c);
    } else {
      odd = true;
    }
  };
  // One target at a time: the rows, or the columns where there are more targets than queries.
  source.with_costs([&](const auto& cost) {
    for (int t = warp; t < source.targets; t += Warps) {
      const auto target = source.target(t);
#pragma unroll 4
      for (int q = lane; q < source.queries(); q += 32) put(p.swapped ? q : t, p.swapped ? t : q, cost(target, q));
    }
  });
  if (!__syncthreads_or(odd)) return true;
  worst = -team.least(-worst, 0).length;
  const Cost above = worst + static_cast<Cost>(fabs(worst)) + Cost(1);
  const Cost instead = !(fabs(worst) < INFINITY) ? Cost(1) : fabs(above) < INFINITY ? above : static_cast<Cost>(FLT_MAX);
  for (std::int64_t e = team.lane; e < std::int64_t(p.rows) * p.columns; e += Team<Warps>::kLanes) {
    if (!is_sound<Cost, Real>(p.cost[e])) p.cost[e] = instead;
  }
  __syncthreads();
  return false;
}

// Each row's cheapest column, the lowest first; the lowest of the rows that want a column has it.
template <int Warps, class Cost, class Real>
DNDETR_INLINE void take_minima(const Problem<Cost, Real>& p, int thread) {
  for (int j = thread; j < p.columns; j += 32 * Warps) p.row_of[j] = -1;
  __syncthreads();
  Team<1> warp{thread % 32, nullptr};
  for (int i = thread / 32; i < p.rows; i += Warps) {
    const Cost* const costs = p.row(i);
    Cost low = static_cast<Cost>(INFINITY);
    unsigned where = kAll;
    for (int j = warp.lane; j < p.columns; j += 32) {
      if (costs[j] < low) {
        low = costs[j];
        where = j;
      }
    }
    const Shortest<Cost> best = warp.least(low, where);
    if (warp.lane == 0) {
      p.row_price[i] = best.length;
      p.column_of[i] = best.column;
      atomicMin(reinterpret_cast<unsigned*>(p.row_of + best.column), static_cast<unsigned>(i));  // -1 is the largest
    }
  }
  __syncthreads();
  for (int i = thread; i < p.rows; i += 32 * Warps) {
    if (p.row_of[p.column_of[i]] != i) p.column_of[i] = -1;
  }
  __syncthreads();
}

// Matches problem blockIdx.x: all `Warps` of the block, `Solvers` (1 or all) of them search. `shared` has `bytes`.
template <int Warps, int Solvers, int PerLane, class Real, class Source>
DNDETR_INLINE void match_problem(Source source, const MatchOutputs& out, char* shared, std::int64_t bytes,
                                 typename Source::Cost* workspace) {
  using Cost = typename Source::Cost;
  static_assert(Solvers == 1 || Solvers == Warps);
  const int problem = blockIdx.x, thread = threadIdx.x;
  source.open(problem);
  const int queries = source.queries(), targets = source.targets;
  Problem<Cost, Real> p;
  p.swapped = targets > queries;
  p.rows = p.swapped ? queries : targets;
  p.columns = p.swapped ? targets : queries;
  Team<Warps> all{thread, reinterpret_cast<Candidate*>(shared)};
  char* const state = shared + 2 * Warps * sizeof(Candidate);
  p.row_price = reinterpret_cast<Real*>(state);
  p.column_of = reinterpret_cast<int*>(p.row_price + p.rows);
  p.row_of = p.column_of + p.rows;
  p.before = p.row_of + p.columns;
  char* const rest = state + state_bytes<Real>(p.rows, p.columns);
  const bool fits = rest - shared + std::int64_t(p.rows) * p.columns * std::int64_t(sizeof(Cost)) <= bytes;
  p.cost = fits ? reinterpret_cast<Cost*>(rest) : workspace + std::int64_t(problem) * queries * source.slots();

  bool finite = true;
  if (p.rows > 0) {
    finite = fill(source, p, all);
    take_minima<Warps>(p, thread);
    if (thread < 32 * Solvers) {
      LaneColumns<Cost, Real, Solvers, PerLane> columns{p, {thread, all.exchange}};
      solve(columns, p.rows);
    }
    __syncthreads();
  }

  const int first = problem % out.sets * queries;
  for (int t = thread; t < source.slots(); t += 32 * Warps) {
    const int found = p.rows == 0 || t >= targets ? -1 : p.swapped ? p.row_of[t] : p.column_of[t];
    out.query[std::int64_t(problem) * source.slots() + t] = found < 0 ? -1 : found + first;
  }
  if (out.target == nullptr) return;
  for (int q = thread; q < queries; q += 32 * Warps) {
    out.target[std::int64_t(problem) * queries + q] = p.rows == 0 ? -1 : p.swapped ? p.column_of[q] : p.row_of[q];
  }
  if (thread == 0) out.finite[problem] = finite;
}

}  // namespace dndetr::matching
